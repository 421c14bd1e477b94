"""Which layers of a graph are fused, which stay apart, and why.

    kind                a node that is one                          a layer in parts is known by
    Attention           Attention, MultiHeadAttention, ...          a Softmax that a MatMul reads
    LayerNormalization  LayerNormalization, its Skip and Embed form the root of a variance
    RMSNormalization    RMSNormalization, the Simplified forms      the root of any other mean
    Gelu                Gelu, BiasGelu, FastGelu, QuickGelu         1 + Erf, 1 + Tanh
    RotaryEmbedding     RotaryEmbedding, GQA with do_rotary         a Concat of halves, one negated

The passes that lift say themselves where they stopped. The last column is for layers that none of
them looked at: the pass was skipped, or it does not know the opset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from .counts import tally
from .outcome import Miss, describe
from .pipeline import Step
from .read import is_scalar, producer, readers, scalar

_FORMS: dict[str, frozenset[str]] = {
    "Attention": frozenset(
        {
            "Attention",
            "com.microsoft::Attention",
            "com.microsoft::DecoderMaskedMultiHeadAttention",
            "com.microsoft::DecoderMaskedSelfAttention",
            "com.microsoft::GroupQueryAttention",
            "com.microsoft::MultiHeadAttention",
            "com.microsoft::PackedAttention",
            "com.microsoft::PackedMultiHeadAttention",
            "com.microsoft::PagedAttention",
            "com.microsoft::QAttention",
            "com.microsoft::SparseAttention",
        }
    ),
    "LayerNormalization": frozenset(
        {
            "LayerNormalization",
            "com.microsoft::EmbedLayerNormalization",
            "com.microsoft::SkipLayerNormalization",
        }
    ),
    "RMSNormalization": frozenset(
        {
            "RMSNormalization",
            "SimplifiedLayerNormalization",  # ONNX Runtime's, although of no domain of its own
            "com.microsoft::SkipSimplifiedLayerNormalization",
        }
    ),
    "Gelu": frozenset(
        {
            "Gelu",
            "com.microsoft::BiasGelu",
            "com.microsoft::FastGelu",
            "com.microsoft::Gelu",
            "com.microsoft::QuickGelu",
        }
    ),
    "RotaryEmbedding": frozenset(
        {
            "RotaryEmbedding",
            "com.microsoft::GemmaRotaryEmbedding",
            "com.microsoft::RotaryEmbedding",
        }
    ),
}

# What stands in the name of a pass that lifts to a kind; of two that fit, the first.
_WORDS = {
    "rotary": "RotaryEmbedding",
    "attention": "Attention",
    "rms": "RMSNormalization",
    "layer_norm": "LayerNormalization",
    "gelu": "Gelu",
}


# Of these an anchor says enough; a Softmax before a MatMul may be a pooling, and no attention.
_TOLD_BY_ANCHOR = ("Gelu", "LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class Fusion:
    """One kind of layer in a graph.

    Attributes:
        kind: Attention, LayerNormalization, RMSNormalization, Gelu or RotaryEmbedding.
        fused: Nodes of the graph that are such a layer, in any of its forms; what stands in both
            branches of an If is one (see `counts.tally`).
        lifted: How many of them the passes made; the others came with the graph.
        missed: Layers that stay in parts: the node, the first condition that failed, the value.
    """

    kind: str
    fused: int
    lifted: int
    missed: tuple[Miss, ...]


def explain(model: ir.Model, steps: Sequence[Step]) -> list[Fusion]:
    """Tell for each kind of layer what the passes made of it.

    A pass that stands in the list twice is asked for its misses the last time it ran: what it
    missed at first may have been made since.

    Args:
        model: The graph after the passes.
        steps: What they did, as `optimize` returns it.

    Returns:
        One row for each kind that occurs, in the order of the head of this file.
    """
    last = {step.name: step for step in steps if step.name.startswith("lift_")}
    lifted = dict.fromkeys(_FORMS, 0)
    for step in steps:
        if step.name.startswith("lift_") and (kind := kind_of(step.name)):
            lifted[kind] += step.hits
    misses = [m for step in last.values() for m in step.misses]
    explained = {kind_of(name) for name, step in last.items() if not _declined(step)}
    fused = tally(model.graph, _kinds)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        kind = _anchor(node)
        if kind is not None and kind not in explained:
            misses.append(Miss(kind, describe(node), _why_not(kind, last)))
        elif kind in _TOLD_BY_ANCHOR and describe(node) not in {m.node for m in misses}:
            misses.append(Miss(kind, describe(node), "in a form that no rule reads"))
    rows = []
    for kind in dict.fromkeys([*_FORMS, *(m.kind for m in misses)]):
        missed = tuple(dict.fromkeys(m for m in misses if m.kind == kind))
        if fused[kind] or missed:
            rows.append(Fusion(kind, fused[kind], lifted.get(kind, 0), missed))
    return rows


def kind_of(pass_name: str) -> str | None:
    """The kind of layer that a pass lifts to, by its name; None for other passes."""
    return next((kind for word, kind in _WORDS.items() if word in pass_name), None)


def _declined(step: Step) -> bool:
    """Whether a pass looked at nothing, and said why: it does not know the opset."""
    return bool(step.notes) and not step.hits and not step.misses


def _why_not(kind: str, last: dict[str, Step]) -> str:
    ran = [step for name, step in last.items() if kind_of(name) == kind]
    if ran:
        return ran[-1].notes[0]
    return f"no pass that lifts to {kind} ran"


def _kinds(node: ir.Node) -> list[str]:
    ours = node.domain in ("", "ai.onnx")
    op = node.op_type if ours else f"{node.domain}::{node.op_type}"
    kinds = [kind for kind, forms in _FORMS.items() if op in forms]
    rotates = node.attributes.get("do_rotary")
    if kinds == ["Attention"] and rotates is not None and rotates.value:
        kinds.append("RotaryEmbedding")  # the kernel turns Q and K itself
    return kinds


def _anchor(node: ir.Node) -> str | None:
    """The kind of layer that a node is a part of, where it can be told without reading it all."""
    if node.domain not in ("", "ai.onnx"):
        return None
    match node.op_type:
        case "Softmax" if _is_read_by_matmul(node.outputs[0]):
            return "Attention"
        case "Erf" | "Tanh" if any(_adds_one(node) for node in readers(node.outputs[0])):
            return "Gelu"
        case "Sqrt" if (mean := _mean(node)) is not None:
            return "LayerNormalization" if _is_centered(mean) else "RMSNormalization"
        case "Concat" if _turns_halves(node):
            return "RotaryEmbedding"
    return None


def _adds_one(node: ir.Node) -> bool:
    return node.op_type == "Add" and any(is_scalar(value, 1.0) for value in node.inputs)


def _is_read_by_matmul(value: ir.Value) -> bool:
    for _ in range(4):  # between the two: Dropout, a guard against rows of NaN, casts
        found = readers(value)
        if any(node.op_type == "MatMul" and node.inputs[0] is value for node in found):
            return True
        passing = [n for n in found if n.op_type in ("Dropout", "Where", "Cast", "Identity")]
        if not passing:
            return False
        value = passing[0].outputs[0]
    return False


def _mean(root: ir.Node) -> ir.Node | None:
    """The ReduceMean of x in Sqrt(ReduceMean(x) + epsilon)."""
    add = producer(root.inputs[0], "Add")
    if add is None or all(scalar(v) is None for v in add.inputs):
        return None
    return producer(add.inputs[0], "ReduceMean") or producer(add.inputs[1], "ReduceMean")


def _is_centered(mean: ir.Node) -> bool:
    """Whether a mean is of the squares of differences to another mean: a variance."""
    square = producer(mean.inputs[0], "Pow", "Mul")
    difference = producer(square.inputs[0], "Sub") if square is not None else None
    return difference is not None and producer(difference.inputs[1], "ReduceMean") is not None


def _turns_halves(concat: ir.Node) -> bool:
    if len(concat.inputs) != 2:
        return False
    negated = producer(concat.inputs[0], "Neg")
    half = producer(negated.inputs[0], "Slice", "Split") if negated is not None else None
    other = producer(concat.inputs[1], "Slice", "Split")
    return half is not None and other is not None and half.inputs[0] is other.inputs[0]
