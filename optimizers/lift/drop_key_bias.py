"""Drop the bias of keys: softmax does not see it."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import dim
from ..outcome import Outcome
from ..read import constant, producer, rank


class DropKeyBias(ir.passes.InPlacePass):
    """Drop the constant that is added to all keys of an Attention.

    ```
    m = MatMul(x, w)  k = Add(m, b)              b a constant of the last dimension
    y = Attention<q_num_heads=12, ...>(q, k, v, mask)
    ->
    m = MatMul(x, w)
    y = Attention<q_num_heads=12, ...>(q, m, v, mask)
    ```

    q @ (k + b)^T = q @ k^T + q @ b, which is one number for all keys of a query, and softmax is
    the same for scores that are shifted by one number. BEiT and Whisper leave the bias out from
    the start. It must reach the scores as it is: not with a rotary embedding, a norm or a cache
    between (a cache may hold keys of others), not with softcap, nor where scores are an output.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every Attention."""
        hits = 0
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type != "Attention" or node.domain != "":
                continue
            if node.attributes.get_float("softcap", 0.0) or len(node.outputs) > 1:
                continue  # softcap bends the scores; a second output shows them, or the keys
            if any(v is not None for v in node.inputs[4:]):
                continue
            key = node.inputs[1]
            add = producer(key, "Add")
            if add is None or rank(key) != 3:
                continue
            for x, bias in (add.inputs, reversed(add.inputs)):
                array = constant(bias)
                if x is None or array is None or rank(x) != 3 or dim(x, 2) != dim(key, 2):
                    continue
                if array.size in (array.shape[-1:] or (1,)):  # one row, for all keys alike
                    node.replace_input_with(1, x)
                    hits += 1
                    break
        if hits:
            common.RemoveUnusedNodesPass()(model)
        return Outcome(model, bool(hits), hits=hits)
