"""Let Attention split and join the heads itself, instead of Reshape and Transpose around it."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as replace_field

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import dim, same_dim
from ..edit import replace
from ..outcome import Outcome, describe
from ..read import producer, rank, reader

_HEADS_FIRST = [0, 2, 1, 3]  # [batch, length, heads, size] <-> [batch, heads, length, size]


class MergeAttentionHeads(ir.passes.InPlacePass):
    """Write Attention in its form of rank 3.

    ```
    q4 = Reshape(q, [0, 0, 12, 64])  qt = Transpose<perm=[0, 2, 1, 3]>(q4)     k, v alike
    y4 = Attention(qt, kt, vt, mask)
    yt = Transpose<perm=[0, 2, 1, 3]>(y4)  y = Reshape(yt, [0, 0, 768])
    ->
    y = Attention<q_num_heads=12, kv_num_heads=12>(q, k, v, mask)
    ```

    A RotaryEmbedding between split and Attention is written in its own form of rank 3, with
    num_heads. All four of Q, K, V and Y, or none: the operator knows no mixed form. Where one is
    no plain split of heads (a norm or a cache in between), the others stay as they are.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every Attention of rank 4 that has no cache."""
        hits, notes = 0, []
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "Attention" or node.domain != "" or rank(node.inputs[0]) != 4:
                continue
            if any(v is not None for v in node.inputs[4:]) or len(node.outputs) > 1:
                continue
            splits = [_split(v) for v in node.inputs[:3]]
            joined = _join(node.outputs[0], splits[0])
            if joined is None or any(s is None for s in splits):
                what = [n for n, s in zip("QKV", splits, strict=True) if s is None]
                if 0 < len(what) < 3 or (not what and joined is None):
                    left = (
                        f"{' and '.join(what)} {'are' if len(what) > 1 else 'is'}"
                        if what
                        else "Y is"
                    )
                    notes.append(f"{describe(node)}: rank 4 stays, {left} no plain split of heads")
                continue
            q, k, v = (s for s in splits if s is not None)
            if k.heads != v.heads or q.heads % k.heads:
                continue
            nodes: list[ir.Node] = []
            merged = ir.node(
                "Attention",
                [*(_merged(s, nodes) for s in (q, k, v)), *node.inputs[3:4]],
                attributes={**node.attributes, "q_num_heads": q.heads, "kv_num_heads": k.heads},
            )
            replace(joined, merged.outputs[0], [*nodes, merged])
            hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


@dataclass(frozen=True)
class _Split:
    source: ir.Value  # [batch, length, heads * size]
    heads: int
    size: int
    rotary: ir.Node | None = None  # applied after the split


def _merged(split: _Split, nodes: list[ir.Node]) -> ir.Value:
    """The value of rank 3 for Attention to split; what makes it is added to `nodes`."""
    rotary = split.rotary
    if rotary is None:
        return split.source
    made = ir.node(
        "RotaryEmbedding",
        [split.source, *rotary.inputs[1:]],
        attributes={**rotary.attributes, "num_heads": split.heads},
    )
    nodes.append(made)
    value, like = made.outputs[0], rotary.outputs[0]
    value.name, value.type, value.shape = f"{like.name}_rows", like.type, split.source.shape
    return value


def _split(value: ir.Value | None) -> _Split | None:
    """[batch, length, heads * size] that Reshape and Transpose turned into `value`."""
    rotary = producer(value, "RotaryEmbedding")
    if rotary is not None and value is not None:
        inner = _split(rotary.inputs[0])
        alone = len(value.uses()) == 1 and not value.is_graph_output()  # else computed twice
        if inner is None or inner.rotary is not None or not alone:
            return None
        return replace_field(inner, rotary=rotary)
    transpose = producer(value, "Transpose")
    if transpose is None or list(transpose.attributes.get_ints("perm", [])) != _HEADS_FIRST:
        return None
    reshape = producer(transpose.inputs[0], "Reshape")
    if reshape is None or rank(reshape.inputs[0]) != 3:
        return None
    source, split = reshape.inputs[0], reshape.outputs[0]
    heads, size = dim(split, 2), dim(split, 3)
    if source is None or not isinstance(heads, int) or not isinstance(size, int):
        return None
    # With the last dimension split in two, the product of the first two is kept: one will do.
    kept = any(same_dim(dim(source, axis), dim(split, axis)) for axis in (0, 1))
    return _Split(source, heads, size) if kept and dim(source, 2) == heads * size else None


def _join(value: ir.Value, q: _Split | None) -> ir.Value | None:
    """[batch, length, heads * size] that Transpose and Reshape make of `value`."""
    transpose = reader(value, "Transpose")
    if transpose is None or q is None:
        return None
    if list(transpose.attributes.get_ints("perm", [])) != _HEADS_FIRST:
        return None
    between = transpose.outputs[0]
    reshape = reader(between, "Reshape")
    if reshape is None or rank(reshape.outputs[0]) != 3:
        return None
    joined = reshape.outputs[0]
    heads, size = dim(between, 2), dim(between, 3)
    if heads != q.heads or not isinstance(size, int):
        return None
    kept = any(same_dim(dim(between, axis), dim(joined, axis)) for axis in (0, 1))
    return joined if kept and dim(joined, 2) == q.heads * size else None
