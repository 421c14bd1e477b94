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

from ..edit import constant
from ..outcome import Outcome
from ..read import factor_of, is_scalar, producer, scalar
from .expand_attention_mask import MASK

LOWEST = float(np.finfo(np.float32).min)
SOFT = -3.3e38  # added to any score it still is the score of a key that nobody attends to


class SoftenAttentionMask(ir.passes.InPlacePass):
    """Keep the lowest float out of attention masks.

    ```
    mask = Where(valid, 0.0, -3.4028235e38)
    y = Attention(q, k, v, mask)
    ->
    mask = Where(valid, 0.0, -3.4028235e38)
    lowest = Equal(mask, -3.4028235e38)              soft = Where(valid, 0.0, -3.3e38) where,
    soft = Where(lowest, -3.3e38, mask)              as here, the mask is a choice of numbers
    y = Attention(q, k, v, soft)
    ```

    The constant itself is left alone, since the mask's own computation may compare with it; and
    minus infinity stays what it is. One pair of nodes serves all layers that share a mask. Only
    float masks in whose making the lowest float can be are touched: a constant that holds it, or
    an input of the graph.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit Attention nodes in order: the first of several layers carries the nodes."""
        soft: dict[tuple[int, ir.Value], ir.Value] = {}
        hits = 0
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "Attention" or node.domain != "" or len(node.inputs) <= MASK:
                continue
            mask = node.inputs[MASK]
            if mask is None or mask.dtype not in (None, ir.DataType.FLOAT):
                continue
            key = id(node.graph), mask  # one branch of an If cannot read what the other one makes
            if key not in soft:
                if _is_soft(mask) or not _may_be_lowest(mask):
                    continue
                soft[key] = _soften(mask, node)
            node.replace_input_with(MASK, soft[key])
            hits += 1
        if hits:
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits)


def _may_be_lowest(mask: ir.Value) -> bool:
    """Whether the lowest float, or a float that we do not know, flows into the mask."""
    todo, seen = [mask], set[ir.Value]()
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        if value.const_value is not None:
            if value.dtype == ir.DataType.FLOAT and _holds_lowest(value.const_value):
                return True
        elif value.producer() is None:
            if value.dtype in (None, ir.DataType.FLOAT):
                return True
        else:
            todo += [v for v in _inputs(value) if v is not None]
    return False


def _inputs(value: ir.Value) -> tuple[ir.Value | None, ...]:
    """What a value is made of; of a shape nothing is, whatever it is the shape of."""
    node = value.producer()
    return () if node is None or node.op_type in ("Shape", "Size") else tuple(node.inputs)


def _holds_lowest(tensor: ir.TensorProtocol) -> bool:
    # A mask's own constants are scalars or squares; large ones are weights, and stay on disk.
    return tensor.size <= 1 << 22 and bool((tensor.numpy() == np.float32(LOWEST)).any())


def _is_soft(mask: ir.Value) -> bool:
    """Whether the mask cannot be the lowest float, as this pass leaves it."""
    node = producer(mask, "Where")
    if node is None:
        return False
    numbers = [scalar(v) for v in node.inputs[1:]]
    if None not in numbers:
        return LOWEST not in numbers
    return producer(node.inputs[0], "Equal") is not None and is_scalar(node.inputs[1], SOFT)


def _soften(mask: ir.Value, node: ir.Node) -> ir.Value:
    """The mask without the lowest float, made before `node`."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    high = constant(graph, f"{mask.name}_soft_value", np.array(SOFT, np.float32))
    choice = producer(mask, "Where")
    numbers: list[float | None] = [None]
    if choice is not None:  # its rank is that of the condition, whatever the rank of the numbers
        numbers = [factor_of(v, choice.inputs[0]) for v in choice.inputs[1:]]
    if choice is not None and None not in numbers:
        pairs = zip(choice.inputs[1:], numbers, strict=True)
        higher = [high if number == LOWEST else value for value, number in pairs]
        where = ir.node("Where", [choice.inputs[0], *higher])
        where.outputs[0].name = f"{mask.name}_soft"
        where.outputs[0].type, where.outputs[0].shape = mask.type, mask.shape
        graph.insert_before(node, [where])
        return where.outputs[0]
    lowest = constant(graph, f"{mask.name}_lowest", np.array(LOWEST, np.float32))
    equal = ir.node("Equal", [mask, lowest])
    where = ir.node("Where", [equal.outputs[0], high, mask])
    equal.outputs[0].name, where.outputs[0].name = f"{mask.name}_is_lowest", f"{mask.name}_soft"
    equal.outputs[0].shape, where.outputs[0].shape = mask.shape, mask.shape
    equal.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
    where.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(node, [equal, where])
    return where.outputs[0]
