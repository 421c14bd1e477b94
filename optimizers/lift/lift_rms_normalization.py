"""Raise an RMS norm that an exporter spelled out to ai.onnx's RMSNormalization.

What is shared with LiftLayerNormalization is here too: a layer norm is an RMS norm of
x - mean(x), with a bias. What ONNX Runtime 1.32 computes on CPU for both ops, tried: float16 and
bfloat16 inputs in float32, scale and bias included, rounded once at the end; double in double.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .. import edit
from ..dims import dim, same_dim
from ..outcome import Outcome, describe
from ..read import alike, constant, factor_of, ints, other, producer, rank, reader, readers
from .walk import lift

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
DTYPES = (ir.DataType.FLOAT, *NARROW)
ONES = "norm_ones"  # the name of a scale of ones


@dataclass(frozen=True)
class Norm:
    """What was found: y = (x or x - mean(x)) / sqrt(mean of its squares + epsilon) * scale + bias.

    Attributes:
        x: What is normalized.
        axes: Over how many of its last axes.
        epsilon: As in the formula.
        y: The value that is the norm; the walk moves it on as it takes in scale and bias.
        scale: Its factor, if any, of the shape of these axes.
        bias: Its summand, likewise.
    """

    x: ir.Value
    axes: int
    epsilon: float
    y: ir.Value
    scale: ir.Value | None = None
    bias: ir.Value | None = None


class LiftRmsNormalization(ir.passes.InPlacePass):
    """Raise an RMS norm that an exporter spelled out to ai.onnx's RMSNormalization (opset 23).

    ```
    a = Pow(x, 2)  b = ReduceMean<keepdims=1>(a, [-1])  c = Add(b, 1e-6)  d = Sqrt(c)
    e = Reciprocal(d)  f = Mul(x, e)  y = Mul(w, f)
    ->
    y = RMSNormalization<axis=-1, epsilon=1e-6>(x, w)
    ```

    The walk begins at the mean of squares and takes in, in any order: the root and its inverse
    (Sqrt, Reciprocal, Div, Pow), the product with x, and one with a weight of the shape of the
    axes, before or after x. Without weight the scale is ones. Of a float16 model that computes
    its norms in float32, the Casts go too where nothing is lost: stash_type=1 is what they say.

    Zhang and Sennrich, arXiv:1910.07467. A norm of x - mean(x) is left to LiftLayerNormalization.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit the means in graph order."""
        kind = "RMSNormalization"
        return lift(model, kind, since=23, anchors=("ReduceMean",), read=_read, write=_write)


def _read(mean: ir.Node) -> Norm | str | None:
    x = squared(mean)
    if x is None or centered(x) is not None:
        return None
    found = read_norm(mean, x, (product_of,))
    return found if found is None or isinstance(found, str) else extend(found, biased=False)


def _write(mean: ir.Node, found: Norm) -> None:
    write_norm("RMSNormalization", found)


def squared(mean: ir.Node) -> ir.Value | None:
    """The value of whose squares a ReduceMean takes the mean; or None."""
    square = producer(mean.inputs[0], "Mul", "Pow")
    if square is None:
        return None
    x, second = square.inputs
    is_square = factor_of(second, x) == 2.0 if square.op_type == "Pow" else alike(x, second)
    return x if is_square else None


def centered(x: ir.Value) -> tuple[ir.Value, ir.Node] | None:
    """(z, its ReduceMean) where x = z - mean(z); or None."""
    sub = producer(x, "Sub")
    mean = None if sub is None else producer(sub.inputs[1], "ReduceMean")
    if sub is None or mean is None or not alike(sub.inputs[0], mean.inputs[0]):
        return None
    return (sub.inputs[0], mean) if sub.inputs[0] is not None else None


Product = tuple[ir.Value, ir.Value | None, ir.Value | None]  # a norm, its weight, its bias


def read_norm(
    mean: ir.Node,
    x: ir.Value,
    products: Sequence[Callable[[Root, ir.Value], Product | None]],
) -> Norm | str | None:
    """x / sqrt(mean(x * x) + epsilon), with the weight if that comes first; `x` is `squared`.

    Each of `products` looks for the one form that it knows; `product_of` is one.
    """
    root = Root(mean)
    found = next(filter(None, (product(root, x) for product in products)), None)
    if found is None:
        return _near(root, x)
    at = found[0].producer()
    if at is None or at.graph is not mean.graph:
        return f"{found[0].name!r} is in another graph than {mean.outputs[0].name!r}"
    y, scale, bias = found
    for reason in (root.reason, bad_axes(mean, x), _bad_type(x)):
        if reason is not None:
            return reason
    axes = len(ints(mean, "axes", 1) or ())
    for value in (scale, bias):
        if value is not None and not fits(value, x, axes):
            return f"the weight {value.name!r} has the shape {value.shape}, and x has {x.shape}"
    return Norm(x, axes, root.epsilon, y, scale, bias)


def bad_axes(mean: ir.Node, x: ir.Value) -> str | None:
    """Why a mean over `x` is not one over its last axes that keeps them; None if it is."""
    axes, n = ints(mean, "axes", 1), rank(x)
    if not axes:
        return f"{describe(mean)} names no axes"
    if mean.attributes.get_int("keepdims", 1) != 1:
        return f"{describe(mean)} does not keep its axes"
    last = sorted(a - n if n is not None and a >= 0 else a for a in axes)
    if last != list(range(-len(axes), 0)):
        return f"{describe(mean)} is over axes {axes} of {x.shape}, not the last ones"
    return None


def _bad_type(x: ir.Value) -> str | None:
    if x.dtype in DTYPES:
        return None
    if x.dtype == ir.DataType.DOUBLE:
        return "the type is DOUBLE, and the op would compute in float32"
    return f"the type is {x.dtype.name if x.dtype else 'unknown'}"


def fits(value: ir.Value, x: ir.Value, axes: int) -> bool:
    """Whether `value` has the sizes of the last `axes` axes of `x`, as a scale or bias has."""
    n, most = rank(value), rank(x)
    if n is None or n < axes:
        return False
    if n > axes and (constant(value) is None or most is None or n > most):
        return False  # [1, 1, size] is reshaped, if it is a constant
    extra = [dim(value, axis) for axis in range(n - axes)]
    sizes = ((dim(value, axis), dim(x, axis)) for axis in range(-axes, 0))
    return all(d == 1 for d in extra) and all(same_dim(a, b) for a, b in sizes)


class Root:
    """The walk from a variance to its root or inverse root: value = (variance + epsilon)**power."""

    def __init__(self, mean: ir.Node) -> None:
        self.value, self.power, self.epsilon = mean.outputs[0], 1.0, 0.0
        self.reason: str | None = None  # why this is no norm, should it look like one
        while (node := reader(self.value)) is not None and self._take(node):
            self.value = node.outputs[0]

    def _take(self, node: ir.Node) -> bool:
        number = factor_of(other(node, self.value), self.value) if len(node.inputs) == 2 else None
        first = node.inputs[0] is self.value
        match node.op_type:
            case "Sqrt":
                self.power /= 2
            case "Reciprocal":
                self.power = -self.power
            case "Pow" if first and number in (0.5, -0.5, -1.0):
                self.power *= number
            case "Div" if not first and number == 1.0:
                self.power = -self.power
            case "Add" if number is not None and self.power == 1.0 and number >= 0:
                self.epsilon += number
            case "Add" if number is not None and self.power == 0.5:
                self.reason = self.reason or f"epsilon {number:.3g} is added to the root"
            case "Mul" | "Div" if self.power == 1.0 and self.epsilon == 0.0:
                self.reason = self.reason or (
                    f"{describe(node)} scales the variance"
                    + (f" by {number:.6g}" if number is not None else "")
                    + ", as the unbiased one is"
                )
            case _:
                return False
        return True


def product_of(root: Root, x: ir.Value) -> Product | None:
    """The product of x and the inverse root, and of a weight that comes before it; or None."""
    weight: ir.Value | None = None
    v, power = root.value, root.power
    while abs(power) == 0.5 and (node := reader(v, "Mul", "Div")) is not None:
        factor = other(node, v)
        divides = node.op_type == "Div" and node.inputs[1] is v
        # A root divides, once; its inverse multiplies.
        if factor is v or not (divides if power > 0 else node.op_type == "Mul"):
            return None
        v, power = node.outputs[0], -0.5
        if alike(factor, x):
            return v, weight, None
        if weight is not None:
            return None
        times = producer(factor, "Mul")
        if times is not None and any(alike(value, x) for value in times.inputs):
            first = alike(times.inputs[0], x)
            return v, times.inputs[1 if first else 0], None
        weight = factor
    return None


def _near(root: Root, x: ir.Value) -> str | None:
    """Why the walk from the variance did not arrive, if another way leads on to x."""
    if not _arrives(root.value, x, 5, rooted=root.power != 1.0):
        return None
    name = root.value.name
    if root.value.is_graph_output():
        return f"{name!r} is an output of the graph"
    found = readers(root.value)
    if len(found) > 1:
        return f"{name!r} has {len(found)} readers"
    return f"{name!r} goes to {describe(found[0])}"


def _arrives(value: ir.Value, x: ir.Value, depth: int, rooted: bool) -> bool:
    """Whether a root of `value` comes to multiply or divide `x`, some nodes on."""
    for node in readers(value):
        if node.op_type in ("Mul", "Div") and rooted and alike(other(node, value), x):
            return True
        if depth and node.op_type in _ON_THE_WAY:
            root = rooted or node.op_type in ("Sqrt", "Pow")
            if _arrives(node.outputs[0], x, depth - 1, root):
                return True
    return False


_ON_THE_WAY = ("Add", "Cast", "Clip", "Div", "Max", "Mul", "Pow", "Reciprocal", "Sqrt")


def extend(norm: Norm, *, biased: bool) -> Norm | str:
    """Take in what follows: the weight, the bias if the op has one, and the Cast back."""
    x, at = norm.x, norm.y.producer()  # sizes and types are those of x before the Cast
    while (node := reader(norm.y, "Mul", "Add", "Cast")) is not None:
        if at is None or node.graph is not at.graph:
            break  # the body of an If or a Loop
        value = other(node, norm.y) if node.op_type != "Cast" else None
        if node.op_type == "Cast":
            source = _narrowed(node, norm, biased) if norm.x is x else None
            if source is None:
                break
            norm = replace(norm, x=source)
        elif (
            value is None
            or value is norm.y
            or norm.bias is not None
            or not fits(value, x, norm.axes)
        ):
            break
        elif node.op_type == "Mul" and norm.scale is None:
            norm = replace(norm, scale=value)
        elif node.op_type == "Add" and biased:
            norm = replace(norm, bias=value)
        else:
            break
        norm = replace(norm, y=node.outputs[0])
    if norm.scale is None and not all(isinstance(dim(x, -i), int) for i in range(1, norm.axes + 1)):
        return f"there is no weight, and the last sizes of {x.shape} are not known"
    return norm


def _narrowed(cast: ir.Node, norm: Norm, biased: bool) -> ir.Value | None:
    """x before it was widened, if `cast` narrows y to that type again and nothing is lost."""
    before = producer(norm.x, "Cast")
    source = None if before is None else before.inputs[0]
    to = ir.DataType(cast.attributes.get_int("to", 0))
    if source is None or norm.x.dtype != ir.DataType.FLOAT or to not in NARROW:
        return None
    if source.dtype != to:
        return None
    if to == ir.DataType.BFLOAT16 and not biased:
        # The CPU has no bfloat16 RMSNormalization. It has no Mul either: where the weight comes
        # after the Cast the CPU cannot run the graph anyway; where it comes before, it can.
        after = reader(cast.outputs[0], "Mul")
        value = None if after is None else other(after, cast.outputs[0])
        if norm.scale is not None or value is None or not fits(value, norm.x, norm.axes):
            return None
    lossless = all(v is None or _narrow(v, to) is not None for v in (norm.scale, norm.bias))
    return source if lossless else None


def _narrow(value: ir.Value, to: ir.DataType) -> ir.Value | np.ndarray | None:
    """`value` in a narrow type, where that loses nothing; None otherwise."""
    cast = producer(value, "Cast")
    if cast is not None and cast.inputs[0] is not None and cast.inputs[0].dtype == to:
        return cast.inputs[0]
    array = constant(value)
    if array is None:
        return None
    with np.errstate(over="ignore"):
        narrow = array.astype(to.numpy())
    return narrow if np.array_equal(narrow.astype(array.dtype), array) else None


def write_norm(op_type: str, norm: Norm) -> None:
    """Put the op in the place of what was found."""
    at = norm.y.producer()
    assert at is not None
    assert isinstance(at.graph, ir.Graph)
    inputs = [
        norm.x,
        _ones(at.graph, norm) if norm.scale is None else _fitted(at.graph, norm, norm.scale),
    ]
    if norm.bias is not None:
        inputs.append(_fitted(at.graph, norm, norm.bias))
    node = ir.node(op_type, inputs, attributes={"axis": -norm.axes, "epsilon": norm.epsilon})
    edit.replace(norm.y, node.outputs[0], [node])


def _fitted(graph: ir.Graph, norm: Norm, value: ir.Value) -> ir.Value:
    """A scale or bias in the type of x, without leading axes of 1."""
    assert norm.x.dtype is not None
    fitted = value if value.dtype == norm.x.dtype else _narrow(value, norm.x.dtype)
    if isinstance(fitted, ir.Value) and rank(fitted) in (None, norm.axes):
        return fitted
    array = constant(fitted) if isinstance(fitted, ir.Value) else fitted
    assert array is not None
    array = array.reshape(array.shape[array.ndim - norm.axes :])
    return edit.constant(graph, f"{value.name}_fitted", array)


def _ones(graph: ir.Graph, norm: Norm) -> ir.Value:
    """The scale of a norm that has none; norms of one size share it."""
    assert norm.x.dtype is not None
    sizes = [d for axis in range(-norm.axes, 0) if isinstance(d := dim(norm.x, axis), int)]
    for value in graph.initializers.values():
        if value.dtype != norm.x.dtype or not (value.name or "").startswith(ONES):
            continue
        array = constant(value)  # None for what a caller may feed
        if array is not None and array.shape == tuple(sizes) and np.all(array == 1):
            return value
    return edit.constant(graph, ONES, np.ones(sizes, norm.x.dtype.numpy()))
