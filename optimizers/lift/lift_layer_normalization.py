"""Raise a layer norm that an exporter spelled out to ai.onnx's LayerNormalization."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from ..outcome import Outcome
from ..read import alike, ints, other, reader, readers
from .lift_rms_normalization import (
    Norm,
    Product,
    Root,
    bad_axes,
    centered,
    extend,
    product_of,
    read_norm,
    squared,
    write_norm,
)
from .walk import lift


class LiftLayerNormalization(ir.passes.InPlacePass):
    """Raise a layer norm that an exporter spelled out to ai.onnx's LayerNormalization (opset 17).

    ```
    a = ReduceMean<keepdims=1>(x, [-1])  b = Sub(x, a)  c = Pow(b, 2)
    d = ReduceMean<keepdims=1>(c, [-1])  e = Add(d, 1e-5)  f = Sqrt(e)  g = Div(b, f)
    h = Mul(g, w)  y = Add(h, bias)
    ->
    y = LayerNormalization<axis=-1, epsilon=1e-5>(x, w, bias)
    ```

    It is the walk of LiftRmsNormalization from the mean of the squares of x - mean(x), followed
    by a bias; and the form of TensorFlow, which multiplies out:

    ```
    g = Mul(rsqrt, w)  y = Add(Mul(x, g), Sub(bias, Mul(mean, g)))
    ```

    Ba, Kiros and Hinton, arXiv:1607.06450. Declined: the unbiased variance (over n - 1), epsilon
    added to the root, means over other than the last axes (the norms of channels).
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit the means in graph order."""
        kind = "LayerNormalization"
        return lift(model, kind, since=17, anchors=("ReduceMean",), read=_read, write=_write)


def _read(mean: ir.Node) -> Norm | str | None:
    difference = squared(mean)
    found = None if difference is None else centered(difference)
    if difference is None or found is None:
        return None
    x, first = found

    def multiplied_out(root: Root, _: ir.Value) -> Product | None:
        return _multiplied_out(root, x, first.outputs[0])

    norm = read_norm(mean, difference, (product_of, multiplied_out))
    if norm is None or isinstance(norm, str):
        return norm
    if (reason := bad_axes(first, x)) is not None:
        return reason
    axes, others = ints(mean, "axes", 1), ints(first, "axes", 1)
    if len(others or ()) != norm.axes:
        return f"the mean is over axes {others}, the variance over {axes}"
    return extend(replace(norm, x=x), biased=True)


def _multiplied_out(root: Root, x: ir.Value, mean: ir.Value) -> Product | None:
    """x * g - mean * g, or x * g + (bias - mean * g), with g = the inverse root [* weight]."""
    g, weight = root.value, None
    if root.power not in (0.5, -0.5):
        return None
    times = reader(g, "Mul" if root.power < 0 else "Div")
    if times is not None:
        g, weight = times.outputs[0], other(times, g)
    if root.power > 0 and (times is None or times.inputs[1] is not root.value):
        return None
    parts = readers(g)
    if g.is_graph_output() or len(parts) != 2 or any(n.op_type != "Mul" for n in parts):
        return None
    if alike(other(parts[0], g), mean):
        parts.reverse()
    if not alike(other(parts[0], g), x) or not alike(other(parts[1], g), mean):
        return None
    scaled, shift = parts[0].outputs[0], parts[1].outputs[0]
    end, less = reader(scaled, "Add", "Sub"), reader(shift, "Sub")
    if end is None or less is None or less.inputs[1] is not shift:
        return None
    if end is less:
        return (end.outputs[0], weight, None) if end.inputs[0] is scaled else None
    if end.op_type != "Add" or other(end, scaled) is not less.outputs[0]:
        return None
    if reader(less.outputs[0]) is not end:
        return None
    return end.outputs[0], weight, less.inputs[0]


def _write(mean: ir.Node, found: Norm) -> None:
    write_norm("LayerNormalization", found)
