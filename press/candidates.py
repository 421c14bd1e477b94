"""What makes each precision: which passes, and what they learn from calibration data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from ..errors import UsageError
from ..optimizers import TARGETS, Target
from ..optimizers.lower.fuse_group_query_attention import shared_caches
from ..optimizers.outcome import Outcome
from ..optimizers.pipeline import Change, lowered, pass_name, run_passes
from ..optimizers.placeable import unplaced
from ..optimizers.precision.convert_floats import ConvertFloats
from ..optimizers.precision.emulate_floats import EmulateFloats
from ..optimizers.precision.float_rules import label
from ..optimizers.precision.importance import Importance, InputNorms
from ..optimizers.precision.layers import Layer, layers
from ..optimizers.precision.learn_int8 import Int8, learn
from ..optimizers.precision.mask_weights import MaskWeights
from ..optimizers.precision.observe import with_outputs
from ..optimizers.precision.overflow import observe_peaks, overflows
from ..optimizers.precision.prune_feed_forward import PruneFeedForward
from ..optimizers.precision.prune_heads import PruneHeads
from ..optimizers.precision.quantize_dynamic import QuantizeDynamic
from ..optimizers.precision.quantize_embeddings import QuantizeEmbeddings
from ..optimizers.precision.quantize_static import Scheme
from ..optimizers.precision.quantized import already_quantized
from .lab import Attempt, Lab
from .record import precision_of
from .wish import Pruning, Wish

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Maker:
    """Makes the candidates of one precision.

    Attributes:
        make: Builds one, given the names of the layers that stay in float.
        layers: The layers of which each may stay in float; none where the precision has no such.
        recipe: How it is made, for the manifest.
        notes: What the user should know.
        alphas: SmoothQuant's alpha of layers, by name.
        reasons: Why layers stay in float in every candidate, by name.
    """

    make: Callable[[Collection[str]], Attempt]
    layers: tuple[Layer, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    alphas: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


def check_target(target: str, precision: str) -> None:
    """Refuse what a target has no kernels for.

    Raises:
        UsageError: It has no such precision; the message says why.
    """
    has = TARGETS[target].precisions
    if precision not in (*has, "auto"):
        raise UsageError(
            f"the target {target} has no {precision}: {_WHY_NOT[target, precision]}",
            hint="--precision " + ", ".join(has),
        )


def check_model(model: ir.Model) -> None:
    """Refuse a model that is not in float32 any more.

    Raises:
        UsageError: It is quantized, or its weights are of another type.
    """
    hint = "start from the model in float32; what was rounded once cannot be taken back"
    if node := already_quantized(model):
        raise UsageError(f"the model is quantized already: it has {node}", hint=hint)
    own = precision_of(model) or "fp32"
    if own != "fp32":
        raise UsageError(f"the model is {own} already", hint=hint)


_WHY_NOT = {
    ("cuda", "int8"): "its provider has no kernel for integer activations, so that "
    "QuantizeLinear and DequantizeLinear would only add work around float MatMuls",
    ("cuda", "int8-dynamic"): "its provider has no DynamicQuantizeLinear: nodes would fall to "
    "the CPU, with a copy each way",
    ("tensorrt", "int8-dynamic"): "TensorRT takes no scales that are computed at run time",
    ("cpu", "bf16"): "ONNX Runtime has no bf16 kernels on the CPU",
    ("openvino", "fp16"): "on a CPU it computes float16 in float32 or bfloat16",
    ("openvino", "int8-dynamic"): "it makes float MatMuls of scales that are computed at run time",
}


def maker(
    lab: Lab,
    target: Target,
    precision: str,
    pruning: list[ir.passes.InPlacePass],
    wish: Wish,
    progress: Progress,
) -> Maker:
    """What makes the candidates of a precision for a target; the functions below say how.

    Raises:
        UsageError: The model has nothing to change, or the target cannot be judged here.
    """
    match precision:
        case "fp32":
            return float32(lab, pruning, target)
        case "int8":
            return int8(lab, pruning, wish.calibrator, progress, target)
        case "int8-dynamic":
            return dynamic(lab, pruning)
        case _ if target.name == "openvino":
            return hinted(lab, pruning, precision, target, half_io=wish.half_io)
        case _:
            return halves(lab, pruning, precision, wish.half_io, progress)


def _native(target: Target, precision: str) -> dict[str, str] | None:
    """Provider options that a target's own graph is judged with; None where a stand-in is."""
    from ..runtime import openvino

    if target.name != "openvino" or openvino.missing():
        return None
    return openvino.options(precision)


# Pruning --------------------------------------------------------------------------------------


def prune(lab: Lab, wish: Pruning, progress: Progress) -> list[ir.passes.InPlacePass]:
    """The passes that prune the lab's base graph, by importance on the calibration data.

    Raises:
        UsageError: One of them has nothing to remove.
    """
    passes: list[ir.passes.InPlacePass] = []
    if wish.heads or wish.ffn:
        progress("importance of heads and feed-forward columns")
        importance = Importance(lab.base)
        _watch(lab, importance.taps, importance.see)
        scores = importance.scores()
        passes += [PruneHeads(wish.heads, scores)] if wish.heads else []
        passes += [PruneFeedForward(wish.ffn, scores)] if wish.ffn else []
    if wish.weights or wish.two_of_four:
        progress("norms of what enters each MatMul")
        start = _applied(lab.base, passes)
        norms = InputNorms(start)
        _watch(lab, norms.taps, norms.see, start)
        if wish.two_of_four:
            passes.append(MaskWeights(pattern="2:4", norms=norms.norms()))
        else:
            passes.append(MaskWeights(wish.weights, norms=norms.norms()))
    pruned = lab.base.clone()
    for p in passes:
        done = p(pruned)
        if isinstance(done, Outcome) and not done.hits:
            why = done.notes or ("the model has nothing of the kind",)
            raise UsageError(
                "\n".join([f"{pass_name(p)} finds nothing to remove", *why[:5]]),
                hint="another --prune, or none",
            )
    return passes


def _watch(
    lab: Lab, taps: list[str], see: Callable[..., None], model: ir.Model | None = None
) -> None:
    if not taps:
        return
    outputs = with_outputs(model or lab.base, taps)
    data = list(lab.batches())
    for feeds, found in zip(data, lab.run(outputs, data), strict=True):
        mask = lab.real(feeds)
        fits = {n: mask for n in taps if mask is not None and found[n].shape[:-1] == mask.shape}
        see(found, fits)


def _applied(model: ir.Model, passes: Iterable[ir.passes.InPlacePass]) -> ir.Model:
    copy = model.clone()
    for p in passes:
        p(copy)
    return copy


# Precisions -----------------------------------------------------------------------------------


def _layers(model: ir.Model) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """The layers that int8 is made of, and why others are none.

    Raises:
        UsageError: There are none.
    """
    found, notes = layers(model)
    if not found:
        raise UsageError(
            "\n".join(["the model has no MatMul that int8 would make faster", *notes[:5]]),
            hint="it takes those with a constant weight; fp16 and bf16 take other ops too",
        )
    return tuple(found), tuple(notes)


def float32(lab: Lab, pruning: list[ir.passes.InPlacePass], target: Target) -> Maker:
    """fp32: the pruned graph, or the graph itself."""
    change, options = Change(base=pruning), _native(target, "fp32")
    return Maker(lambda _: lab.attempt("fp32", change, target=target, options=options))


def hinted(
    lab: Lab,
    pruning: list[ir.passes.InPlacePass],
    precision: str,
    target: Target,
    *,
    half_io: bool,
) -> Maker:
    """bf16 as an option of the session: the graph is that of float32, and has no stand-in.

    Raises:
        UsageError: The provider is not here to judge it, or inputs were to be half as well.
    """
    from ..runtime import openvino

    if half_io:
        raise UsageError(f"--half-io has no use with {target.name}: its graph stays in float32")
    if why := openvino.missing():
        raise UsageError(
            f"{precision} for {target.name} is an option of its session, and judged there alone",
            hint=why,
        )
    change, options = Change(base=pruning), openvino.options(precision)
    return Maker(
        lambda _: lab.attempt(precision, change, target=target, options=options),
        recipe={"computed_in": f"{precision}, by an option of the session"},
    )


def int8(
    lab: Lab,
    pruning: list[ir.passes.InPlacePass],
    calibrator: str,
    progress: Progress,
    target: Target,
) -> Maker:
    """Static int8, with all that helps: smoothing, compensated rounding, corrected biases."""
    kind, options = target.quantized, _native(target, "int8")
    assert kind is not None
    start = _applied(lab.base, pruning)
    found, notes = _layers(start)
    if kind not in lab.learned:  # targets with integers of one kind learn the same
        config = Int8(Scheme(kind), calibrator=calibrator)
        lab.learned[kind] = learn(
            start, config, lab.run, lab.batches, real=lab.real, progress=progress
        )
    learned = lab.learned[kind]
    by_value = {s.value: s.alpha for s in learned.smoothings}

    # TensorRT reads scales that are constants, and those of a looked-up row are not.
    wide = None if target.takes_bfloat16 else QuantizeEmbeddings(scales=ir.DataType.FLOAT)
    tables = [wide or QuantizeEmbeddings()] if kind == "uint8" else []

    def make(keep: Collection[str]) -> Attempt:
        change = Change(base=[*pruning, *learned.passes(keep), *tables])
        return lab.attempt("int8", change, kept=keep, target=target, options=options)

    if learned.constant:
        never = f"{len(learned.constant)} activations never change on the calibration data: "
        notes = (*notes, never + ", ".join(learned.constant[:5]))
    return Maker(
        make,
        found,
        recipe={
            "activations": kind,
            "calibrator": calibrator,
            "smoothed": len(learned.smoothings),
            "compensated_weights": len(learned.weights),
            "corrected_biases": len(learned.corrections),
            "embeddings": "int8" if tables else "fp32",
        },
        notes=notes,
        alphas={
            layer.name: by_value[str(layer.input.name)]
            for layer in found
            if str(layer.input.name) in by_value
        },
    )


def dynamic(lab: Lab, pruning: list[ir.passes.InPlacePass]) -> Maker:
    """int8 with scales of activations computed at run time: no calibration data."""
    found, notes = _layers(_applied(lab.base, pruning))

    def make(keep: Collection[str]) -> Attempt:
        quantize = QuantizeDynamic(skip=set(keep))
        change = Change(base=[*pruning, quantize, QuantizeEmbeddings()])
        return lab.attempt("int8-dynamic", change, kept=keep)

    recipe = {"activations": "uint8, scaled at run time", "embeddings": "int8"}
    return Maker(make, found, recipe, notes)


def halves(
    lab: Lab,
    pruning: list[ir.passes.InPlacePass],
    precision: str,
    half_io: bool,
    progress: Progress,
) -> Maker:
    """fp16 or bf16; what overflows on the calibration data stays in float32."""
    start = _applied(lab.base, pruning)
    found, _ = layers(start)
    nodes = {layer.name: label(layer.node) for layer in found}
    progress("probe for overflow")
    # What a fused kernel holds inside cannot be seen: the CPU's graph is probed, which is nearer
    # to the base graph, and without branches, which are written after types.
    graph, probed = start.clone(), start.clone()
    target = replace(lab.target, precision=precision)
    run_passes(graph, lowered(replace(target, skips_empty_masks=False)))
    caches = shared_caches(graph)
    run_passes(probed, lowered(replace(TARGETS["cpu"], skips_empty_masks=False)))
    peaks = observe_peaks(probed, lab.run, list(lab.batches()))
    wide = overflows(probed, peaks, precision)
    names = {o.node for o in wide}
    caching = {label(n) for n in graph.graph if n.op_type == "GroupQueryAttention"}
    if stuck := sorted(_within(graph, names, probed) & caching):
        raise UsageError(
            f"{stuck[0]}: keys or values overflow {precision}, and a shared cache has to be of "
            "that type",
            hint="--precision bf16, which has the range of float32; or fp32",
        )
    trial = start.clone()
    convert = ConvertFloats(
        precision, keep=_within(graph, names, probed), keep_io=not half_io, half=caches
    )
    run_passes(trial, lowered(target, Change(lowered=[convert])))
    # Where the CPU lacks a kernel, ONNX Runtime computes in float32 between Casts of its own.
    lacking = {u.node: u for u in unplaced(trial, target)} if target.name != "cpu" else {}

    def make(keep: Collection[str]) -> Attempt:
        kept = names | {nodes[k] for k in keep}
        inside = (_within(graph, kept, probed) | set(lacking)) - caching
        convert = ConvertFloats(precision, keep=inside, keep_io=not half_io, half=caches)
        shown = [ConvertFloats(precision, keep=kept), EmulateFloats()]
        return lab.attempt(
            precision,
            Change(base=pruning, lowered=[convert]),
            stand_in=Change(base=pruning, lowered=shown),
            kept=keep,
            target=target,
        )

    reasons = {
        layer.name: str(o)
        for o in wide
        for layer in found
        if o.node in (label(layer.node), label(layer.add) if layer.add else None)
    }
    notes = {o.node: f"stays in float32: {o}" for o in wide}
    notes |= {name: f"stays in float32: {u.op} {name!r}: {u.why}" for name, u in lacking.items()}
    recipe = {
        "kept_in_float32": sorted(_within(graph, names, probed) | set(lacking)),
        "inputs_and_outputs": precision if half_io else "fp32",
    }
    return Maker(make, tuple(found), recipe, tuple(notes.values()), reasons=reasons)


def _within(graph: ir.Model, names: Collection[str], probed: ir.Model) -> set[str]:
    """The nodes of `graph` that do what these nodes of `probed` do, by themselves or fused."""
    makers = {str(v.name): label(n) for n in graph.graph for v in n.outputs}
    todo = [n for n in probed.graph if label(n) in names]
    found: set[str] = set()
    seen = set(todo)
    while todo:
        node = todo.pop()
        made = {makers[str(v.name)] for v in node.outputs if v.name in makers}
        found |= made
        if not made:  # its outputs are inside of the node that makes what is made of them
            after = {use.node for v in node.outputs for use in v.uses()} - seen
            seen |= after
            todo += after
    return found
