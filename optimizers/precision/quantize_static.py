"""MatMul(x, W) -> MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(W8))."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..edit import constant
from ..outcome import Outcome, too_old
from .calibrators import quantization_of, quantize_weight
from .layers import Layer, layers
from .quantized import already_quantized

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scheme:
    """How numbers become 8 bits, as kernels of a target want it.

    Attributes:
        activations: "uint8": one scale and zero point a tensor, as the CPU's U8S8 kernels take.
            "int8": one scale a tensor and no zero point, as TensorRT takes.
        clip_weights: Whether the scale of a weight's column may clip its greatest values where
            that makes its mean squared error less.
    """

    activations: Literal["uint8", "int8"] = "uint8"
    clip_weights: bool = False


class QuantizeStatic(ir.passes.InPlacePass):
    """Linear layers in 8 bits, as pairs that every runtime reads: QuantizeLinear, DequantizeLinear.

    y = MatMul(x, W)                                              # W float (K, N)
    -> q = QuantizeLinear(x, scale, zero_point)                   # one for all who read x
       d = DequantizeLinear(q, scale, zero_point)
       w = DequantizeLinear <axis=1> (W8, scales)                 # W8 int8, one scale a column
       y = MatMul(d, w)

    Activations have one scale a tensor, weights one a column and no zero point (Jacob et al.
    2018, arXiv:1712.05877; Wu et al. 2020, arXiv:2004.09602). Biases stay in float: the integer
    kernels add them to the float result. The graph must be a base graph, not a lowered one; a
    graph that is quantized already is refused.

    Args:
        ranges: Lowest and highest value of each activation, by name. Layers whose input is not
            in it stay in float, with a note.
        scheme: The kinds of integers.
        keep: Names of layers (`layers.Layer.name`) that stay in float.
        weights: int8 weights (K, N) and scales (N,) by name of the layer, rounded by someone who
            saw more than the weight; a layer that it lacks has its weight rounded to nearest.
            Layers that share a weight share its integers: those of the first of them.
        corrections: What is added to the bias of a layer, (N,), by name: the mean of the error
            that quantization makes (Nagel et al. 2019, arXiv:1906.04721).
    """

    def __init__(
        self,
        ranges: Mapping[str, tuple[float, float]],
        *,
        scheme: Scheme = Scheme(),  # frozen
        keep: Collection[str] = (),
        weights: Mapping[str, tuple[npt.NDArray[np.int8], Array]] | None = None,
        corrections: Mapping[str, Array] | None = None,
    ) -> None:
        super().__init__()
        self.ranges, self.scheme, self.keep = ranges, scheme, frozenset(keep)
        self.weights, self.corrections = weights or {}, corrections or {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantize each layer that has a range."""
        if (outcome := too_old(model, 13, "QuantizeLinear knows axes")) is not None:
            return outcome
        if there := already_quantized(model):
            return Outcome(model, False, notes=(f"the model is quantized already: {there}",))
        found, notes = layers(model)
        activations: dict[ir.Value, ir.Value] = {}
        weights: dict[ir.Value, ir.Value] = {}
        hits = 0
        for layer in found:
            if layer.name in self.keep:
                continue
            x = layer.node.inputs[0]  # not layer.input: a correction may have come in between
            assert x is not None
            if str(x.name) not in self.ranges:
                notes.append(f"{layer.name} stays in float: its input was not calibrated")
                continue
            if layer.weight not in weights:
                try:
                    weights[layer.weight] = self._weight(model.graph, layer)
                except ValueError as e:
                    notes.append(f"{layer.name} stays in float: {e}")
                    continue
            if x not in activations:
                activations[x] = self._activation(model.graph, x)
            layer.node.replace_input_with(0, activations[x])
            layer.node.replace_input_with(1, weights[layer.weight])
            if layer.name in self.corrections:
                correct(model.graph, layer, self.corrections[layer.name])
            hits += 1
        for weight in weights:
            if not drop_unread(model.graph, weight):
                notes.append(f"{weight.name} stays in float too: others read it")
        if hits:
            model.graph.sort()
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))

    def _activation(self, graph: ir.Graph, x: ir.Value) -> ir.Value:
        kind = self.scheme.activations
        scale, zero = quantization_of(
            *self.ranges[str(x.name)], symmetric=kind == "int8", dtype=kind
        )
        s = constant(graph, f"{x.name}_scale", np.asarray(scale, np.float32))
        z = constant(graph, f"{x.name}_zero_point", np.asarray(zero, kind))
        return quantize_dequantize(graph, x, s, z)

    def _weight(self, graph: ir.Graph, layer: Layer) -> ir.Value:
        if layer.name in self.weights:
            q, scales = self.weights[layer.name]
        else:
            q, scales = quantize_weight(
                array_of(layer.weight), axis=1, mse=self.scheme.clip_weights
            )
        name = str(layer.weight.name)
        node = ir.node(
            "DequantizeLinear",
            [constant(graph, f"{name}_int8", q), constant(graph, f"{name}_scales", scales)],
            attributes={"axis": 1},
            name=f"{layer.node.name}_weight",
        )
        node.outputs[0].name = f"{name}_dequantized"
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, layer.weight.shape
        graph.insert_before(layer.node, node)
        return node.outputs[0]


def quantize_dequantize(graph: ir.Graph, x: ir.Value, scale: ir.Value, zero: ir.Value) -> ir.Value:
    """QuantizeLinear and DequantizeLinear right after `x`; what comes out of them."""
    q = ir.node("QuantizeLinear", [x, scale, zero], name=f"{x.name}_quantize")
    d = ir.node("DequantizeLinear", [q.outputs[0], scale, zero], name=f"{x.name}_dequantize")
    q.outputs[0].name, d.outputs[0].name = f"{x.name}_quantized", f"{x.name}_dequantized"
    q.outputs[0].type, q.outputs[0].shape = zero.type, x.shape
    d.outputs[0].type, d.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), x.shape
    at = x.producer()
    if at is None:  # an input of the graph
        graph.insert_before(graph[0], [q, d])
    else:
        graph.insert_after(at, [q, d])
    return d.outputs[0]


def correct(graph: ir.Graph, layer: Layer, correction: Array) -> None:
    """Add `correction`, (N,), to the bias of a layer; one without a bias gets one."""
    name = f"{layer.name}.bias_corrected"
    if layer.add is not None and layer.bias is not None:
        assert layer.bias.const_value is not None
        old = layer.bias.const_value.numpy()
        new = constant(graph, name, (old + correction).astype(np.float32))
        for i, value in enumerate(layer.add.inputs):
            if value is layer.bias:
                layer.add.replace_input_with(i, new)
        drop_unread(graph, layer.bias)
        return
    product = layer.node.outputs[0]
    new = constant(graph, name, correction.astype(np.float32))
    add = ir.node("Add", [product, new], name=f"{layer.node.name}_bias")
    out = add.outputs[0]
    out.type, out.shape = product.type, product.shape
    graph.insert_after(layer.node, add)
    product.replace_all_uses_with(out, replace_graph_outputs=True)
    add.replace_input_with(0, product)
    out.name, product.name = product.name, f"{product.name}_without_bias"


def array_of(value: ir.Value) -> Array:
    """The array of an initializer of float32."""
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy(), np.float32)


def drop_unread(graph: ir.Graph, weight: ir.Value) -> bool:
    """Remove an initializer that no one reads any more; False where someone does."""
    if weight.uses() or weight.is_graph_input() or weight.is_graph_output():
        return False
    del graph.initializers[str(weight.name)]
    return True
