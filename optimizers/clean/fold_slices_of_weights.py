"""Compute the slices and other views of weights that a graph takes, as views of the file."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import read
from ..outcome import Outcome, describe
from .weight_views import is_weight, view_of

SPARE = 1024  # bytes that the views of one weight may add: less than a node costs to run

View = Callable[[np.ndarray], np.ndarray]


class FoldSlicesOfWeights(ir.passes.InPlacePass):
    """Compute the slices and other views of weights that a graph takes, as views of the file.

    ```
    q, k, v = Split<axis=0, num_outputs=3>(w)       with w a weight that no other node reads
    ->
    q, k, v                                         three weights of a third each
    ```

    It covers Split, Slice, Gather, Transpose, Squeeze, Unsqueeze, Reshape and Flatten with
    constants beside the weight, and chains of them: nn.MultiheadAttention packs three weights in
    one, and an exported LSTM slices each weight into its gates. Nothing is read until the model
    is saved, and then one view at a time.

    The model must not grow: all views of one weight together may take its bytes and 1 KiB, and
    nothing if another node still reads the whole. So the Transpose of an embedding that is tied
    to the head stays, and is noted. Types of less than a byte are left alone.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit nodes in graph order, so that the view of a view follows the first one."""
        hits, notes = 0, []
        seen: set[ir.Value] = set()
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            weight = _weight(node)
            if weight is None or weight in seen:
                continue
            seen.add(weight)
            found = [(n, views) for n in read.readers(weight) if (views := _views(n, weight))]
            if not found:
                continue
            growth = _growth(weight, [n for n, _ in found])
            if growth > SPARE:
                notes.append(
                    f"{describe(node)}: the views of {weight.name!r} would add {growth:,} bytes"
                )
                continue
            for n, views in found:
                for output, view in zip(n.outputs, views, strict=True):
                    if output.uses() and output.shape is not None:
                        name = f"{weight.name}_{output.name}"
                        new = view_of(weight, view, output.shape.numpy(), name)
                        output.replace_all_uses_with(new)
                hits += 1
                assert n.graph is not None
                n.graph.remove(n, safe=True)
        if hits:
            common.NameFixPass()(model)  # the name of a view may be that of another value
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _weight(node: ir.Node) -> ir.Value | None:
    """The weight that `node` takes a view of, if it is of a type that does."""
    if node.op_type not in VIEWS or node.domain not in ("", "ai.onnx") or not node.inputs:
        return None
    value = node.inputs[0]
    if value is None or value.const_value is None or not is_weight(value):
        return None
    dtype = value.const_value.dtype
    return None if dtype.is_string() or dtype.itemsize < 1 else value


def _growth(weight: ir.Value, nodes: list[ir.Node]) -> int:
    """Bytes that the model has more when these nodes are folded."""
    assert weight.const_value is not None
    after = sum(
        math.prod(output.shape.numpy()) * weight.const_value.dtype.itemsize
        for node in nodes
        for output in node.outputs
        if output.uses() and output.shape is not None
    )
    rest = set(read.readers(weight)) - set(nodes)
    return math.ceil(after) - (0 if rest else weight.const_value.nbytes)


def _views(node: ir.Node, weight: ir.Value) -> list[View] | None:
    """What computes each output of `node`; None where it cannot be folded."""
    if _weight(node) is not weight or any(v is weight for v in node.inputs[1:]):
        return None
    for output in node.outputs:
        if output.is_graph_output() or output.shape is None or not output.shape.is_static():
            return None
    rank = read.rank(weight)
    return None if rank is None else VIEWS[node.op_type](node, rank)


def _slice(node: ir.Node, rank: int) -> list[View] | None:
    starts, ends = read.ints(node, "starts", 1), read.ints(node, "ends", 2)
    if starts is None or ends is None:
        return None
    n = len(starts)
    axes = read.ints(node, "axes", 3) if _given(node, "axes", 3) else list(range(n))
    steps = read.ints(node, "steps", 4) if _given(node, "steps", 4) else [1] * n
    if axes is None or steps is None:
        return None
    at = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        at[axis] = slice(start, end, step)
    return [lambda w: w[tuple(at)]]


def _split(node: ir.Node, rank: int) -> list[View] | None:
    axis = node.attributes.get_int("axis", 0) % rank
    whole = node.inputs[0].shape if node.inputs[0] is not None else None
    views, start = [], 0
    for output in node.outputs:
        size = None if output.shape is None else output.shape[axis]
        if not isinstance(size, int):
            return None
        views.append(_part(axis, start, start + size))
        start += size
    return views if whole is not None and whole[axis] == start else None


def _part(axis: int, start: int, end: int) -> View:
    return lambda w: w[(*[slice(None)] * axis, slice(start, end))]


def _gather(node: ir.Node, rank: int) -> list[View] | None:
    index, axis = read.constant(node.inputs[1]), node.attributes.get_int("axis", 0) % rank
    if index is None:
        return None
    if index.ndim == 0:  # a view, not a copy
        return [lambda w: w[(*[slice(None)] * axis, int(index))]]
    return [lambda w: np.take(w, index, axis=axis)]


def _transpose(node: ir.Node, rank: int) -> list[View]:
    perm = node.attributes.get_ints("perm", None) or tuple(reversed(range(rank)))
    return [lambda w: w.transpose(perm)]


def _shape_only(node: ir.Node, rank: int) -> list[View]:
    assert node.outputs[0].shape is not None
    shape = node.outputs[0].shape.numpy()
    return [lambda w: w.reshape(shape)]


VIEWS: dict[str, Callable[[ir.Node, int], list[View] | None]] = {
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Transpose": _transpose,
    "Squeeze": _shape_only,
    "Unsqueeze": _shape_only,
    "Reshape": _shape_only,
    "Flatten": _shape_only,
}


def _given(node: ir.Node, name: str, index: int) -> bool:
    return name in node.attributes or (len(node.inputs) > index and node.inputs[index] is not None)
