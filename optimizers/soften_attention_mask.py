"""Keep the lowest float out of attention masks: a kernel takes it for minus infinity.

Tried on ONNX Runtime 1.32 CPU, opset 23: a row whose mask is -inf throughout gives zeros, as in
PyTorch. A row whose mask is the lowest float throughout (-3.4028235e38, what transformers and
many others write for a padded key) gives zeros too, but the mean of all values in PyTorch and in
the operator's definition. At -3.3e38 and above the kernel agrees with both.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .expand_attention_mask import MASK
from .outcome import Outcome

LOWEST = float(np.finfo(np.float32).min)
SOFT = -3.3e38  # added to any score it still is the score of a key that nobody attends to

# What lies between a mask's constant and the Attention; their results scale with the constant.
THROUGH = frozenset(
    (
        *("Add", "And", "Cast", "Concat", "Expand", "Identity", "Max", "Min", "Mul", "Reshape"),
        *("Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
    )
)


class SoftenAttentionMask(ir.passes.InPlacePass):
    """Keep the lowest float out of attention masks.

    ```
    mask = Where(valid, 0.0, -3.4028235e38)
    y = Attention(q, k, v, mask)
    ->
    mask = Where(valid, 0.0, -3.3e38)
    y = Attention(q, k, v, mask)
    ```

    Only where the constant is read on its way to a mask; other readers keep the old one. A mask
    that comes in as an input of the graph is the caller's, and is declined with a note.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Walk back from every mask to the constants that it is made of."""
        hits, notes = 0, []
        soft: dict[ir.Value, ir.Value] = {}
        seen: set[ir.Value] = set()
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "Attention" or node.domain != "" or len(node.inputs) <= MASK:
                continue
            mask = node.inputs[MASK]
            if mask is None or mask.dtype == ir.DataType.BOOL:
                continue
            if mask.is_graph_input():
                notes.append(
                    f"Attention {node.name!r}: mask {mask.name!r} is an input; a row of "
                    f"{LOWEST:.8g} throughout would count as -inf"
                )
                continue
            hits += _soften(node, MASK, soft, seen)
        if hits:
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(dict.fromkeys(notes)))


def _soften(node: ir.Node, index: int, soft: dict[ir.Value, ir.Value], seen: set[ir.Value]) -> int:
    """Replace the lowest float in what flows into one input of `node`; how many inputs changed."""
    value = node.inputs[index]
    if value is None:
        return 0
    if value.is_initializer():
        if value not in soft:
            softened = _softened(value)
            if softened is None:
                return 0
            soft[value] = softened
        node.replace_input_with(index, soft[value])
        return 1
    producer = value.producer()
    if producer is None or producer.op_type not in THROUGH or value in seen:
        return 0
    seen.add(value)
    return sum(_soften(producer, i, soft, seen) for i in range(len(producer.inputs)))


def _softened(value: ir.Value) -> ir.Value | None:
    """A constant with the lowest float replaced, or None where it holds none."""
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None
    array = tensor.numpy()
    if not (array == np.float32(LOWEST)).any():
        return None
    name = f"{value.name}_soft"
    new = ir.tensor(np.where(array == np.float32(LOWEST), np.float32(SOFT), array), name=name)
    made = ir.Value(name=name, const_value=new)
    made.shape, made.type = value.shape, value.type
    assert value.graph is not None
    value.graph.register_initializer(made)
    return made
