"""Give Attention its heads as a dimension, where a provider takes no other form."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import dim
from ..edit import replace
from ..outcome import Outcome, describe
from ..read import rank
from .writer import Writer

HEADS = ("q_num_heads", "kv_num_heads", "kv_num_heads")  # of Q, K and V


class SplitAttentionHeads(ir.passes.InPlacePass):
    """Give Attention its heads as a dimension: importers document Q, K and V of rank 4 alone.

    ```
    y = Attention<q_num_heads=h, kv_num_heads=h>(q, k, v, mask)       q, k, v: [batch, seq, h * d]
    ->
    q4 = Transpose<perm=[0,2,1,3]>(Reshape(q, [0, 0, h, d]))          k4 and v4 alike
    y = Reshape(Transpose<perm=[0,2,1,3]>(Attention(q4, k4, v4, mask)), [0, 0, h * d])
    ```

    The contract is that of the importer:
    https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md

    Declined, with a note: sizes that are no numbers, and outputs beside the first.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every Attention of rank 3."""
        hits, notes = 0, []
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if (
                node.op_type != "Attention"
                or node.domain != ""
                or "q_num_heads" not in node.attributes
            ):
                continue
            if (reason := _split(node)) is None:
                hits += 1
            else:
                notes.append(f"{describe(node)}: {reason}")
        if hits:
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _split(node: ir.Node) -> str | None:
    """Rewrite `node`; or say why not."""
    if sum(v.is_graph_output() or bool(v.uses()) for v in node.outputs) > 1:
        return "more than its first output is read"
    heads = [node.attributes.get_int(name, 0) for name in HEADS]
    sizes = [dim(v, 2) for v in node.inputs[:3]]
    wide = [
        n if isinstance(n, int) and h and n % h == 0 else 0
        for n, h in zip(sizes, heads, strict=True)
    ]
    if any(rank(v) != 3 for v in node.inputs[:3]) or not all(wide):
        return f"the sizes of its heads are not known: {sizes} over {heads}"
    writer = Writer(node, node.outputs[0].name or "attention")
    parts = [
        writer.op(
            "Transpose",
            writer.op("Reshape", value, writer.ints(0, 0, h, n // h)),
            perm=(0, 2, 1, 3),
        )
        for value, h, n in zip(node.inputs[:3], heads, wide, strict=True)
    ]
    kept = {k: a for k, a in node.attributes.items() if k not in HEADS}
    made = ir.node("Attention", [*parts, *node.inputs[3:]], attributes=kept)
    made.outputs[0].name, made.outputs[0].type = f"{writer.stem}_heads", node.outputs[0].type
    writer.nodes.append(made)
    rows = writer.op("Transpose", made.outputs[0], perm=(0, 2, 1, 3))
    flat = writer.op("Reshape", rows, writer.ints(0, 0, heads[0] * wide[2] // heads[2]))
    replace(node.outputs[0], flat, writer.nodes)
    return None
