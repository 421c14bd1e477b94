"""Multiply integers and scale the sum in one node, where the input is quantized at run time.

Contract: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulintegertofloat
Inputs: A, B, a_scale, b_scale, a_zero_point, b_zero_point, bias. DynamicQuantizeMatMul, which also
quantizes, is not used: Q, K and V share one DynamicQuantizeLinear, and would do its work thrice.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..clean.weight_views import is_weight
from ..dims import dim
from ..edit import replace
from ..outcome import Outcome, describe
from ..read import constant, other, producer, rank, reader


@dataclass(frozen=True)
class _Found:
    product: ir.Node
    scale: ir.Value  # of the activation, one number
    scales: ir.Value  # of the weight, one a column or one
    end: ir.Value  # what the node will make
    bias: ir.Value | None


class FuseDynamicMatmul(ir.passes.InPlacePass):
    """Write MatMulIntegerToFloat.

    ```
    q, s, z = DynamicQuantizeLinear(x)
    y = Mul(Cast<float>(MatMulInteger(q, W, z)), Mul(s, scales))  [o = Add(y, bias)]
    ->
    q, s, z = DynamicQuantizeLinear(x)
    o = com.microsoft.MatMulIntegerToFloat(q, W, s, scales, z, , bias)
    ```

    W is an initializer of int8 or uint8 [K, N], with scales [N] or one, and without a zero point
    or with one of zeros. The bias is taken along where the Add is the only reader and it is [N].
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every MatMulInteger."""
        hits, notes = 0, []
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "MatMulInteger" or node.domain != "":
                continue
            found = _read(node)
            if isinstance(found, str):
                notes.append(f"{describe(node)}: {found}")
            else:
                _write(found)
                hits += 1
        if hits:
            model.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _read(node: ir.Node) -> _Found | str:
    """What is there to write, or the first condition that does not hold."""
    q, weight, zero_point, weight_zero = (*node.inputs, None, None)[:4]
    quantize = producer(q, "DynamicQuantizeLinear")
    if quantize is None or q is not quantize.outputs[0] or zero_point is not quantize.outputs[2]:
        return "its input and zero point do not come from one DynamicQuantizeLinear"
    if not is_weight(weight) or rank(weight) != 2:
        return "its weight is not an initializer of rank 2"
    if (rank(quantize.inputs[0]) or 0) < 2:
        return f"the rank of its input is {rank(quantize.inputs[0])}"
    if weight_zero is not None and ((zeros := constant(weight_zero)) is None or zeros.any()):
        return f"its weight has a zero point, {weight_zero.name!r}"
    cast = reader(node.outputs[0], "Cast")
    if cast is None or cast.attributes.get_int("to", 0) != ir.DataType.FLOAT:
        return "its sums are not read by a Cast to float, and by nothing else"
    scale = reader(cast.outputs[0], "Mul")
    if scale is None:
        return "its sums are not read by a Mul, and by nothing else"
    factors = producer(other(scale, cast.outputs[0]), "Mul")
    if factors is None or quantize.outputs[1] not in factors.inputs:
        return "its sums are not scaled by what DynamicQuantizeLinear says"
    scales = other(factors, quantize.outputs[1])
    if scales is None or scales.dtype != ir.DataType.FLOAT:
        return "the scales of its weight are not float"
    columns = dim(weight, 1)
    if rank(scales) != 0 and (rank(scales) != 1 or dim(scales, 0) not in (1, columns)):
        return f"its weight has {columns} columns, and scales of shape {scales.shape}"
    end, bias = scale.outputs[0], None
    if (add := reader(end, "Add")) is not None:
        term = other(add, end)
        fits = rank(term) == 1 and dim(term, 0) == columns and is_weight(term)
        if fits and term is not None and term.dtype == ir.DataType.FLOAT:
            end, bias = add.outputs[0], term
    return _Found(node, quantize.outputs[1], scales, end, bias)


def _write(found: _Found) -> None:
    q, weight, zero_point = found.product.inputs[:3]
    inputs = [q, weight, found.scale, found.scales, zero_point]
    if found.bias is not None:
        inputs += [None, found.bias]
    made = ir.node("MatMulIntegerToFloat", inputs, domain="com.microsoft")
    replace(found.end, made.outputs[0], [made])
