"""Read a mask as it is, where an exporter gathers it element by element."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import dim, same_dim, same_shape
from ..edit import constant as new_constant
from ..edit import replace
from ..outcome import Outcome, too_old
from ..read import ints, producer, rank
from .iota import Iota, length_of, read_iota, size_of


@dataclass(frozen=True)
class _Found:
    data: ir.Value
    iotas: list[Iota]  # one for each dimension of data
    rank: int  # of the result


class SimplifyMaskIndexing(ir.passes.InPlacePass):
    """Turn a gather of every element, each at its own place, into Unsqueeze.

    ```
    rows = Range(0, batch, 1)   r = Unsqueeze(rows, [1, 2, 3])     transformers builds masks of
    keys = Range(0, length, 1)  k = Unsqueeze(keys, [0, 1, 2])     functions of indices, mapped
    e = Expand(r, s)  f = Expand(k, s)                             over all of them
    g = Unsqueeze(e, [-1])  h = Unsqueeze(f, [-1])
    i = Concat<axis=-1>(g, h)
    y = GatherND(mask, i)                                          [batch, 1, 1, length]
    ->
    y = Unsqueeze(mask, [1, 2])
    ```

    TorchScript writes the same as one index into the flat mask, Gather(Flatten(mask), k + r * n).
    Where a dimension of the mask is not known to be as long as the indices, a Slice cuts it to
    them first; where it is shorter, the gather fails.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit GatherND, and every Reshape that may end the flat form."""
        if (old := too_old(model, 15, "masks are read")) is not None:
            return old
        hits = 0
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type not in ("GatherND", "Reshape") or node.domain != "":
                continue
            found = _read_nd(node) if node.op_type == "GatherND" else _read_flat(node)
            if found is not None and _in_order(found) and _is_whole(found, node.outputs[0]):
                _write(node, found)
                hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits)


def _read_nd(node: ir.Node) -> _Found | None:
    data, indices = node.inputs
    concat, n = producer(indices, "Concat"), rank(data)
    if concat is None or data is None or n is None or len(concat.inputs) != n:
        return None
    total = rank(indices)
    axis = concat.attributes.get_int("axis")
    batched = node.attributes.get_int("batch_dims", 0) != 0
    if batched or total is None or axis not in (-1, total - 1):
        return None
    iotas = []
    for value in concat.inputs:
        unsqueeze = producer(value, "Unsqueeze")
        if unsqueeze is None or ints(unsqueeze, "axes", 1) not in ([-1], [total - 1]):
            return None
        iotas.append(read_iota(unsqueeze.inputs[0]))
    return _Found(data, [i for i in iotas if i], total - 1) if all(iotas) else None


def _read_flat(node: ir.Node) -> _Found | None:
    """Reshape(Gather(Flatten(data), keys + rows * n), shape of the index)."""
    gather = _through_reshapes(node.inputs[0])
    if gather is None or len(gather.inputs) != 2 or gather.attributes.get_int("axis", 0) != 0:
        return None
    flat, index = producer(gather.inputs[0], "Flatten", "Reshape"), gather.inputs[1]
    add, n = producer(index, "Add"), rank(index)
    data = None if flat is None else flat.inputs[0]
    if data is None or add is None or n is None or rank(data) != 2:
        return None
    if index is None or not _shaped_like(node, index):
        return None
    # Flat is a column, so that the gathered elements have the order of the index, and its number.
    if rank(gather.inputs[0]) != 1 and dim(gather.inputs[0], 1) != 1:
        return None
    for keys, product in (add.inputs, reversed(add.inputs)):
        mul, last = producer(product, "Mul"), read_iota(keys)
        if mul is None or last is None:
            continue
        for rows, size in (mul.inputs, reversed(mul.inputs)):
            first = read_iota(rows)
            # Indices beyond a row would run into the next one, where a Slice would cut them.
            inside = same_dim(size_of(size), dim(data, 1)) and last.fills(dim(data, 1))
            if first is not None and inside:
                return _Found(data, [first, last], n)
    return None


def _through_reshapes(value: ir.Value | None) -> ir.Node | None:
    node = producer(value, "Reshape", "Gather")
    while node is not None and node.op_type == "Reshape":
        node = producer(node.inputs[0], "Reshape", "Gather")
    return node


def _shaped_like(reshape: ir.Node, index: ir.Value) -> bool:
    """Whether `reshape` gives back the shape of `index`."""
    shape = producer(reshape.inputs[1], "Shape")
    if shape is not None and shape.inputs[0] is index:
        return shape.attributes.get_int("start", 0) == 0 and "end" not in shape.attributes
    return same_shape(reshape.outputs[0], index)


def _in_order(found: _Found) -> bool:
    """Whether each dimension of the data has an axis of its own, in the order of the data."""
    axes = [i.axis for i in found.iotas]
    return axes == sorted(set(axes)) and len(axes) == rank(found.data)


def _is_whole(found: _Found, result: ir.Value) -> bool:
    """Whether the result has the sizes of the indices, and repeats nothing along other axes."""
    axes = {i.axis + found.rank: i for i in found.iotas}
    return rank(result) == found.rank and all(
        axes[a].fills(dim(result, a)) if a in axes else dim(result, a) == 1
        for a in range(found.rank)
    )


def _write(node: ir.Node, found: _Found) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    data, nodes = found.data, list[ir.Node]()
    for axis, iota in enumerate(found.iotas):
        if iota.fills(dim(found.data, axis)):
            continue
        end = length_of(iota, graph, nodes)
        start = new_constant(graph, "start", np.array([0], np.int64))
        along = new_constant(graph, "axis", np.array([axis], np.int64))
        nodes.append(ir.node("Slice", [data, start, end, along]))
        data = nodes[-1].outputs[0]
        data.name = f"{found.data.name}_cut"
    kept = {i.axis + found.rank for i in found.iotas}
    rest = np.array([a for a in range(found.rank) if a not in kept], np.int64)
    nodes.append(ir.node("Unsqueeze", [data, new_constant(graph, "axes", rest)]))
    result = nodes[-1].outputs[0]
    result.name = f"{found.data.name}_mask"
    replace(node.outputs[0], result, nodes)
