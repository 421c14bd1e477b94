"""Reading index tensors: 0, 1, 2, ... along one axis, as exporters write positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..dims import Dim, dim, same_dim
from ..edit import constant as new_constant
from ..read import constant, ints, is_scalar, producer, rank, scalar


@dataclass(frozen=True)
class Iota:
    """0, 1, ..., length - 1 along `axis` (counted from the last, so below 0), alike elsewhere.

    Attributes:
        axis: Where it counts; every other dimension is 1, or repeats.
        limit: The scalar that Range was given.
        lengths: The same as dimensions: as inferred, and as the one that the limit is taken of.
    """

    axis: int
    limit: ir.Value
    lengths: tuple[Dim, ...]

    def fills(self, size: Dim) -> bool:
        """Whether it counts all of a dimension."""
        return any(same_dim(length, size) for length in self.lengths)


def read_iota(value: ir.Value | None) -> Iota | None:
    """What `value` counts; through Unsqueeze, Expand and Cast between integers."""
    node = producer(value, "Range", "Unsqueeze", "Expand", "Cast")
    if node is None or value is None:
        return None
    if node.op_type == "Range":
        start, limit, step = node.inputs
        if limit is None or not (is_zero(start) and is_scalar(step, 1.0)):
            return None
        if limit.dtype != ir.DataType.INT64:
            return None  # its limit goes into shapes, which are int64
        return Iota(-1, limit, (dim(value, 0), size_of(limit)))
    inner = read_iota(node.inputs[0])
    if inner is None:
        return None
    if node.op_type == "Unsqueeze":
        n, axes = rank(value), ints(node, "axes", 1)
        if n is None or axes is None:
            return None
        kept = [a for a in range(n) if a not in {x % n for x in axes}]
        return Iota(kept[inner.axis] - n, inner.limit, inner.lengths)
    if node.op_type == "Cast" and node.attributes.get_int("to") != ir.DataType.INT64:
        return None  # a narrower integer may overflow
    return inner  # Expand keeps axes counted from the last; whoever asks looks at what repeats


def is_zero(value: ir.Value | None) -> bool:
    """Whether a constant is the number 0."""
    return scalar(value) == 0.0


def length_of(iota: Iota, graph: ir.Graph, nodes: list[ir.Node]) -> ir.Value:
    """The limit as a tensor of one dimension, as shapes want it; new nodes are added to `nodes`."""
    made = producer(iota.limit, "Squeeze", "Reshape", "Gather")
    source = None if made is None else made.inputs[0]
    if made is not None and made.op_type != "Gather" and rank(source) == 1 and dim(source, 0) == 1:
        assert source is not None
        return source
    shape = producer(source, "Shape") if made is not None and made.op_type == "Gather" else None
    index = constant(made.inputs[1]) if made is not None and shape is not None else None
    if shape is not None and index is not None and index.size == 1 and int(index.reshape(())) >= 0:
        axis = shape.attributes.get_int("start", 0) + int(index.reshape(()))
        if axis >= 0 and "end" not in shape.attributes:
            span = {"start": axis, "end": axis + 1}
            nodes.append(ir.node("Shape", [shape.inputs[0]], attributes=span))
            nodes[-1].outputs[0].name = f"{iota.limit.name}_vector"
            return nodes[-1].outputs[0]
    zero = new_constant(graph, "axis", np.array([0], np.int64))
    nodes.append(ir.node("Unsqueeze", [iota.limit, zero]))
    nodes[-1].outputs[0].name = f"{iota.limit.name}_vector"
    return nodes[-1].outputs[0]


def size_of(value: ir.Value | None) -> Dim:
    """The dimension whose size a number is, read off a Shape; None for all other values."""
    node = producer(value, "Squeeze", "Gather", "Shape", "Reshape", "Slice", "Cast")
    if node is None:
        return None
    source = node.inputs[0]
    if node.op_type == "Shape":
        n = rank(source)
        span = None if n is None else range(n)[
            node.attributes.get_int("start", 0) : node.attributes.get_int("end", n)
        ]  # fmt: skip
        return dim(source, span[0]) if span is not None and len(span) == 1 else None
    if node.op_type == "Gather":
        shape, index = producer(source, "Shape"), constant(node.inputs[1])
        n = rank(shape.inputs[0]) if shape is not None else None
        if shape is None or index is None or index.size != 1 or n is None:
            return None
        start, end = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", n)
        span, at = range(n)[start:end], int(index.reshape(()))
        return dim(shape.inputs[0], span[at]) if -len(span) <= at < len(span) else None
    return size_of(source) if node.op_type != "Slice" else None
