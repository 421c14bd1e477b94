"""The manifest of what a road made."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import artifact
from ..artifact import Manifest
from .common import graph_signature

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..exporter import Parity
    from ..optimizers import Step, Target
    from ..optimizers.explain import Fusion
    from ..runtime import Session
    from .road import Given, Order


def manifest_of(
    order: Order,
    given: Given,
    model: ir.Model,
    session: Session | None,
    steps: Sequence[Step],
    fusions: Sequence[Fusion],
    parity: Parity | None,
    notes: Sequence[str],
) -> Manifest:
    """The manifest of a float32 graph, or of one that came as it is."""
    from ..optimizers import TARGETS, count_ops
    from ..optimizers.lower.pack_attention import padded_right

    source, before = given.source, given.before
    inputs, outputs = (session.inputs, session.outputs) if session else graph_signature(model)
    runtime: dict[str, Any] = {"onnxruntime": artifact.ORT_RANGE}
    if order.target and (disabled := TARGETS[order.target].disabled_optimizers):
        runtime["disabled_optimizers"] = list(disabled)
    if padded := padded_right(model):
        runtime["padding"] = dict.fromkeys(padded, "right")
    if order.shapes:
        runtime["shapes"] = {name: list(sizes) for name, sizes in order.shapes.items()}
    if order.target == "openvino":
        from ..runtime import openvino

        runtime = runtime_of(order.target, openvino.options("fp32"), runtime)
    elif before is not None and order.target == before.target.get("provider"):
        runtime |= {k: v for k, v in before.runtime.items() if k == "shapes"}
    if before is not None and "optimize" in before.runtime:
        runtime["optimize"] = before.runtime["optimize"]
    return Manifest(
        task=source.task,
        source={
            "spec": source.spec,
            "kind": source.kind,
            "weights_sha256": source.weights_sha256,
            "notes": [*source.notes, *notes],
        },
        target={
            "provider": order.target or "any",
            "precision": _recorded_precision(before)
            or precision_of(model)
            or TARGETS[order.target or "cpu"].precision,
            "opset": model.opset_imports.get("", 0),
        },
        inputs=inputs,
        outputs=outputs,
        settings=source.settings,
        kv=source.kv,
        ops=count_ops(model),
        passes=[recorded(s) for s in steps],
        fusions=[
            {
                "kind": f.kind,
                "fused": f.fused,
                "lifted": f.lifted,
                "missed": [{"node": m.node, "reason": m.reason} for m in f.missed],
            }
            for f in fusions
        ],
        parity=_parity(parity, before),
        precision=before.precision if before else None,
        placement=placement_of(model, TARGETS[order.target or "cpu"]),
        runtime=runtime,
        tools={**before.tools, **_tools("onnx")} if before else _tools(source.kind),
    )


def placement_of(model: ir.Model, target: Target) -> dict[str, Any] | None:
    """Which nodes the target's kernels do not take; None where there is no table of them."""
    from ..optimizers.kernels import TABLES, kernels
    from ..optimizers.placeable import unplaced

    if target.name not in TABLES or target.name == "cpu":
        return None
    return {
        "provider": target.name,
        "kernels": kernels(target.name).source,
        "nodes": sum(1 for graph in model.graphs() for _ in graph),
        "elsewhere": [
            {"node": u.node, "op": u.op, "why": f"{u.why}; {u.fix}"}
            for u in unplaced(model, target)
        ],
    }


def _recorded_precision(before: Manifest | None) -> str | None:
    """What a changed graph was made into: the bytes of its weights do not say."""
    return None if before is None or before.precision is None else before.precision["precision"]


TOKENIZED = ("embed", "classify", "answer")  # their masks are made by our tokenizer


def target_of(name: str | None, task: str, precision: str = "fp32") -> Target:
    """The target as passes see it for a graph of this task and precision; None is any provider."""
    from ..optimizers import TARGETS

    found = replace(TARGETS[name or "cpu"], precision=precision)
    return replace(found, padding="right") if task in TOKENIZED else found


def runtime_of(target: str, options: Mapping[str, str], runtime: dict[str, Any]) -> dict[str, Any]:
    """`Manifest.runtime` of what was judged on a target with these provider options."""
    if not options:
        return runtime
    from ..runtime.wheels import RANGES

    kept = {k: v for k, v in runtime.items() if k != "disabled_optimizers"}
    wheel = RANGES.get(f"onnxruntime-{target}", artifact.ORT_RANGE)
    return {**kept, "onnxruntime": wheel, "provider_options": dict(options)}


def kv_of(kv: dict[str, Any] | None, model: ir.Model) -> dict[str, Any] | None:
    """The layout of the cache in a graph that may have been rewritten to share one buffer."""
    from ..optimizers.lower import decoder_layers
    from ..optimizers.lower import fuse_group_query_attention as gqa

    names = gqa.shared_caches(model)
    if kv is None or not names:
        return kv
    dtype = next(spec.dtype for spec in graph_signature(model)[0] if spec.name in names)
    found = {
        **kv,
        "dtype": dtype.removeprefix("tensor(").removesuffix(")"),
        "layout": "shared",
        "lengths": decoder_layers.LENGTHS,
        "total": decoder_layers.TOTAL,
    }
    window = gqa.window_in(model)
    return found if window is None else {**found, "window": window}


def recorded(step: Step) -> dict[str, Any]:
    """What one pass did, for the manifest: without its time."""
    return {
        "name": step.name,
        "changed": step.changed,
        "ops": step.ops,
        "hits": step.hits,
        "notes": list(step.notes),
    }


def _parity(parity: Parity | None, before: Manifest | None) -> dict[str, Any] | None:
    """The check for the manifest; a drift that was allowed once stays allowed."""
    if parity is None:
        return None
    past = (before.parity if before else None) or {}
    drifts = not parity.passed
    summary = parity.summary()
    if past.get("allowed_drift") and not drifts:
        summary["worst"] = past["worst"]
    return {**summary, "allowed_drift": drifts or bool(past.get("allowed_drift"))}


def precision_of(model: ir.Model) -> str | None:
    """The precision of most bytes of the weights, or None where no weight is of floats."""
    names = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}
    found: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.name in names:
            found[names[tensor.dtype.name]] += tensor.nbytes
    return found.most_common(1)[0][0] if found else None


def _tools(kind: str) -> dict[str, str]:
    packages = ["numpy", "onnx-ir", "onnxscript", "tokenizers"]
    packages += ["torch"] if kind != "onnx" else []
    packages += ["transformers"] if importlib.util.find_spec("transformers") else []
    versions = {p: importlib.metadata.version(p).split("+")[0] for p in packages}
    import onnxruntime

    own = importlib.metadata.version("onnxpress")
    return {**versions, "onnxruntime": onnxruntime.__version__, "onnxpress": own}
