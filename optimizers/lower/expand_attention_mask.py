"""Give Attention a mask with a row for each query, where its kernel does not stretch one.

What ONNX Runtime 1.32 does on CPU, tried for opset 23 and 24, Q/K/V of rank 3 and 4, bool and
float masks, all alike (S queries, K keys, 2 in the batch, H heads, S and K above 1):

    mask shape                                      ORT on CPU
    [S,K]  [1,S,K]  [H,S,K]                         right
    [1,1,S,K]  [B,1,S,K]  [1,H,S,K]  [B,H,S,K]      right: it broadcasts over batch and heads
    [1,K]  [1,1,K]  [H,1,K]                         error: mask dimension -2 must be S
    [1,1,1,K]  [B,1,1,K]  [1,H,1,K]  [B,H,1,K]      error: mask dimension -2 must be S
    [K]                                             error: at least two dimensions
    [S,1]  [B,1,S,1]  [B,H,S,1]                     error: mask dimension -1 must be K

It never computed wrong numbers. So only the query dimension has to be written out, and an
Expand over batch or heads that an exporter wrote (nn.MultiheadAttention has one) can go.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import Dim, dim, same_dim
from ..edit import constant
from ..outcome import Outcome

MASK = 3  # index of attn_mask among the inputs of Attention


class ExpandAttentionMask(ir.passes.InPlacePass):
    """Give Attention a mask with a row for each query.

    ```
    y = Attention(q, k, v, mask)                with mask [batch, 1, 1, keys]
    ->
    length = Shape<start=-2, end=-1>(q)         start=1, end=2 where q has rank 3
    rows = Concat<axis=0>(length, [1])          a constant where the length is known
    mask_rows = Expand(mask, rows)              [batch, 1, seq, keys]
    y = Attention(q, k, v, mask_rows)
    ```

    Expand broadcasts both ways, so [length, 1] leaves every other dimension of the mask alone,
    whatever its rank. One Expand serves all layers that share the mask and the length. None is
    written where the mask is known to have its rows, or where there is one query.

    A mask whose *last* dimension is 1 is declined: opset 23 broadcasts it, opset 24 pads it with
    -inf, so the exporter has to say which of the two is meant.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit Attention nodes in order: the first of several layers carries the Expand."""
        rows: dict[tuple[object, ...], ir.Value] = {}
        hits, notes = 0, []
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "Attention" or node.domain != "" or len(node.inputs) <= MASK:
                continue
            given = node.inputs[MASK]
            if given is None:
                continue
            mask = _without_expand(given)
            if dim(mask, -1) == 1 and dim(node.inputs[1], -2) != 1:
                notes.append(
                    f"Attention {node.name!r}: the last dimension of mask {mask.name!r} is 1, "
                    "and opsets differ on whether that broadcasts or pads"
                )
                continue
            if _needs_rows(mask, node):
                mask = _rows(mask, node, rows)
            if mask is not given:
                node.replace_input_with(MASK, mask)
                hits += 1
        if hits:
            common.NameFixPass()(model)  # names made from names of others may be taken
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _query_axis(node: ir.Node) -> int:
    """Where the queries are counted in Q: [batch, seq, hidden] or [batch, heads, seq, size]."""
    return 1 if "q_num_heads" in node.attributes else 2


def _length(node: ir.Node) -> Dim:
    return dim(node.inputs[0], _query_axis(node))


def _needs_rows(mask: ir.Value, node: ir.Node) -> bool:
    if mask.shape is not None and len(mask.shape) < 2:
        return True  # the kernel wants two dimensions, even for one query
    have, want = dim(mask, -2), _length(node)
    if isinstance(have, int):
        return have == 1 and want != 1
    return not (same_dim(have, want) or want == 1 or _made_here(mask, node))


def _made_here(mask: ir.Value, node: ir.Node) -> bool:
    """Whether the mask comes from an Expand to the length of this very Q (of unknown name)."""
    expand = mask.producer()
    if expand is None or expand.op_type != "Expand" or expand.inputs[1] is None:
        return False
    concat = expand.inputs[1].producer()
    if concat is None or concat.op_type != "Concat" or concat.inputs[0] is None:
        return False
    shape = concat.inputs[0].producer()
    return shape is not None and shape.op_type == "Shape" and shape.inputs[0] is node.inputs[0]


def _without_expand(mask: ir.Value) -> ir.Value:
    """The mask before an Expand over batch or heads; the kernel broadcasts those itself."""
    expand = mask.producer()
    if expand is None or expand.op_type != "Expand" or expand.domain != "":
        return mask
    source = expand.inputs[0]
    if source is None or source.shape is None:
        return mask
    kept = all(same_dim(dim(source, axis), dim(mask, axis)) for axis in (-2, -1))
    return source if kept else mask


def _rows(mask: ir.Value, node: ir.Node, made: dict[tuple[object, ...], ir.Value]) -> ir.Value:
    """The mask with a row for each query, made before `node` unless an earlier layer has it."""
    query, graph, length = node.inputs[0], node.graph, _length(node)
    assert query is not None
    assert isinstance(graph, ir.Graph)
    size = length if isinstance(length, int) else length.value if length is not None else None
    key = (id(graph), mask, size if size is not None else query)
    if key in made:
        return made[key]
    nodes: list[ir.Node] = []
    if isinstance(size, int):
        target = constant(graph, f"{mask.name}_rows_shape", np.array([size, 1], np.int64))
    else:
        axis = _query_axis(node)
        shape = ir.node("Shape", [query], attributes={"start": axis, "end": axis + 1})
        one = constant(graph, f"{mask.name}_rows_one", np.array([1], np.int64))
        concat = ir.node("Concat", [shape.outputs[0], one], attributes={"axis": 0})
        shape.outputs[0].name = f"{mask.name}_rows_length"
        concat.outputs[0].name = f"{mask.name}_rows_shape"
        nodes, target = [shape, concat], concat.outputs[0]
    expand = ir.node("Expand", [mask, target])
    result = expand.outputs[0]
    result.name, result.type = f"{mask.name}_rows", mask.type
    if mask.shape is not None:
        leading = list(mask.shape)[:-2]
        last = mask.shape[-1] if len(mask.shape) else 1
        result.shape = ir.Shape([*leading, length, last])
    graph.insert_before(node, [*nodes, expand])
    made[key] = result
    return result
