"""Raise a GELU that an exporter spelled out to ai.onnx's Gelu."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import onnx_ir as ir

from ..edit import replace
from ..outcome import Outcome, describe
from ..read import constant, factor_of, other, producer, reader, readers
from .walk import lift

Polynomial = dict[int, float]  # power of x -> coefficient

ROOT = math.sqrt(2 / math.pi)
# What each curve is taken of, and the value of the other factor of x.
CURVES: dict[str, tuple[Polynomial, float, str]] = {
    "Erf": ({1: math.sqrt(0.5)}, 0.5, "none"),
    "Tanh": ({1: ROOT, 3: ROOT * 0.044715}, 0.5, "tanh"),
    "Sigmoid": ({1: 2 * ROOT, 3: 2 * ROOT * 0.044715}, 1.0, "tanh"),
}
DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
DEPTH = 8  # nodes between x and what depends on it; the longest spelling here has 6


MANY = 64  # values that are tried as x


@dataclass(frozen=True)
class Gelu:
    """What was found: the input, the product that is its GELU, and the attribute."""

    x: ir.Value
    product: ir.Value
    approximate: str


class LiftGelu(ir.passes.InPlacePass):
    """Raise a GELU that an exporter spelled out to ai.onnx's Gelu (opset 20).

    ```
    a = Div(x, 1.4142)  b = Erf(a)  c = Add(b, 1)  d = Mul(x, c)  y = Mul(d, 0.5)
    ->
    y = Gelu(x)

    a = Pow(x, 3)  b = Mul(a, 0.044715)  c = Add(x, b)  d = Mul(c, 0.79788)  e = Tanh(d)
    f = Add(e, 1)  g = Mul(x, 0.5)  y = Mul(g, f)
    ->
    y = Gelu<approximate="tanh">(x)
    ```

    From each Erf, Tanh and Sigmoid the walk goes down the product and asks of each operand which
    polynomial of x it is, so the order and the association of the factors do not matter, nor how
    x**3 is written. Sigmoid(2 u) is (1 + tanh(u)) / 2. Gaussian error linear units:
    Hendrycks and Gimpel, arXiv:1606.08415.

    x * Sigmoid(1.702 x), the "quick GELU", is another function and stays; so does double, which
    ONNX Runtime has no Gelu kernel for.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit the curves in graph order."""
        return lift(model, "Gelu", since=20, anchors=tuple(CURVES), read=_read, write=_write)


def _read(curve: ir.Node) -> Gelu | str | None:
    wanted, _, approximate = CURVES[curve.op_type]
    argument = curve.inputs[0]
    misses = []
    for x in _sources(argument):
        found = _polynomial(argument, x)
        if found is None or set(found) != set(wanted):
            continue
        judged = _judge(curve, x, found)
        if isinstance(judged, ir.Value):
            return Gelu(x, judged, approximate)
        if judged is not None:
            misses.append(judged)
    # The x that explains most of the product is the one that was meant.
    return max(misses, key=lambda miss: miss[0])[1] if misses else None


def _judge(curve: ir.Node, x: ir.Value, argument: Polynomial) -> ir.Value | tuple[int, str] | None:
    """The value that is the GELU of x; or (how far it is one, why it is not); or None."""
    wanted, factor, _ = CURVES[curve.op_type]
    walk = _Product(curve, x)
    while walk.step(factor):
        pass
    argument = {power: walk.sign * number for power, number in argument.items()}
    # bfloat16 keeps eight bits of a constant.
    rtol = 4e-3 if x.dtype == ir.DataType.BFLOAT16 else 1e-3
    wrong = [
        power for power in wanted if not math.isclose(argument[power], wanted[power], rel_tol=rtol)
    ]
    if not (walk.raised and walk.power == 1):
        near = not wrong and _multiplies(walk.value, x, 3)
        return (walk.steps, walk.stopped()) if near else None
    if not math.isclose(walk.number, factor, rel_tol=rtol):
        reason = f"the product has the factor {walk.number:.6g}, not {factor:g}"
        return walk.steps, f"{reason}, where {walk.stopped()}"
    if wrong:
        of = "x" if wrong[0] == 1 else f"x**{wrong[0]}"
        reason = f"{curve.op_type} takes {argument[wrong[0]]:.6g} {of}, not {wanted[wrong[0]]:.6g}"
        return walk.steps, reason
    if x.dtype not in DTYPES:
        return walk.steps, f"the type is {x.dtype.name if x.dtype else 'unknown'}"
    return walk.value


class _Product:
    """The walk from a curve down the nodes that multiply it.

    value = number * x**power * curve, and once raised: number * x**power * (1 + sign * curve).
    """

    def __init__(self, curve: ir.Node, x: ir.Value) -> None:
        self.value, self.x, self.graph = curve.outputs[0], x, curve.graph
        self.number, self.power, self.sign, self.steps = 1.0, 0, 1.0, 0
        self.raised = curve.op_type == "Sigmoid"

    def step(self, factor: float) -> bool:
        """Take in the next node, unless the GELU is complete or the node does not belong to it."""
        if self.raised and self.power == 1 and math.isclose(self.number, factor, rel_tol=1e-3):
            return False
        node = reader(self.value, "Mul", "Div", "Add", "Sub")
        if node is None or node.graph is not self.graph:
            return False
        first = node.inputs[0] is self.value
        term = _polynomial(node.inputs[1 if first else 0], self.x)
        if term is None or len(term) != 1:
            return False
        ((power, number),) = term.items()
        if not self._take(node.op_type, first, power, number):
            return False
        self.value, self.steps = node.outputs[0], self.steps + 1
        return True

    def _take(self, op_type: str, first: bool, power: int, number: float) -> bool:
        if number == 0.0:
            return False
        if op_type == "Mul" and self.power + power <= 1:
            self.number, self.power = self.number * number, self.power + power
            return True
        if op_type == "Div" and first and power == 0:
            self.number /= number
            return True
        if op_type not in ("Add", "Sub") or self.raised or power != self.power:
            return False
        # c * curve + c is c * (1 + curve), and both may have the factor x.
        mine = self.number if op_type == "Add" or first else -self.number
        number = -number if op_type == "Sub" and first else number
        if not math.isclose(abs(mine), abs(number), rel_tol=1e-3):
            return False
        self.sign, self.number, self.raised = math.copysign(1.0, mine * number), number, True
        return True

    def stopped(self) -> str:
        """Why the walk ended where it did."""
        found, name = readers(self.value), self.value.name
        if self.value.is_graph_output():
            return f"{name!r} is an output of the graph"
        if len(found) != 1:
            return f"{name!r} has {len(found)} readers"
        return f"{name!r} goes to {describe(found[0])}"


def _multiplies(value: ir.Value, x: ir.Value, depth: int) -> bool:
    """Whether `value` comes to multiply `x`, some nodes on."""
    for node in readers(value):
        if node.op_type == "Mul" and set(_polynomial(other(node, value), x) or ()) == {1}:
            return True
        goes_on = depth and node.op_type in ("Add", "Cast", "Div", "Mul", "Sub")
        if goes_on and _multiplies(node.outputs[0], x, depth - 1):
            return True
    return False


def _sources(argument: ir.Value | None) -> list[ir.Value]:
    """What may be the x of an argument: the values behind it, nearest first."""
    found = [] if argument is None else [argument]
    for value in found:  # grows meanwhile
        node = producer(value, "Mul", "Div", "Add", "Sub", "Pow", "Neg")
        if node is not None and len(found) < MANY:
            found += [
                v for v in node.inputs if v is not None and v not in found and constant(v) is None
            ]
    return found


def _polynomial(value: ir.Value | None, x: ir.Value, depth: int = DEPTH) -> Polynomial | None:
    """`value` as a polynomial of `x` of degree 3 at most; None where it is none."""
    if value is x:
        return {1: 1.0}
    number = factor_of(value, x)
    if number is not None:
        return {0: number}
    node = producer(value, "Mul", "Div", "Add", "Sub", "Pow", "Neg")
    if node is None or depth == 0:
        return None
    terms = [_polynomial(v, x, depth - 1) for v in node.inputs]
    if any(term is None for term in terms):
        return None
    a, b = (terms[0], terms[-1])
    assert a is not None
    assert b is not None
    number = b[0] if set(b) == {0} else None
    match node.op_type:
        case "Neg":
            return {power: -c for power, c in a.items()}
        case "Add":
            return _sum(a, b)
        case "Sub":
            return _sum(a, {power: -c for power, c in b.items()})
        case "Mul":
            return _times(a, b)
        case "Div":
            return _times(a, {0: 1 / number}) if number else None
        case _:
            cube = _times(_times(a, a), a) if number == 3 else None
            return _times(a, a) if number == 2 else cube


def _sum(a: Polynomial, b: Polynomial) -> Polynomial:
    return {power: a.get(power, 0.0) + b.get(power, 0.0) for power in sorted({*a, *b})}


def _times(a: Polynomial | None, b: Polynomial) -> Polynomial | None:
    product: Polynomial = {}
    for (i, c), (j, d) in itertools.product((a or {}).items(), b.items()):
        product[i + j] = product.get(i + j, 0.0) + c * d
    return product if product and max(product) <= 3 else None


def _write(curve: ir.Node, found: Gelu) -> None:
    attributes = {} if found.approximate == "none" else {"approximate": found.approximate}
    gelu = ir.node("Gelu", [found.x], attributes=attributes)
    replace(found.product, gelu.outputs[0], [gelu])
