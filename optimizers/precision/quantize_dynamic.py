"""MatMul(x, W) -> MatMulInteger, with a range for x that is measured at run time."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..edit import constant, replace
from ..outcome import Outcome, too_old
from ..read import rank
from .calibrators import quantize_weight
from .layers import Layer, layers
from .quantized import already_quantized

LONGEST = (2**31 - 1) // (255 * 127)  # products of uint8 and int8 that 32 bits can sum


class QuantizeDynamic(ir.passes.InPlacePass):
    """Multiply in 8 bits without calibration data.

    ```
    y = MatMul(x, W)                                     W float32 [K, N]
    ->
    q, scale, zero_point = DynamicQuantizeLinear(x)      uint8; one for all who read x
    n = MatMulInteger(q, W8, zero_point)                 W8 int8 [K, N]
    s = Mul(scale, W_scales)                             one scale a column of W
    y = Mul(Cast<float>(n), s)
    ```

    The Add of a bias stays as it is. Activations are uint8 and weights int8 without zero point,
    which is what the CPU's fast kernels multiply.

    The range of x is that of the whole tensor, with all texts and all padding of a batch: an
    answer depends, a little, on what else is in its batch. Static quantization has no such tie,
    and saves reading x twice.

    Args:
        skip: Names of layers (`layers.Layer.name`) that stay in float.
    """

    def __init__(self, *, skip: Collection[str] = ()) -> None:
        super().__init__()
        self.skip = frozenset(skip)

    def call(self, model: ir.Model) -> Outcome:
        """Quantize each layer that is not to be skipped."""
        if (outcome := too_old(model, 11, "DynamicQuantizeLinear is there")) is not None:
            return outcome
        if there := already_quantized(model):
            return Outcome(model, False, notes=(f"the model is quantized already: {there}",))
        found, notes = layers(model)
        activations: dict[ir.Value, tuple[ir.Value, ...]] = {}
        weights: dict[ir.Value, tuple[ir.Value, ir.Value] | None] = {}
        hits = 0
        for layer in found:
            if layer.name in self.skip:
                continue
            if why := _refusal(layer):
                notes.append(f"{layer.name} stays in float: {why}")
                continue
            if layer.weight not in weights:
                weights[layer.weight] = _quantized(model.graph, layer.weight)
            weight = weights[layer.weight]
            if weight is None:
                notes.append(f"{layer.name} stays in float: its weight holds NaN or infinity")
                continue
            _write(layer, weight, activations)
            hits += 1
        for value, made in weights.items():
            if made is None:
                continue
            if not value.uses() and not value.is_graph_output():
                del model.graph.initializers[str(value.name)]
            else:
                notes.append(f"{value.name} stays in float too: others read it")
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _refusal(layer: Layer) -> str | None:
    if layer.input.dtype != ir.DataType.FLOAT:
        return f"the type of its input is {layer.input.dtype or 'not known'}, and must be FLOAT"
    length = (layer.weight.shape or (0,))[0]
    if isinstance(length, int) and length > LONGEST:
        return f"sums of {length} products may be too large for 32 bits (at most {LONGEST})"
    if (rank(layer.input) or 0) < 2:
        return (
            f"the rank of its input is {rank(layer.input) or 'not known'}, and must be at least 2"
        )
    return None


def _quantized(graph: ir.Graph, weight: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The integers and scales of a weight, as initializers; None where it is not finite."""
    assert weight.const_value is not None
    try:
        integers, scales = quantize_weight(weight.const_value.numpy(), axis=1)
    except ValueError:
        return None
    name = weight.name
    return constant(graph, f"{name}_int8", integers), constant(graph, f"{name}_scales", scales)


def _write(
    layer: Layer,
    weight: tuple[ir.Value, ir.Value],
    activations: dict[ir.Value, tuple[ir.Value, ...]],
) -> None:
    """Put the integer product in the place of the layer's MatMul."""
    x, out = layer.node.inputs[0], layer.node.outputs[0]  # as it is by now
    assert x is not None
    nodes: list[ir.Node] = []
    if x not in activations:
        quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
        for value, what in zip(quantize.outputs, ("uint8", "scale", "zero_point"), strict=True):
            value.name = f"{x.name}_{what}"
        quantize.outputs[0].dtype, quantize.outputs[0].shape = ir.DataType.UINT8, x.shape
        nodes.append(quantize)
        activations[x] = tuple(quantize.outputs)
    q, scale, zero_point = activations[x]
    integers, scales = weight
    product = ir.node("MatMulInteger", [q, integers, zero_point])
    cast = ir.node("Cast", product.outputs, attributes={"to": int(ir.DataType.FLOAT)})
    factor = ir.node("Mul", [scale, scales])
    product.outputs[0].name, cast.outputs[0].name = f"{out.name}_int32", f"{out.name}_steps"
    factor.outputs[0].name = f"{out.name}_step"
    scaled = ir.node("Mul", [cast.outputs[0], factor.outputs[0]])
    replace(out, scaled.outputs[0], [*nodes, product, cast, factor, scaled])
    assert layer.node.graph is not None
    layer.node.graph.remove(layer.node, safe=True)
