"""Which weights, constants and shapes shrink together when channels of an activation go.

From one activation the same channels are found in all that is computed with them, number by number:
back to the MatMuls whose columns make them, forward to the MatMuls whose rows use them up. Nothing
else may read them. (DepGraph, Fang et al. 2023, arXiv:2301.12900, does this for PyTorch.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..dims import dim
from ..edit import constant as make_constant
from ..outcome import describe
from ..read import constant, producer, rank

Units = npt.NDArray[np.int64]

# fmt: off
ACTIVATIONS = frozenset({
    "Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu",
    "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu",
})
ELEMENTWISE = ACTIVATIONS | {
    "Abs", "Add", "Cast", "Div", "Exp", "Identity", "Max", "Min", "Mul", "Neg", "Pow",
    "Reciprocal", "Sqrt", "Sub", "Where",
}
# fmt: on
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


class Refusal(Exception):
    """Why channels cannot go: the first condition that failed, with the value seen."""


@dataclass(frozen=True)
class Span:
    """An axis of `units` blocks, one after another, of `width` channels each."""

    axis: int
    units: int
    width: int

    @property
    def size(self) -> int:
        """Channels on the axis."""
        return self.units * self.width

    def channels(self, units: Units) -> Units:
        """Indices on the axis of all channels of these units, in order."""
        return (units[:, None] * self.width + np.arange(self.width)).reshape(-1)


@dataclass
class Cut:
    """All that changes when units go.

    Attributes:
        spans: The activations that lose channels.
        columns: The MatMuls that make the channels; (node, 1) is in `slices`.
        rows: The MatMuls that use them up; (node, 1) is in `slices`.
        slices: Inputs of nodes, (node, index), with a number for each channel.
        shapes: Reshapes, and where the channels are in what they give.
        counts: Attributes that count heads.
        inputs: Inputs of nodes that are read from elsewhere once units are gone.
    """

    spans: dict[ir.Value, Span] = field(default_factory=dict)
    columns: list[ir.Node] = field(default_factory=list)
    rows: list[ir.Node] = field(default_factory=list)
    slices: dict[tuple[ir.Node, int], Span] = field(default_factory=dict)
    shapes: dict[ir.Node, Span] = field(default_factory=dict)
    counts: dict[tuple[ir.Node, str], int] = field(default_factory=dict)
    inputs: dict[tuple[ir.Node, int], ir.Value] = field(default_factory=dict)


def trace(starts: Iterable[tuple[ir.Value, Span]], ends: Collection[ir.Node] = ()) -> Cut:
    """Find all that holds the channels of `starts`.

    Args:
        starts: Activations, and where their channels are.
        ends: Nodes that are not followed: what they read or make of the channels is in `starts`.

    Raises:
        Refusal: Something else reads the channels, or it is not proved what happens to them.
    """
    cut, todo = Cut(), list(starts)
    while todo:
        value, span = todo.pop()
        if value in cut.spans:
            if cut.spans[value] != span:
                raise Refusal(f"{value.name!r} is read with heads of two sizes")
            continue
        _check(value, span)
        cut.spans[value] = span
        maker = value.producer()
        if maker is None:
            raise Refusal(f"{value.name!r} is a constant")
        for node in dict.fromkeys((maker, *(use.node for use in value.uses()))):
            if node.graph is not maker.graph:
                raise Refusal(f"{describe(node)} reads {value.name!r} inside a subgraph")
            if node in ends:
                continue
            step = _STEPS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if step is None:
                given = [v.name for v in node.inputs if v is not None and v.is_graph_input()]
                why = f", which joins them with input {given[0]!r} of the graph" if given else ""
                raise Refusal(f"channels cannot be followed through {describe(node)}{why}")
            todo += step(node, value, span, cut)
    return cut


def remove(cut: Cut, kept: Units) -> None:
    """Leave only these units, in ascending order; weights, constants, shapes and counts with them.

    Values whose only reader is the node concerned change in place; of others the node reads a copy.
    """
    for (node, index), span in cut.slices.items():
        _take(node, index, span.axis, span.channels(kept))
    for (node, index), value in cut.inputs.items():
        node.replace_input_with(index, value)
    for node, span in cut.shapes.items():
        target = constant(node.inputs[1])
        assert target is not None
        if target[span.axis] > 0:  # -1 is inferred and 0 is copied
            target = target.copy()
            target[span.axis] = len(kept) * span.width
            put(node, 1, target)
    for (node, name), units in cut.counts.items():
        count = node.attributes[name].as_int() // units * len(kept)
        node.attributes[name] = ir.AttrInt64(name, count)
    for value, span in cut.spans.items():
        assert value.shape is not None
        sizes = list(value.shape)
        sizes[span.axis] = len(kept) * span.width
        value.shape = ir.Shape(sizes)


def weight_of(node: ir.Node) -> ir.Value:
    """The constant weight (K, N) of a MatMul that no one else reads.

    Raises:
        Refusal: It is computed, shared, of another rank or dtype, or an output of the graph.
    """
    weight = node.inputs[1]
    if weight is None or not _is_constant(weight):
        raise Refusal(f"{describe(node)} has no constant weight")
    if rank(weight) != 2 or weight.dtype not in _FLOATS:
        raise Refusal(f"weight {weight.name!r} is {weight.dtype} of rank {rank(weight)}")
    if weight.is_graph_output():
        raise Refusal(f"weight {weight.name!r} is an output of the graph")
    if (count := len(weight.uses())) > 1:
        raise Refusal(f"weight {weight.name!r} is shared, {count} nodes read it")
    return weight


def array_of(value: ir.Value | None) -> npt.NDArray[np.generic]:
    """The array of a constant of any size."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor.numpy()


def put(node: ir.Node, index: int, array: npt.NDArray[np.generic]) -> None:
    """Let `node` read this constant where it reads another: in place if no one else reads that."""
    value = node.inputs[index]
    assert value is not None
    assert isinstance(node.graph, ir.Graph)
    if value.is_initializer() and len(value.uses()) == 1 and not value.is_graph_output():
        value.const_value = ir.tensor(array, name=value.name)
        value.shape = ir.Shape(array.shape)
    else:
        node.replace_input_with(index, make_constant(node.graph, f"{value.name}_kept", array))


def _take(node: ir.Node, index: int, axis: int, channels: Units) -> None:
    value = node.inputs[index]
    assert value is not None
    if _is_constant(value):
        put(node, index, np.take(array_of(value), channels, axis))
        return
    assert isinstance(node.graph, ir.Graph)
    which = make_constant(node.graph, f"{value.name}_which", channels)
    gather = ir.node("Gather", [value, which], attributes={"axis": axis})
    taken = gather.outputs[0]
    taken.name, taken.type = f"{value.name}_kept", value.type
    if value.shape is not None:
        sizes = list(value.shape)
        sizes[axis] = len(channels)
        taken.shape = ir.Shape(sizes)
    node.graph.insert_before(node, [gather])
    node.replace_input_with(index, taken)


def _is_constant(value: ir.Value) -> bool:
    return not value.is_graph_input() and ir.convenience.get_const_tensor(value) is not None


def _check(value: ir.Value, span: Span) -> None:
    if value.is_graph_output() or value.is_graph_input():
        side = "output" if value.is_graph_output() else "input"
        raise Refusal(f"{value.name!r} is an {side} of the graph, and its size would change")
    if (size := dim(value, span.axis)) != span.size:
        raise Refusal(f"axis {span.axis} of {value.name!r} is {size}, not {span.size}")


Found = list[tuple[ir.Value, Span]]


def _elementwise(node: ir.Node, value: ir.Value, span: Span, cut: Cut) -> Found:
    """Operands are aligned from the right; those of one number for all channels stay."""
    back = span.axis - (rank(value) or 0)
    out = node.outputs[0]
    found = [(out, Span((rank(out) or 0) + back, span.units, span.width))]
    return found + _operands(node, range(len(node.inputs)), back, span, cut)


def _operands(node: ir.Node, indices: Iterable[int], back: int, span: Span, cut: Cut) -> Found:
    found: Found = []
    for index in indices:
        operand = node.inputs[index]
        if operand is None:
            continue
        n, size = rank(operand), dim(operand, back)
        if n is None:
            raise Refusal(f"the rank of {operand.name!r} is not known")
        if n < -back or size == 1:
            continue
        there = Span(n + back, span.units, span.width)
        if _is_constant(operand):
            cut.slices[node, index] = there
        else:
            found.append((operand, there))
    return found


def _transpose(node: ir.Node, value: ir.Value, span: Span, cut: Cut) -> Found:
    x, y = _ends(node, value)
    perm = node.attributes.get_ints("perm", None) or range(rank(x) or 0)[::-1]
    if value is x:
        return [(y, Span(list(perm).index(span.axis), span.units, span.width))]
    return [(x, Span(perm[span.axis], span.units, span.width))]


def _reshape(node: ir.Node, value: ir.Value, span: Span, cut: Cut) -> Found:
    x, y = _ends(node, value)
    there = _regroup(value, span, y if value is x else x)
    before, after = (span, there) if value is x else (there, span)
    target = constant(node.inputs[1])
    if target is None:
        raise Refusal(f"the target of {describe(node)} is computed")
    zeros = {axis for axis, size in enumerate(target) if size == 0}
    if node.attributes.get_int("allowzero", 0) and zeros:
        raise Refusal(f"the target of {describe(node)} has a size of zero")
    if before.axis in zeros and before.axis != after.axis:
        raise Refusal(f"the target of {describe(node)} copies axis {before.axis}, which shrinks")
    cut.shapes[node] = after
    return [(y if value is x else x, there)]


def _regroup(value: ir.Value, span: Span, other: ir.Value) -> Span:
    """Where the units of `value` are in `other`, which holds the same numbers in the same order."""
    behind = [dim(value, axis) for axis in range(span.axis + 1, rank(value) or 0)]
    inner = [d for d in behind if isinstance(d, int)]
    block = span.width * math.prod(inner)  # numbers of one unit, which lie together
    step = 1
    for axis in reversed(range(rank(other) or 0)):
        size = dim(other, axis)
        if not isinstance(size, int) or len(inner) < len(behind) or step > block:
            break
        if size * step == span.units * block and block % step == 0:
            return Span(axis, span.units, block // step)
        step *= size
    raise Refusal(
        f"no axis of {other.name!r}, {other.shape}, has the {span.units} blocks that axis "
        f"{span.axis} of {value.name!r}, {value.shape}, has"
    )


def _rotary(node: ir.Node, value: ir.Value, span: Span, cut: Cut) -> Found:
    x, y = _ends(node, value)
    heads = node.attributes.get_int("num_heads", 0)
    flat = rank(x) == 3
    if span.axis != (2 if flat else 1) or rank(x) not in (3, 4):
        raise Refusal(f"axis {span.axis} is not the heads of {describe(node)}, rank {rank(x)}")
    if flat and (heads == 0 or heads % span.units or span.size % heads):
        raise Refusal(f"{describe(node)} has num_heads {heads}, and there are {span.units}")
    if heads:
        cut.counts[node, "num_heads"] = span.units
    return [(y if value is x else x, span)]


def _normalization(node: ir.Node, value: ir.Value, span: Span, cut: Cut) -> Found:
    x, y = _ends(node, value)
    n = rank(x) or 0
    if span.axis >= node.attributes.get_int("axis", -1) % max(n, 1):
        raise Refusal(f"{describe(node)} is over the channels themselves")
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Refusal(f"{describe(node)} gives out its mean")
    other = (y if value is x else x, span)
    return [other, *_operands(node, range(1, len(node.inputs)), span.axis - n, span, cut)]


def _ends(node: ir.Node, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """First input and first output, one of which `value` is, and only there."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or (value is not x and value is not y) or value in node.inputs[1:]:
        raise Refusal(f"{value.name!r} is no plain input of {describe(node)}")
    return x, y


def _matmul(node: ir.Node, value: ir.Value, span: Span, cut: Cut) -> Found:
    x, _ = _ends(node, value)
    weight, axis = weight_of(node), 0 if value is x else 1
    if span.axis != (rank(value) or 0) - 1 or dim(weight, axis) != span.size:
        raise Refusal(f"the channels of {value.name!r} are not those of weight {weight.name!r}")
    if (node, 1) in cut.slices:
        raise Refusal(f"the same channels enter and leave {describe(node)}")
    cut.slices[node, 1] = Span(axis, span.units, span.width)
    (cut.rows if value is x else cut.columns).append(node)
    return []


def _shape(node: ir.Node, value: ir.Value, span: Span, cut: Cut) -> Found:
    n = rank(value) or 0
    first, last, _ = slice(
        node.attributes.get_int("start", 0), node.attributes.get_int("end", n)
    ).indices(n)
    if first <= span.axis < last:
        raise Refusal(f"{describe(node)} reads how many channels {value.name!r} has")
    return []


_STEPS: dict[str, Callable[[ir.Node, ir.Value, Span, Cut], Found]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "LayerNormalization": _normalization,
    "MatMul": _matmul,
    "RMSNormalization": _normalization,
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary,
    "Shape": _shape,
    "Transpose": _transpose,
}


def is_hidden(value: ir.Value) -> bool:
    """Whether elementwise ops, an activation among them, make this of what a MatMul gives."""
    todo, seen, active, product = [value], {value}, False, False
    while todo:
        node = producer(todo.pop())
        if node is None:
            continue
        if node.op_type in ELEMENTWISE:
            active = active or node.op_type in ACTIVATIONS
            new = [v for v in node.inputs if v is not None and v not in seen]
            seen.update(new)
            todo += new
        elif node.op_type == "MatMul":
            product = product or (node.inputs[1] is not None and _is_constant(node.inputs[1]))
    return active and product
