"""MatMul(DequantizeLinear(q), DequantizeLinear(W8)) + bias -> MatMulIntegerToFloat."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..clean.weight_views import is_weight
from ..dims import dim
from ..edit import replace
from ..outcome import Outcome, describe
from ..read import constant, other, producer, rank, reader

LONGEST = (2**31 - 1) // (255 * 127)  # products of uint8 and int8 that the 32 bits of a sum hold


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
        """Fuse every such MatMul, those of subgraphs too."""
        hits, notes = 0, []
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
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
            model.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _refusal(a: ir.Node, b: ir.Node) -> str | None:
    q, w = a.inputs[0], b.inputs[0]
    assert q is not None
    assert w is not None
    if q.dtype != ir.DataType.UINT8:
        return f"its activation is {q.dtype}; the fast kernel takes uint8"
    if w.dtype != ir.DataType.INT8 or rank(w) != 2:
        return f"its weight is {w.dtype} of rank {rank(w)}; the fast kernel takes int8 of rank 2"
    if not isinstance(long := dim(w, 0), int) or long > LONGEST:
        return f"sums of {long} products may be too large for 32 bits (at most {LONGEST})"
    scale, scales = a.inputs[1], b.inputs[1]
    if any(n.attributes.get_int("block_size", 0) for n in (a, b)):
        return "its scales are of blocks"
    if rank(scale) != 0 and not (rank(scale) == 1 and dim(scale, 0) == 1):
        return f"the scale of its activation is of shape {scale and scale.shape}, not one number"
    axis = b.attributes.get_int("axis", 1)
    if rank(scales) != 0 and not (rank(scales) == 1 and axis in (1, -1)):
        return f"the scales of its weight are of rank {rank(scales)}, along axis {axis}"
    kinds = {v.dtype for n in (a, b) for v in (n.inputs[1], n.outputs[0]) if v is not None}
    if kinds != {ir.DataType.FLOAT}:
        return f"it multiplies in {', '.join(sorted(map(str, kinds)))}"
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
    """What `add` adds to the product, where it is one number a column."""
    term = other(add, product)
    fits = rank(term) == 1 and dim(term, 0) == dim(weight.inputs[0], 1) and is_weight(term)
    return term if term is not None and fits and term.dtype == ir.DataType.FLOAT else None
