"""The linear layers of a base graph: what int8 is made of, one by one, and their names."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

import onnx_ir as ir

from ..clean.weight_views import is_weight
from ..outcome import SCOPE, describe
from ..read import other, rank, reader

SMALLEST = 1024
"""Elements of the smallest weight that is worth int8: less is a detail of its graph."""


@dataclass(frozen=True)
class Layer:
    """One MatMul with a constant weight.

    Attributes:
        name: The module that it comes from, else that of its weight, else that of its bias where
            no other layer has it (equal biases are one initializer), else the node; unique.
        kind: The name with `*` for every number: the same layer of every block.
        node: The MatMul.
        input: The activation that it reads, float32 (..., K).
        weight: Its weight, an initializer of float32 (K, N).
        add: The Add of its bias, where its only reader is one.
        bias: What that adds, an initializer of float32 (N,).
    """

    name: str
    kind: str
    node: ir.Node
    input: ir.Value
    weight: ir.Value
    add: ir.Node | None
    bias: ir.Value | None

    @property
    def output(self) -> ir.Value:
        """What leaves the layer, its bias added."""
        return (self.add or self.node).outputs[0]


def layers(model: ir.Model) -> tuple[list[Layer], list[str]]:
    """The linear layers of the main graph in order, and why other products are none.

    A product of two activations (as in attention) is not a layer, and no note tells of it.
    """
    found: list[Layer] = []
    notes: list[str] = []
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain:
            continue
        x, w = node.inputs
        if x is None or w is None or w.const_value is None or not w.is_initializer():
            continue
        if w.is_graph_input() or x.is_initializer():
            continue
        if why := _refusal(x, w):
            notes.append(f"{describe(node)} stays as it is: {why}")
            continue
        add = reader(node.outputs[0], "Add")
        bias = _bias(add, node.outputs[0], w) if add else None
        found.append(Layer("", "", node, x, w, add if bias else None, bias))
    return _named(found), notes


def _refusal(x: ir.Value, w: ir.Value) -> str | None:
    if w.dtype != ir.DataType.FLOAT or x.dtype not in (None, ir.DataType.FLOAT):
        return f"its weight is {w.dtype}, not float32"
    if rank(w) != 2:
        return f"its weight has rank {rank(w)}, not 2"
    if w.shape is not None and w.const_value is not None and w.const_value.size < SMALLEST:
        return f"its weight has {w.const_value.size} elements; below {SMALLEST} int8 saves nothing"
    if w.is_graph_output():
        return "its weight is an output of the graph"
    return None


def _bias(add: ir.Node, product: ir.Value, weight: ir.Value) -> ir.Value | None:
    """What `add` adds to the product, where it is one number a column."""
    term = other(add, product)
    columns = weight.shape[1] if weight.shape is not None else None
    if term is None or not is_weight(term) or term.dtype != ir.DataType.FLOAT:
        return None
    return term if term.shape is not None and list(term.shape) == [columns] else None


def _named(found: list[Layer]) -> list[Layer]:
    stems = Counter(_stem(layer.bias) for layer in found)
    names = [_name(layer, stems) for layer in found]
    count, seen = Counter(names), Counter[str]()
    named = []
    for name, layer in zip(names, found, strict=True):
        seen[name] += 1
        unique = f"{name}#{seen[name]}" if count[name] > 1 else name  # a module called twice
        named.append(replace(layer, name=unique, kind=re.sub(r"\d+", "*", unique)))
    return named


def _name(layer: Layer, stems: Counter[str]) -> str:
    if scope := layer.node.metadata_props.get(SCOPE, ""):
        return scope
    of_bias = _stem(layer.bias)
    of_bias = of_bias if stems[of_bias] == 1 else ""
    node = str(layer.node.name or layer.node.outputs[0].name)
    return _stem(layer.weight) or of_bias or node


def _stem(value: ir.Value | None) -> str:
    """The module whose parameter this is, by its name; what passes append to it is let go."""
    found = re.match(r"(.+)\.(bias|weight)\w*$", str(value.name)) if value is not None else None
    return found[1] if found else ""
