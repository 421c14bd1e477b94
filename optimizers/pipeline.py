"""The passes, in order, and the one loop that runs them."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..errors import UsageError
from .clean.convert_opset import ConvertOpset
from .clean.fold_constants import FoldConstants
from .clean.fold_slices_of_weights import FoldSlicesOfWeights
from .clean.freeze_defaults import FreezeDefaults
from .clean.infer_shapes import InferShapes
from .clean.inline_functions import InlineFunctions
from .clean.merge_equal_nodes import MergeEqualNodes
from .clean.merge_mask_branches import MergeMaskBranches
from .clean.merge_views import MergeViews
from .clean.name_sizes import NameSizes
from .clean.remove_nan_guards import RemoveNanGuards
from .clean.remove_no_ops import RemoveNoOps
from .clean.remove_true_masks import RemoveTrueMasks
from .clean.simplify_mask_indexing import SimplifyMaskIndexing
from .clean.simplify_shapes import SimplifyShapes
from .clean.simplify_with_onnxsim import SimplifyWithOnnxsim
from .clean.sink_transposes import SinkTransposes
from .clean.slice_tables import SliceTables
from .clean.split_packed import SplitPacked
from .clean.split_projections import SplitProjections
from .clean.unflatten_softmax import UnflattenSoftmax
from .clean.unfold_gemm import UnfoldGemm
from .counts import count_changes, count_ops
from .lift.drop_key_bias import DropKeyBias
from .lift.fold_value_bias import FoldValueBias
from .lift.lift_attention import LiftAttention
from .lift.lift_gelu import LiftGelu
from .lift.lift_layer_normalization import LiftLayerNormalization
from .lift.lift_rms_normalization import LiftRmsNormalization
from .lift.lift_rotary_embedding import LiftRotaryEmbedding
from .lift.merge_attention_heads import MergeAttentionHeads
from .lift.share_key_heads import ShareKeyHeads
from .lower.decompose_attention import DecomposeAttention
from .lower.decompose_rms_normalization import DecomposeRmsNormalization
from .lower.decompose_rotary_embedding import DecomposeRotaryEmbedding
from .lower.expand_attention_mask import ExpandAttentionMask
from .lower.expand_rotary_cache import ExpandRotaryCache
from .lower.fuse_bias_gelu import FuseBiasGelu
from .lower.fuse_dynamic_matmul import FuseDynamicMatmul
from .lower.fuse_embedding import FuseEmbedding
from .lower.fuse_group_query_attention import FuseGroupQueryAttention
from .lower.fuse_integer_matmul import FuseIntegerMatmul
from .lower.fuse_skip_layer_normalization import FuseSkipLayerNormalization
from .lower.pack_attention import PackAttention
from .lower.read_sizes_whole import ReadSizesWhole
from .lower.rename_values import RenameValues
from .lower.skip_empty_masks import SkipEmptyMasks
from .lower.soften_attention_mask import SoftenAttentionMask
from .lower.split_attention_heads import SplitAttentionHeads
from .outcome import Miss, Outcome
from .signatures import check_signature, signature_of
from .target import Target


@dataclass(frozen=True)
class Step:
    """What one pass did.

    Attributes:
        index: Its place in the list, from 0; passes that were skipped keep theirs.
        name: Its name, as `until` and `skip` take it.
        changed: Whether it changed the graph in any way, names and shapes included.
        seconds: How long it took.
        ops: The ops that came (above 0) or went (below 0).
        notes: What it declined, where and why.
        hits: How many rewrites it made, where it counts them.
        misses: Layers that it left unfused, and why.
    """

    index: int
    name: str
    changed: bool
    seconds: float
    ops: dict[str, int]
    notes: tuple[str, ...] = ()
    hits: int = 0
    misses: tuple[Miss, ...] = ()


Observer = Callable[[Step, ir.passes.PassBase, ir.Model], None]
"""Called after every pass; it watches, and must leave the model as it is."""


@dataclass(frozen=True)
class Change:
    """Passes that change what a graph computes: precision/ has them, and a gate watches them.

    Attributes:
        base: Of the base graph, before it is lowered: int8 and pruning.
        lowered: Of the lowered graph: fp16 and bf16, which lowering rules need not know.
    """

    base: Sequence[ir.passes.PassBase] = ()
    lowered: Sequence[ir.passes.PassBase] = ()


NO_CHANGE = Change()


def passes(
    target: Target, *, with_onnxsim: bool = False, change: Change = NO_CHANGE
) -> list[ir.passes.PassBase]:
    """The passes for `target`, in the order in which they run."""
    return [*raised(with_onnxsim=with_onnxsim), *lowered(target, change)]


def raised(*, with_onnxsim: bool = False) -> list[ir.passes.PassBase]:
    """From any graph to the base graph."""
    return [*clean(with_onnxsim=with_onnxsim), *lift()]


def lowered(target: Target, change: Change = NO_CHANGE) -> list[ir.passes.PassBase]:
    """From the base graph to that of one target."""
    return [*change.base, *lower(target, change.lowered), *finish()]


def clean(*, with_onnxsim: bool = False) -> list[ir.passes.PassBase]:
    """Leave less of the same, in one form, for the rules that follow to read."""
    return [
        FreezeDefaults(),  # an old file counts its weights as inputs
        ConvertOpset(),  # what is lifted is younger than most files; functions have opsets too
        InlineFunctions(),  # passes match nodes, not calls of functions
        common.RemoveUnusedNodesPass(),  # dead code reads, and rules count readers
        MergeMaskBranches(),  # of a graph that was lowered before: what follows reads no branches
        *([SimplifyWithOnnxsim()] if with_onnxsim else []),  # on the graph as others know it
        FoldConstants(),  # exporters leave shape arithmetic; less for all that follow
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),  # one form
        common.DeduplicateInitializersPass(),  # before CSE, which compares inputs by identity
        MergeEqualNodes(),  # layers that build one mask come to share it
        InferShapes(),  # everything from here on is proved by shapes
        NameSizes(),  # onnx names a computed size anew; here equal sizes get equal names
        SimplifyShapes(),  # needs the names; makes constants of most that a Reshape reads
        FoldConstants(),  # what is computed of those constants: a scale, a bias of LSTMs
        InferShapes(),  # those constants tell onnx more
        NameSizes(),
        FoldSlicesOfWeights(),  # projections that are packed come apart
        FoldConstants(),
        RemoveNoOps(),  # after CSE: equal shapes are one value by now
        UnfoldGemm(),  # a Gemm between reshapes is a MatMul to the rules
        SplitPacked(),
        SplitProjections(),  # reads what SplitPacked wrote
        MergeEqualNodes(),
        common.RemoveUnusedNodesPass(),
        InferShapes(),
        NameSizes(),
        UnflattenSoftmax(),  # needs ranks: what an old opset ran over a matrix
        SimplifyMaskIndexing(),  # needs sizes: a gather of every element is the mask itself
        RemoveTrueMasks(),
        SliceTables(),
        SimplifyShapes(),  # sizes that the masks were given
        RemoveNanGuards(),  # now that masks are plain, some prove that no row is all -inf
    ]


def lift() -> list[ir.passes.PassBase]:
    """Raise what is left to the ops that mean it. Each removes the dead code that it leaves."""
    return [
        LiftGelu(),  # small things first: fewer nodes for the others to pass by
        LiftLayerNormalization(),
        LiftRmsNormalization(),
        LiftRotaryEmbedding(),  # before attention, whose heads hide what is rotated
        LiftAttention(),
        RemoveTrueMasks(),  # of Attention: vision models get one from transformers
        MergeEqualNodes(),  # each layer drew its own mask
        InferShapes(),
        NameSizes(),
        ShareKeyHeads(),  # reads the Attention just written
        MergeViews(),  # what is left of views around it
        SinkTransposes(),  # models that run sequence-first: one Transpose in, one out
        InferShapes(),
        RemoveNoOps(),
        MergeAttentionHeads(),  # reads plain views
        DropKeyBias(),  # needs rank 3, where the bias is next to Attention
        FoldValueBias(),
    ]


def lower(target: Target, change: Sequence[ir.passes.PassBase] = ()) -> list[ir.passes.PassBase]:
    """Write the form that the kernels of `target` take, and run fastest."""
    rules: list[tuple[str, ir.passes.PassBase]] = [
        ("EmbedLayerNormalization", FuseEmbedding()),  # before Skip, which takes its last sum
        ("Attention", PackAttention(right=target.padding == "right")),  # before masks are widened
        ("SkipLayerNormalization", FuseSkipLayerNormalization()),
        ("BiasGelu", FuseBiasGelu()),
        ("MatMulIntegerToFloat", FuseIntegerMatmul()),  # takes the bias, where no rule above did
        ("MatMulIntegerToFloat", FuseDynamicMatmul()),
    ]
    absent: list[tuple[str, ir.passes.PassBase]] = [
        ("Attention", DecomposeAttention()),
        ("RMSNormalization", DecomposeRmsNormalization()),
        ("RotaryEmbedding", DecomposeRotaryEmbedding()),
    ]
    return [
        *([FuseGroupQueryAttention()] if target.precision in target.shares_cache else []),
        # (first: it reads masks as they were exported)
        *(rule for op, rule in rules if f"com.microsoft::{op}" in target.ops),
        *([] if target.reads_lowest_float else [SoftenAttentionMask()]),
        *([] if target.broadcasts_attention_mask else [ExpandAttentionMask()]),
        *([] if target.broadcasts_rotary_cache else [ExpandRotaryCache()]),
        *([SplitAttentionHeads()] if target.heads_apart else []),
        *([ReadSizesWhole()] if target.sizes_on_host else []),  # those of the Expands too
        *(rule for op, rule in absent if op in target.decomposes),  # after all that read them
        *([RenameValues(target.reserved_names)] if target.reserved_names else []),
        *change,  # of types: bodies would stay in float32
        *([SkipEmptyMasks()] if target.skips_empty_masks else []),  # last: no pass sees branches
    ]


def finish() -> list[ir.passes.PassBase]:
    """Leave nothing behind that no one reads."""
    return [
        MergeEqualNodes(),
        common.RemoveUnusedNodesPass(),  # after the last rewrite: each leaves nodes behind
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),  # an exporter's stack traces hold paths
        InferShapes(),  # last: rewrites leave new values untyped, and readers need the types
    ]


def pass_name(p: ir.passes.PassBase) -> str:
    """`FoldConstants` is `fold_constants`; a library's `InlinePass` is `inline`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(p).__name__.removesuffix("Pass")).lower()


def optimize(
    model: ir.Model,
    target: Target,
    *,
    observers: Iterable[Observer] = (),
    until: str | None = None,
    skip: Collection[str] = (),
    with_onnxsim: bool = False,
) -> list[Step]:
    """Optimize `model` for `target`, in place.

    Args:
        model: The base graph. Weights on disk stay there.
        target: What to optimize for.
        observers: Called after each pass.
        until: Stop after the first pass of this name.
        skip: Names of passes to leave out, wherever they stand in the list.
        with_onnxsim: Let onnxsim simplify the graph too, in a process of its own.

    Returns:
        What each pass that ran did, in order.

    Raises:
        UsageError: `until` or `skip` names no pass; the message lists the names there are.
        onnx_ir.passes.PostconditionError: A pass changed the signature: a defect of that pass.
    """
    todo = passes(target, with_onnxsim=with_onnxsim)
    return run_passes(model, todo, observers=observers, until=until, skip=skip)


def run_passes(
    model: ir.Model,
    todo: Sequence[ir.passes.PassBase],
    *,
    observers: Iterable[Observer] = (),
    until: str | None = None,
    skip: Collection[str] = (),
    first: int = 0,
) -> list[Step]:
    """Run a list of passes on `model`, in place: all of `passes`, or a part of it.

    Args:
        model: The graph.
        todo: The passes.
        observers, until, skip: See `optimize`, which says what is raised, too.
        first: The index of the first pass, where others ran before.
    """
    with _without_output_names(model) as declared:
        return _run(model, todo, tuple(observers), until, frozenset(skip), first, declared)


@contextlib.contextmanager
def _without_output_names(model: ir.Model) -> Iterator[dict[str | None, ir.Shape | None]]:
    """Hide what an exporter called the sizes of outputs, and give it back at the end.

    No one checks those names: torch takes `dynamic_axes` of outputs as they are given, and a size
    that is called like an input's, but is not its, would prove what is not so. What is taken out of
    the dict is not given back: a pass that changes the signature knows better.
    """
    declared = {v.name: v.shape for v in model.graph.outputs}
    for value in model.graph.outputs:
        if value.shape is not None and not value.is_graph_input():
            value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])
    try:
        yield declared
    finally:
        for value in model.graph.outputs:
            shape = declared.get(value.name)
            if shape is not None and not value.is_graph_input():
                value.shape = shape


def _run(
    model: ir.Model,
    todo: Sequence[ir.passes.PassBase],
    observers: tuple[Observer, ...],
    until: str | None,
    skip: frozenset[str],
    first: int,
    declared: dict[str | None, ir.Shape | None],
) -> list[Step]:
    names = [pass_name(p) for p in todo]
    _check_names(names, {*skip, *([until] if until else [])})
    steps: list[Step] = []
    before, signature = count_ops(model), signature_of(model)
    for index, (name, p) in enumerate(zip(names, todo, strict=True), first):
        if name not in skip:
            start = time.perf_counter()
            try:
                with _quiet():
                    result = p(model)
                if getattr(p, "changes_signature", False):  # it was asked to
                    signature = signature_of(model)
                    for value in model.graph.outputs:
                        if value.shape is not None and not value.shape.has_unknown_dim():
                            declared.pop(value.name, None)
                check_signature(name, signature, signature_of(model))
            except Exception as e:
                e.add_note(f"raised by pass {index}, {name}")
                raise
            seconds, after = time.perf_counter() - start, count_ops(model)
            said = result if isinstance(result, Outcome) else Outcome(model, result.modified)
            changes = count_changes(before, after)
            steps.append(
                Step(
                    index, name, said.modified, seconds, changes, said.notes, said.hits, said.misses
                )
            )
            before = after
            for observe in observers:
                observe(steps[-1], p, model)
        if name == until:
            break
    return steps


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of the libraries, which name values of theirs; what matters is a note."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_names(known: list[str], asked: set[str]) -> None:
    if unknown := sorted(asked - set(known)):
        raise UsageError(
            f"there is no pass named {', '.join(unknown)}",
            hint=f"passes, in order: {', '.join(dict.fromkeys(known))}",
        )
