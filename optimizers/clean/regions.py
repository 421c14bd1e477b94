"""Parts of a graph that work on the last axis alone, whatever the order of the other axes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from .. import read
from .facts import Facts

UNARY = {  # each number for itself
    *("Abs", "Cast", "Ceil", "Clip", "Cos", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid"),
    *("HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu"),
    *("Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh"),
}

ELEMENTWISE = {"Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum", "Where"}

ROWWISE = {  # within the last axis, if that is the axis they name: (name, default)
    "LayerNormalization": ("axis", -1),
    "LogSoftmax": ("axis", -1),
    "RMSNormalization": ("axis", -1),
    "Softmax": ("axis", -1),
    "Split": ("axis", 0),
}

WIDEST = 4  # axes; of more, there are too many orders, and no exporter turns them


@dataclass
class Region:
    """Nodes that work on the last axis alone, and the values between and around them."""

    nodes: set[ir.Node] = field(default_factory=set)
    values: dict[ir.Value, None] = field(default_factory=dict)  # in graph order

    @property
    def entering(self) -> list[ir.Value]:
        """The values that come from other ops."""
        return [v for v in self.values if v.producer() not in self.nodes]

    @property
    def inside(self) -> list[ir.Value]:
        """The values that the nodes make."""
        return [v for v in self.values if v.producer() in self.nodes]

    def outside(self, value: ir.Value) -> list[ir.Node]:
        """Who reads `value` outside of the region."""
        return [node for node in read.readers(value) if node not in self.nodes]


class Regions:
    """Regions that grow together where they share a value."""

    def __init__(self) -> None:
        self._of: dict[ir.Value, Region] = {}

    def join(self, node: ir.Node, data: list[ir.Value]) -> None:
        """Put a node, and the values that it reads and makes, in one region."""
        made = node.outputs if node.op_type == "Split" else node.outputs[:1]
        values = [*data, *made]
        found = list({id(r): r for v in values if (r := self._of.get(v)) is not None}.values())
        found.sort(key=lambda r: len(r.values), reverse=True)
        region = found[0] if found else Region()
        for other in found[1:]:  # the smaller into the larger: n log n in all
            region.nodes |= other.nodes
            region.values.update(other.values)
            self._of.update(dict.fromkeys(other.values, region))
        region.nodes.add(node)
        region.values.update(dict.fromkeys(values))
        self._of.update(dict.fromkeys(values, region))

    def all(self) -> Iterable[Region]:
        """Each region once."""
        return {id(r): r for r in self._of.values()}.values()


def data_of(node: ir.Node, facts: Facts) -> list[ir.Value] | None:
    """The operands whose leading axes are those of the result; None where that is not so."""
    if node.domain not in ("", "ai.onnx") or not node.inputs or (x := node.inputs[0]) is None:
        return None
    shape, op = facts.shape(node.outputs[0]), node.op_type
    rank = 0 if shape is None else len(shape)
    if not 3 <= rank <= WIDEST:
        return None
    last = rank - 1
    if op in UNARY:
        return [x]
    if op in ROWWISE:
        name, default = ROWWISE[op]
        used = [v for v in node.outputs[1:] if v.uses() or v.is_graph_output()]
        if node.attributes.get_int(name, default) not in (-1, last) or (used and op != "Split"):
            return None
        flat = all(_is_flat(v, facts) for v in node.inputs[1:])
        return [x] if flat and len(facts.shape(x) or ()) == rank else None
    if op == "MatMul":
        weight = facts.shape(node.inputs[1])
        return [x] if len(weight or ()) == 2 and len(facts.shape(x) or ()) == rank else None
    if op not in ELEMENTWISE:
        return None
    data = [v for v in node.inputs if not _is_flat(v, facts)]
    if any(v is None or len(facts.shape(v) or ()) != rank for v in data):
        return None  # of lower rank, it would broadcast along axes that move
    return [v for v in dict.fromkeys(data) if v is not None]


def _is_flat(value: ir.Value | None, facts: Facts) -> bool:
    """Whether a value has no leading axes to turn: it is no tensor, or of size 1 there."""
    shape = facts.shape(value)
    return value is None or (shape is not None and all(s.number == 1 for s in shape[:-1]))
