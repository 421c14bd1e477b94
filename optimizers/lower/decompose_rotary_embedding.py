"""Write RotaryEmbedding as arithmetic, where a provider lacks the operator."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import dim
from ..edit import replace
from ..outcome import Outcome, describe
from ..read import rank
from .writer import Writer

COS, SIN, POSITIONS = 1, 2, 3  # indices among the inputs of RotaryEmbedding


class DecomposeRotaryEmbedding(ir.passes.InPlacePass):
    """Write RotaryEmbedding (opset 23) as a sum of two products.

    ```
    y = RotaryEmbedding(x, cos, sin)   x [batch, heads, seq, d], cos and sin [batch, seq, d/2]
    ->
    c, s = Unsqueeze(Concat<axis=-1>(cos, cos), [1]), Unsqueeze(Concat<axis=-1>(sin, sin), [1])
    a, b = Split<axis=-1, num_outputs=2>(x)
    y = Add(Mul(x, c), Mul(Concat<axis=-1>(Neg(b), a), s))
    ```

    With positions, rows of the caches are gathered first. `interleaved` takes neighbors for a and
    b; columns past `rotary_embedding_dim` stay as they are; of rank 3, x is taken apart by head.

    Declined, with a note: sizes of heads that are not numbers.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit RotaryEmbedding nodes in order."""
        hits, notes = 0, []
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "RotaryEmbedding" or node.domain != "":
                continue
            x, heads = node.inputs[0], node.attributes.get_int("num_heads", 0)
            width = dim(x, -1)
            flat = rank(x) == 3
            if not isinstance(width, int) or x is None or x.dtype is None or (flat and not heads):
                notes.append(f"{describe(node)}: the width is {width}, with {heads} heads")
                continue
            w = Writer(node, str(node.outputs[0].name))
            size = width // heads if flat else width
            inner = w.op("Reshape", x, w.ints(0, 0, heads, size)) if flat else x
            y = _rotated(w, node, inner, size, 2 if flat else 1)
            if flat:
                y = w.op("Reshape", y, w.ints(0, 0, width))
            replace(node.outputs[0], y, w.nodes)
            hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _rotated(w: Writer, node: ir.Node, x: ir.Value, size: int, axis: int) -> ir.Value:
    """x of rank 4, rotated; the caches have no dimension for its heads, which is `axis`."""
    turned = node.attributes.get_int("rotary_embedding_dim", 0) or size
    rest = None
    if turned < size:
        last, inside, end = w.ints(-1), w.ints(turned), w.ints(size)
        x, rest = w.op("Slice", x, w.ints(0), inside, last), w.op("Slice", x, inside, end, last)
    positions = node.inputs[POSITIONS] if len(node.inputs) > POSITIONS else None
    caches = []
    for index in (COS, SIN):
        cache = node.inputs[index]
        assert cache is not None
        if positions is not None:
            cache = w.op("Gather", cache, positions, axis=0)
        caches.append(w.op("Unsqueeze", cache, w.ints(axis)))
    if node.attributes.get_int("interleaved", 0):
        pairs = w.op("Reshape", x, w.ints(0, 0, 0, turned // 2, 2))
        cos, sin = (w.op("Unsqueeze", c, w.ints(-1)) for c in caches)
        a, b = w.halves(pairs)
        swapped = w.op("Concat", w.op("Neg", b), a, axis=-1)
        y = w.op("Add", w.op("Mul", pairs, cos), w.op("Mul", swapped, sin))
        flat = w.op("Reshape", y, w.ints(0, 0, 0, turned))
    else:
        cos, sin = (w.op("Concat", c, c, axis=-1) for c in caches)
        a, b = w.halves(x)
        swapped = w.op("Concat", w.op("Neg", b), a, axis=-1)
        flat = w.op("Add", w.op("Mul", x, cos), w.op("Mul", swapped, sin))
    return flat if rest is None else w.op("Concat", flat, rest, axis=-1)
