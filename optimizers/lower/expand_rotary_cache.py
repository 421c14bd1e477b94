"""Give RotaryEmbedding caches with a row for each of the batch: its kernel does not stretch one.

torch.onnx.export at opset 23 fuses the rotation of a Llama and leaves caches [1, seq, d/2], which
ONNX Runtime 1.32 takes at batch 1 only. The kernel's contract, as tried, stands at the top of
lift_rotary_embedding.py.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..lift.rotary_cache import Made, over_batch
from ..outcome import Outcome
from ..read import rank

COS, SIN, POSITIONS = 1, 2, 3  # indices among the inputs of RotaryEmbedding


class ExpandRotaryCache(ir.passes.InPlacePass):
    """Give RotaryEmbedding caches, or positions, with a row for each of the batch.

    ```
    y = RotaryEmbedding(x, cos, sin)                      with cos and sin [1, seq, d/2]
    ->
    to = Concat<axis=0>(Shape<start=0, end=1>(x), [1, 1])      a constant where it is known
    y = RotaryEmbedding(x, Expand(cos, to), Expand(sin, to))   [batch, seq, d/2]

    y = RotaryEmbedding(x, cos, sin, positions)           with positions [1, seq]
    ->
    y = RotaryEmbedding(x, cos, sin, Expand(positions, Concat<axis=0>(Shape<end=1>(x), [1])))
    ```

    One Expand serves all layers whose batch is known to be one size. None is written where the
    batch is known to be 1, or the first size of the cache is not known to be 1.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit RotaryEmbedding nodes in order: the first of several layers carries the Expand."""
        made: Made = {}
        hits = 0
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "RotaryEmbedding" or node.domain != "" or node.inputs[0] is None:
                continue
            by_position = len(node.inputs) > POSITIONS and node.inputs[POSITIONS] is not None
            before = list(node.inputs)
            for i, n in ((POSITIONS, 2),) if by_position else ((COS, 3), (SIN, 3)):
                given = node.inputs[i]
                if given is not None and rank(given) == n:
                    node.replace_input_with(i, over_batch(given, node.inputs[0], node, made))
            hits += any(a is not b for a, b in zip(before, node.inputs, strict=True))
        if hits:
            common.NameFixPass()(model)  # names made from names of others may be taken
        return Outcome(model, bool(hits), hits=hits)
