"""Look up, add and normalize embeddings in one node, for targets whose kernel does.

Contract: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftembedlayernormalization
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..clean.iota import size_of
from ..clean.weight_views import is_weight
from ..dims import dim, same_dim, same_shape
from ..edit import replace
from ..outcome import Outcome
from ..read import constant, ints, producer, rank, reader


@dataclass(frozen=True)
class _Found:
    lookups: list[ir.Node]  # Gathers of words and of segments, which the kernel adds alike
    positions: ir.Value  # [1, rows, size]


class FuseEmbedding(ir.passes.InPlacePass):
    """Write EmbedLayerNormalization.

    ```
    w = Gather(words, ids)  t = Gather(types, segments)
    p = Slice(positions, [0], length, [1])               with positions [1, 512, size]
    s = Add(Add(w, t), p)  y = LayerNormalization(s, scale, shift)
    ->
    a = Cast<int32>(ids)  b = Cast<int32>(segments)
    y = com.microsoft.EmbedLayerNormalization(a, b, words, positions, types, scale, shift)
    ```

    The three terms may be added in any order. The kernel counts positions from 0, as the Slice
    does; a length beyond the table is an error with both. It wants the table of positions without
    its first axis, so nothing else may read that table, or the rows that are taken of it. Ids below
    0, which Gather counts from the end, are an error here: no tokenizer gives them.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every LayerNormalization."""
        hits = 0
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "LayerNormalization" or node.domain != "":
                continue
            found = _read(node)
            if found is not None:
                _write(node, found)
                hits += 1
        if hits:
            model.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits)


def _read(norm: ir.Node) -> _Found | None:
    total = norm.inputs[0]
    n = rank(total)
    if n != 3 or norm.attributes.get_int("axis", -1) not in (-1, 2) or len(norm.inputs) < 3:
        return None
    if any(v.uses() or v.is_graph_output() for v in norm.outputs[1:]):
        return None  # the mean and the deviation, which the kernel does not give
    lookups, positions = [], None
    for term in _terms(total):
        gather, cut = producer(term, "Gather"), producer(term, "Slice")
        if gather is not None and _looks_up(gather):
            lookups.append(gather)
        elif cut is not None and positions is None:
            positions = cut
        else:
            return None
    if len(lookups) != 2 or positions is None:
        return None
    ids, segments = (g.inputs[1] for g in lookups)
    if ids is None or segments is None or not same_shape(ids, segments):
        return None
    table = positions.inputs[0]
    first = ints(positions, "starts", 1) == [0] and ints(positions, "axes", 3) == [1]
    plain = len(positions.inputs) < 5 or ints(positions, "steps", 4) == [1]
    counted = same_dim(size_of(positions.inputs[2]), dim(ids, 1))
    if table is None or table.const_value is None or rank(table) != 3 or dim(table, 0) != 1:
        return None
    # The kernel broadcasts nothing: no table, scale or shift of one column, no table of one row.
    size, one_row = dim(table, 2), dim(table, 1) == 1
    wide = [*(g.inputs[0] for g in lookups), *norm.inputs[1:3]]
    if one_row or not isinstance(size, int) or any(dim(v, -1) != size for v in wide):
        return None
    if any(rank(v) != 1 for v in norm.inputs[1:3]):
        return None
    if total is None or total.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return None
    alone = is_weight(table) and reader(table) is positions and reader(positions.outputs[0])
    return _Found(lookups, table) if first and plain and counted and alone else None


def _terms(value: ir.Value | None) -> list[ir.Value | None]:
    """The terms of a sum; a part that something else reads too is a term by itself."""
    add = producer(value, "Add")
    if add is None or value is None or len(value.uses()) > 1 or value.is_graph_output():
        return [value]
    return [term for x in add.inputs for term in _terms(x)]


def _looks_up(gather: ir.Node) -> bool:
    table, ids = gather.inputs
    if gather.attributes.get_int("axis", 0) != 0 or rank(table) != 2 or rank(ids) != 2:
        return False
    known = table is not None and table.const_value is not None and constant(ids) is None
    return known and ids is not None and ids.dtype in (ir.DataType.INT32, ir.DataType.INT64)


def _write(norm: ir.Node, found: _Found) -> None:
    nodes: list[ir.Node] = []
    ids: list[ir.Value | None] = []
    for gather in found.lookups:
        value = gather.inputs[1]
        assert value is not None
        if value.dtype != ir.DataType.INT32:
            nodes.append(ir.node("Cast", [value], attributes={"to": int(ir.DataType.INT32)}))
            nodes[-1].outputs[0].name = f"{value.name}_int32"
            value = nodes[-1].outputs[0]
        ids.append(value)
    words, types = (g.inputs[0] for g in found.lookups)
    _drop_axis(found.positions)
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    made = ir.node(
        "EmbedLayerNormalization",
        [*ids, words, found.positions, types, *norm.inputs[1:3]],
        attributes={"epsilon": epsilon},
        domain="com.microsoft",
        num_outputs=2,
    )
    made.outputs[1].name = f"{norm.outputs[0].name}_unused_mask_index"
    replace(norm.outputs[0], made.outputs[0], [*nodes, made])


def _drop_axis(table: ir.Value) -> None:
    """Make [1, rows, size] into [rows, size], without reading it."""
    tensor = table.const_value
    assert tensor is not None
    shape = ir.Shape(tensor.shape.numpy()[1:])
    table.const_value = ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy()[0]), dtype=tensor.dtype, shape=shape, name=table.name
    )
    table.shape = shape
