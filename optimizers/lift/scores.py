"""Reading attention scores: from a Softmax back to the MatMul of queries and keys.

Between the two lie, in any order and number: a scale (Mul or Div by a number), an additive mask
or bias (Add, Sub), a mask that fills (Where with a number on one side), and Casts of floats.
`read_scores` sums them up as the operator does: softmax(scale * Q @ K^T + bias).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ..read import constant, producer, scalar, with_scalar

# A filled score gets no weight beside any other score above it; scores do not get this low.
LOW = -1e4
_FOLLOWED = ("Mul", "Div", "Add", "Sub", "Where", "Cast")
_CROSSED = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Tanh", "Clip", "Min", "Max", "Slice")
_DEPTH = 12  # steps between a Softmax and its MatMul; those of real graphs are below 8


@dataclass(frozen=True)
class Add:
    """A bias that is added: `value`, times `factor`."""

    value: ir.Value
    factor: float = 1.0


@dataclass(frozen=True)
class Fill:
    """A mask that fills: where `condition` is `when`, the score is replaced by `number`."""

    condition: ir.Value
    when: bool
    number: float


@dataclass
class Scores:
    """softmax(scale * left @ right + terms), the terms in the order in which they apply."""

    matmul: ir.Node
    scale: float = 1.0
    terms: list[Add | Fill] = field(default_factory=list)
    casts: list[ir.DataType] = field(default_factory=list)

    def apply(self, node: ir.Node, value: ir.Value) -> str | None:
        """Take in `node`, which reads the scores as `value`; a string says why that fails."""
        match node.op_type:
            case "Cast":
                to = ir.DataType(node.attributes.get_int("to"))
                if not to.is_floating_point():
                    return f"the scores are cast to {to.name}"
                self.casts.append(to)
            case "Mul" | "Div":
                found = with_scalar(node)
                if found is None:
                    return f"the scale in {node.op_type} {node.name!r} is computed, not a number"
                if found[1] == 0.0:
                    return f"the scale in {node.op_type} {node.name!r} is 0"
                number = found[1] if node.op_type == "Mul" else 1.0 / found[1]
                if node.op_type == "Div" and node.inputs[0] is not value:
                    return f"Div {node.name!r} divides by the scores"
                if not number > 0.0:
                    return f"the scale in {node.op_type} {node.name!r} is {number:g}"
                self._multiply(number)
            case "Add" | "Sub":
                first, second = node.inputs
                term = second if first is value else first
                if term is None or (node.op_type == "Sub" and first is not value):
                    return f"Sub {node.name!r} subtracts the scores"
                self.terms.append(Add(term, 1.0 if node.op_type == "Add" else -1.0))
            case _:
                return self._fill(node, value)
        return None

    def _multiply(self, number: float) -> None:
        self.scale *= number
        self.terms = [
            Add(t.value, t.factor * number)
            if isinstance(t, Add)
            else Fill(t.condition, t.when, _float32(t.number * number))
            for t in self.terms
        ]

    def _fill(self, node: ir.Node, value: ir.Value) -> str | None:
        condition, yes, no = node.inputs
        when = no is value
        number = scalar(yes if when else no)
        if condition is None or value is condition or number is None:
            return f"Where {node.name!r} does not fill the scores with a number"
        if number > LOW:
            return f"Where {node.name!r} fills with {number:g}, which scores may reach"
        self.terms.append(Fill(condition, when, number))
        return None


def _float32(number: float) -> float:
    """What the graph computes: the lowest float, doubled, is -inf."""
    return number if number >= float(np.finfo(np.float32).min) else -math.inf


def read_scores(softmax: ir.Node) -> Scores | str | None:
    """What a Softmax is taken of; None where no MatMul leads to it, a string where one nearly does.

    Every value between the MatMul and the Softmax must have one reader: with a second one, the
    scores are computed anyway, and one op would not replace them.
    """
    path = _path(softmax.inputs[0], _DEPTH)
    if path is None:
        return None
    matmul, *rest = path
    scores, value = Scores(matmul), matmul.outputs[0]
    for node in rest:
        if reason := _second_reader(value) or scores.apply(node, value):
            return reason
        value = node.outputs[0]
    return _second_reader(value) or scores


def stopped_at(softmax: ir.Node) -> ir.Node | None:
    """The node at which the walk to a MatMul of two computed values ended, if there is one."""
    return _beyond(softmax.inputs[0], 8)


def _beyond(value: ir.Value | None, depth: int) -> ir.Node | None:
    node = producer(value, "MatMul", "Einsum", *_FOLLOWED, *_CROSSED)
    if node is None or depth == 0:
        return None
    if node.op_type in ("MatMul", "Einsum"):
        computed = not any(constant(v) is not None or _weight(v) for v in node.inputs)
        return node if computed else None
    for operand in node.inputs:
        found = _beyond(operand, depth - 1)
        if found is not None:
            return node if node.op_type in _CROSSED else found
    return None


def _second_reader(value: ir.Value) -> str | None:
    if value.is_graph_output():
        return f"the scores {value.name!r} are an output of the graph"
    if len(readers := value.uses()) > 1:
        return f"the scores {value.name!r} have {len(readers)} readers"
    return None


def _path(value: ir.Value | None, depth: int) -> list[ir.Node] | None:
    """The nodes from a MatMul of two computed values to `value`, in the order of the data."""
    node = producer(value, "MatMul", *_FOLLOWED)
    if node is None or depth == 0:
        return None
    if node.op_type == "MatMul":
        return None if any(constant(v) is not None or _weight(v) for v in node.inputs) else [node]
    for operand in _operands(node):
        found = _path(operand, depth - 1)
        if found is not None:
            return [*found, node]
    return None


def _operands(node: ir.Node) -> Iterator[ir.Value | None]:
    """Where the scores may come from."""
    match node.op_type:
        case "Where":
            yield from node.inputs[1:]
        case "Cast":
            yield node.inputs[0]
        case _:
            yield from node.inputs


def _weight(value: ir.Value | None) -> bool:
    return value is None or (value.is_initializer() and not value.is_graph_input())
