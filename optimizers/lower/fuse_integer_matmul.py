"""MatMul(DequantizeLinear(q), DequantizeLinear(W8)) + bias -> MatMulIntegerToFloat."""

from __future__ import annotations

import onnx_ir as ir

from ..edit import replace
from ..outcome import Outcome, describe
from ..read import constant, producer, rank, reader


class FuseIntegerMatmul(ir.passes.InPlacePass):
    """A MatMul between dequantized operands, and its bias, as one integer kernel.

    d = DequantizeLinear(q, x_scale, x_zero)                      # q uint8, one scale
    w = DequantizeLinear <axis=1> (W8, w_scale)                   # W8 int8 (K, N), a scale a column
    y = MatMul(d, w);  z = Add(y, bias)
    -> z = com.microsoft.MatMulIntegerToFloat(q, W8, x_scale, w_scale, x_zero, , bias)

    ONNX Runtime fuses pairs by itself too, but never the bias. uint8 times int8 only: on the CPU
    its other kinds are an order of magnitude slower. Contract: docs/ContribOperators.md of
    ONNX Runtime, com.microsoft.MatMulIntegerToFloat (A, B, a_scale, b_scale, a_zero_point,
    b_zero_point, bias); a scale of B is a scalar, or one number a column.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every such MatMul of the graph."""
        hits, notes = 0, []
        for node in list(model.graph):
            if node.op_type != "MatMul" or node.domain:
                continue
            a, b = (producer(v, "DequantizeLinear") for v in node.inputs)
            if a is None or b is None:
                continue
            if why := _refusal(a, b):
                notes.append(f"{describe(node)} stays in float: {why}")
                continue
            _fuse(node, a, b)
            hits += 1
        if hits:
            model.opset_imports["com.microsoft"] = 1
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _refusal(a: ir.Node, b: ir.Node) -> str | None:
    q, w = a.inputs[0], b.inputs[0]
    assert q is not None
    assert w is not None
    if q.dtype != ir.DataType.UINT8:
        return f"its activation is {q.dtype}; the fast kernel takes uint8"
    if w.dtype != ir.DataType.INT8 or rank(w) != 2:
        return f"its weight is {w.dtype} of rank {rank(w)}; the fast kernel takes int8 of rank 2"
    if rank(a.inputs[1]) != 0:
        return "its activation has more than one scale"
    if any(n.attributes.get_int("block_size", 0) for n in (a, b)):
        return "its scales are of blocks"
    scales, axis = b.inputs[1], b.attributes.get_int("axis", 1)
    if rank(scales) != 0 and not (rank(scales) == 1 and axis in (1, -1)):
        return f"the scales of its weight lie along axis {axis}"
    if any(v is not None and v.dtype != ir.DataType.FLOAT for v in (a.inputs[1], scales)):
        return "its scales are not float32"
    if len(b.inputs) > 2 and b.inputs[2] is not None:
        zero = constant(b.inputs[2])
        if zero is None or zero.any():
            return "its weight has zero points"
    return None


def _fuse(node: ir.Node, a: ir.Node, b: ir.Node) -> None:
    product = node.outputs[0]
    add = reader(product, "Add")
    bias = _bias(add, product, b) if add is not None else None
    old = add.outputs[0] if add is not None and bias is not None else product
    zero = a.inputs[2] if len(a.inputs) > 2 else None
    inputs = [a.inputs[0], b.inputs[0], a.inputs[1], b.inputs[1], zero, None, bias]
    while inputs[-1] is None:
        inputs.pop()
    new = ir.node("MatMulIntegerToFloat", inputs, domain="com.microsoft", name=node.name)
    replace(old, new.outputs[0], [new])


def _bias(add: ir.Node, product: ir.Value, weight: ir.Node) -> ir.Value | None:
    other = add.inputs[1] if add.inputs[0] is product else add.inputs[0]
    w = weight.inputs[0]
    if other is None or other is product or w is None or w.shape is None:
        return None
    # An initializer is made before anything; other addends might be made after the MatMul.
    if other.const_value is None or other.is_graph_input() or other.dtype != ir.DataType.FLOAT:
        return None
    fits = other.shape is not None and list(other.shape) == [w.shape[1]]
    return other if fits else None
