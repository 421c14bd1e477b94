"""Let groups of queries share one head of keys and values, as the operator does."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import dim, same_dim
from ..outcome import Outcome, describe
from ..read import ints, producer, rank


class ShareKeyHeads(ir.passes.InPlacePass):
    """Take back the repetition of key and value heads before an Attention (GQA, MQA).

    ```
    k5 = Unsqueeze(k, [2])                                     k: [batch, 3, keys, size]
    kr = Expand(k5, [batch, 3, 3, keys, size])
    kk = Reshape(kr, [batch, 9, keys, size])                   v alike
    y = Attention(q, kk, vv, mask)
    ->
    y = Attention(q, k, v, mask)
    ```

    The operator gives query head h the key head h // (heads / key heads): what repeating each head
    in place does. Repeating the whole block of heads (tile) is another order, and is left alone.
    Keys and values go together, by the same number, or not at all.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every Attention of rank 4."""
        hits, notes = 0, []
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type != "Attention" or node.domain != "" or rank(node.inputs[0]) != 4:
                continue
            if any(v is not None for v in node.inputs[4:]) or len(node.outputs) > 1:
                continue
            k, v = (_unrepeated(value) for value in node.inputs[1:3])
            if k is None and v is None:
                continue
            if k is None or v is None or dim(k, 1) != dim(v, 1):
                heads = [None if x is None else dim(x, 1) for x in (k, v)]
                notes.append(f"{describe(node)}: heads of K and V repeat differently, from {heads}")
                continue
            node.replace_input_with(1, k)
            node.replace_input_with(2, v)
            hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _unrepeated(value: ir.Value | None) -> ir.Value | None:
    """The heads that `value` repeats, each in its place."""
    reshape = producer(value, "Reshape")
    expand = producer(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = producer(expand.inputs[0], "Unsqueeze") if expand is not None else None
    if value is None or expand is None or unsqueeze is None or ints(unsqueeze, "axes", 1) != [2]:
        return None
    x, repeated = unsqueeze.inputs[0], expand.outputs[0]
    heads, times, total = dim(x, 1), dim(repeated, 2), dim(value, 1)
    if x is None or not isinstance(heads, int) or not isinstance(times, int):
        return None
    if rank(repeated) != 5 or total != heads * times or dim(repeated, 1) != heads:
        return None
    # With heads and size known, and one of batch and length kept, counting proves the other.
    same = same_dim(dim(x, 3), dim(value, 3)) and same_dim(dim(x, 3), dim(repeated, 4))
    same &= same_dim(dim(x, 2), dim(repeated, 3)) and same_dim(dim(x, 0), dim(repeated, 0))
    same &= same_dim(dim(x, 2), dim(value, 2)) or same_dim(dim(x, 0), dim(value, 0))
    return x if same else None
