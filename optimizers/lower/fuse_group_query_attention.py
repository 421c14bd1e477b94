"""A decoder whose cache is one buffer, for targets whose attention appends to it in place.

Contract: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftgroupqueryattention

What the kernels of ONNX Runtime 1.31 and 1.32 do on CPU, tried in float and float16 (the sources of
the CUDA kernels say the same):

    local_window_size=W     each query sees W keys, its own included
    total == sequence       the first prompt: rows begin at 0, padded on the right, any batch
    sequence == 1           one token each, at seqlens_k of its row, any batch
    any other               batch 1, else "batch_size must be 1 when sequence_length > 1 and past
                            context is given"
    head_dim                a multiple of 8, else an error
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit
from ..dims import dim
from ..outcome import SCOPE, Outcome
from ..read import ints, producer, rank, reader
from .decoder_layers import (
    KIND,
    LENGTHS,
    TOTAL,
    Cache,
    Layer,
    asks_batch,
    inputs_of,
    is_past,
    layers_of,
    other_reader,
)
from .decoder_masks import Inputs, heads_of
from .formulas import Unreadable

CAPACITY = "capacity"
HEADS_LAST = [0, 2, 1, 3]  # [batch, heads, rows, size] <-> [batch, rows, heads, size]


class FuseGroupQueryAttention(ir.passes.InPlacePass):
    """Write GroupQueryAttention over a cache that stays where it is.

    ```
    g (input_ids, attention_mask, position_ids, past_k, past_v) => (logits, k, v) {
        k = Concat<axis=2>(past_k, new_k)  v = Concat<axis=2>(past_v, new_v)
        mask = ...                         of attention_mask: causal, padding, perhaps a window
        y = Attention(q, k, v, mask)       q [batch, heads, sequence, head_dim]
    ->
    g (input_ids, position_ids, seqlens_k, total_sequence_length, past_k, past_v)
            => (logits, k, v) {
        q_rows, k_rows, v_rows = ...       [batch, sequence, heads * head_dim]
        y_rows, k, v = com.microsoft::GroupQueryAttention<num_heads, kv_num_heads>(
            q_rows, k_rows, v_rows, past_k, past_v, seqlens_k, total_sequence_length)
    ```

    The signature changes, which is told in `changes_signature`: past and present have one size,
    `capacity`, and may be the same memory; `seqlens_k` int32 [batch] is the number of tokens of a
    row after the run, minus 1; `total_sequence_length` int32 [1] is the largest such number (a CPU
    tensor on any provider). Rows are padded on the right. Inputs that nothing reads any more go.

    All layers or none. What each of them has to be: Attention of ai.onnx over keys and values that
    are the cache, joined with the new ones along the keys by a Concat that is an output (or by
    Attention itself); heads repeated or not, which is tried; a mask that hides what is later, what
    is padding and, where the kernel has a window, what is farther back, which is tried, too (see
    decoder_masks.py). Rotations stay nodes of their own, so positions may be any.

    Declined, with the reason of each layer: biases (ALiBi), masks of another shape, attention that
    was not lifted, a cache of fixed length, head sizes that are no multiple of 8, and graphs in
    which something else depends on the mask or on the length of the cache.
    """

    changes_signature = True  # the pipeline reads it

    def call(self, model: ir.Model) -> Outcome:
        """Look at every layer; rewrite them if all can be."""
        graph = model.graph
        pasts = [v for v in graph.inputs if is_past(v)]
        if not pasts:
            return Outcome(model, False)
        try:
            inputs = inputs_of(graph, pasts)
        except Unreadable as e:
            return Outcome(model, False, notes=(str(e),))
        layers, misses = layers_of(graph, inputs)
        if not misses and (reader_ := other_reader(graph, layers, inputs)) is not None:
            misses.append(reader_)
        if misses:
            return Outcome(model, False, misses=tuple(misses))
        _write(graph, layers, inputs)
        model.opset_imports.setdefault("com.microsoft", 1)
        common.RemoveUnusedNodesPass()(model)
        for value in (inputs.mask, inputs.positions):
            if value is not None and not value.uses() and not value.is_graph_output():
                graph.inputs.remove(value)
        common.NameFixPass()(model)
        return Outcome(model, True, hits=len(layers))


def window_in(model: ir.Model) -> int | None:
    """The widest local window of a graph that was rewritten; None where no layer has one."""
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    sizes = [n.attributes.get_int("local_window_size", -1) for n in nodes if n.op_type == KIND]
    return max((s for s in sizes if s > 0), default=None)


def shared_caches(model: ir.Model) -> tuple[str, ...]:
    """The names of the inputs and outputs that are one buffer; none where nothing was rewritten."""
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    values = [v for n in nodes if n.op_type == KIND for v in (*n.inputs[3:5], *n.outputs[1:3]) if v]
    return tuple(str(v.name) for v in values if v.is_graph_input() or v.is_graph_output())


def _write(graph: ir.Graph, layers: list[Layer], inputs: Inputs) -> None:
    batch = dim(inputs.ids, 0)
    int32 = ir.TensorType(ir.DataType.INT32)
    lengths = ir.Value(name=LENGTHS, type=int32, shape=ir.Shape([batch]))
    total = ir.Value(name=TOTAL, type=int32, shape=ir.Shape([1]))
    for layer in layers:
        _rewrite(graph, layer, lengths, total)
    for past in inputs.caches:
        past.shape = _with_capacity(past)
    if inputs.mask is not None:
        for node, _ in tuple(inputs.mask.uses()):
            if asks_batch(node):
                node.replace_input_with(0, inputs.ids)
    rest = [v for v in graph.inputs if v not in (inputs.ids, inputs.positions)]
    first = [v for v in (inputs.ids, inputs.positions) if v is not None]
    graph.inputs.clear()
    graph.inputs.extend([*first, lengths, total, *rest])


def _with_capacity(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    batch, heads, _, size = value.shape
    return ir.Shape([batch, heads, CAPACITY, size])


def _rewrite(graph: ir.Graph, layer: Layer, lengths: ir.Value, total: ir.Value) -> None:
    node, rows = layer.node, _Rows(graph)
    query = node.inputs[0]
    assert query is not None
    merged = rank(query) == 3
    given = [rows.of(v) for v in (query, layer.key.new, layer.value.new)]
    pasts = [h.past for h in _both(layer)]
    attributes: dict[str, int | float] = {
        "num_heads": layer.heads,
        "kv_num_heads": heads_of(pasts[0])[0],
    }
    for name in ("scale", "softcap"):
        if number := node.attributes.get_float(name, 0.0):
            attributes[name] = number
    if layer.window > 0:
        attributes["local_window_size"] = layer.window
    made = ir.node(
        KIND,
        [*given, *pasts, lengths, total],
        attributes=attributes,
        domain="com.microsoft",
        num_outputs=3,
        name=node.name,
    )
    result, old = made.outputs[0], node.outputs[0]
    result.name, result.type, result.shape = f"{old.name}_rows", query.type, given[0].shape
    nodes = [*rows.nodes, made]
    if merged:
        edit.replace(old, result, nodes)
    else:
        edit.replace(old, _heads_apart(graph, result, old, layer, nodes), nodes)
        _join_views(result)
    for half, present in zip(_both(layer), made.outputs[1:], strict=True):
        present.type, present.shape = half.past.type, _with_capacity(half.past)
        for i, output in enumerate(graph.outputs):
            if output is half.present:
                graph.outputs[i] = present
        present.name, half.present.name = half.present.name, f"{half.present.name}_joined"


def _both(layer: Layer) -> tuple[Cache, Cache]:
    return layer.key, layer.value


class _Rows:
    """[batch, heads, rows, size] as [batch, rows, heads * size], and the nodes that make it so."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []

    def of(self, value: ir.Value) -> ir.Value:
        """`value` with its heads side by side; where it is or was so, that value."""
        if rank(value) == 3:
            return value
        heads, size = dim(value, 1), dim(value, 3)
        rotary = producer(value, "RotaryEmbedding")
        if rotary is not None and reader(value) is not None and isinstance(heads, int):
            x = rotary.inputs[0]
            assert x is not None
            inner = self.of(x)
            made = self._add("RotaryEmbedding", [inner, *rotary.inputs[1:]], value, inner.shape)
            for name, attribute in rotary.attributes.items():
                made.attributes[name] = attribute
            made.attributes["num_heads"] = ir.AttrInt64("num_heads", heads)
            return made.outputs[0]
        turned = producer(value, "Transpose")
        apart = turned.inputs[0] if turned is not None else None
        if turned is None or apart is None or ints(turned, "perm", 9) != HEADS_LAST:
            apart = self._add("Transpose", [value], value, _turned(value)).outputs[0]
            apart.producer().attributes["perm"] = ir.AttrInt64s("perm", HEADS_LAST)  # type: ignore[union-attr]
        split = producer(apart, "Reshape")
        if split is not None and split.inputs[0] is not None and _splits(split, heads, size):
            return split.inputs[0]
        hidden = heads * size if isinstance(heads, int) and isinstance(size, int) else -1
        target = edit.constant(self.graph, "merged_heads", np.array([0, 0, hidden], np.int64))
        shape = ir.Shape([dim(value, 0), dim(value, 2), hidden if hidden > 0 else None])
        return self._add("Reshape", [apart, target], value, shape).outputs[0]

    def _add(
        self, op: str, inputs: list[ir.Value | None], like: ir.Value, shape: ir.Shape | None
    ) -> ir.Node:
        node = ir.node(op, inputs)
        made = node.outputs[0]
        made.name, made.type, made.shape = f"{like.name}_{op.lower()}", like.type, shape
        scope = like.producer()
        if scope is not None and (where := scope.metadata_props.get(SCOPE)):
            node.metadata_props[SCOPE] = where
        self.nodes.append(node)
        return node


def _turned(value: ir.Value) -> ir.Shape | None:
    return None if value.shape is None else ir.Shape([value.shape[i] for i in HEADS_LAST])


def _splits(reshape: ir.Node, heads: object, size: object) -> bool:
    """Whether a Reshape only takes the last axis of [batch, rows, heads * size] apart."""
    x, y = reshape.inputs[0], reshape.outputs[0]
    if rank(x) != 3 or rank(y) != 4 or not isinstance(heads, int) or not isinstance(size, int):
        return False
    target = ints(reshape, "shape", 1)
    keeps = target is not None and target[:2] == [0, 0]
    return keeps and dim(x, 2) == heads * size and [dim(y, 2), dim(y, 3)] == [heads, size]


def _heads_apart(
    graph: ir.Graph, rows: ir.Value, old: ir.Value, layer: Layer, nodes: list[ir.Node]
) -> ir.Value:
    _, size = heads_of(layer.key.past)
    target = edit.constant(graph, "heads_apart", np.array([0, 0, layer.heads, size], np.int64))
    split = ir.node("Reshape", [rows, target])
    turn = ir.node("Transpose", [split.outputs[0]], attributes={"perm": HEADS_LAST})
    split.outputs[0].name, turn.outputs[0].name = f"{old.name}_apart", f"{old.name}_turned"
    for value in (split.outputs[0], turn.outputs[0]):
        value.type = old.type
    split.outputs[0].shape = _turned(old)
    nodes += [split, turn]
    return turn.outputs[0]


def _join_views(rows: ir.Value) -> None:
    """Let who merges the heads again read the rows; what is between goes with the dead code."""
    split = reader(rows, "Reshape")
    turn = split and reader(split.outputs[0], "Transpose")
    back = turn and reader(turn.outputs[0], "Transpose")
    merge = back and reader(back.outputs[0], "Reshape")
    if merge is None or back is None or ints(back, "perm", 9) != HEADS_LAST:
        return
    target, shape = ints(merge, "shape", 1), merge.outputs[0].shape
    hidden = dim(rows, 2)
    keeps = target is not None and target[:2] == [0, 0] and len(target) == 3
    if (
        keeps
        and shape is not None
        and shape[2] == hidden
        and not merge.outputs[0].is_graph_output()
    ):
        merge.outputs[0].replace_all_uses_with(rows)
