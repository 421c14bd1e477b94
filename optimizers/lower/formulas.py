"""A small part of a graph, computed on numbers: what a rule cannot read, it can try.

Exporters spell masks and repeated heads in dozens of ways. A rule that has to know what such a
part computes takes it out of the graph and lets onnx's own evaluator run it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from .. import read
from ..outcome import describe

MOST_NODES = 500
MOST_NUMBERS = 1 << 24  # of all constants together; a table of 2048 x 2048 is 1 << 22


class Formula:
    """What computes one value from others, out of its graph.

    Args:
        value: What is computed.
        stops: Values that are given and not computed; inputs of the graph always are.

    Attributes:
        given: The values that it is computed from, by value or by size.
        by_size: Those of which nothing but the shape is read.

    Raises:
        Unreadable: It is too large, or holds ops that onnx's evaluator does not know.
    """

    def __init__(self, value: ir.Value, stops: Collection[ir.Value] = ()) -> None:
        self.value = value
        self.given: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        constants = self._walk(value, frozenset(stops))
        self.by_size = {v for v in self.given if self._read_by_size(v)}
        self._names = {v: f"given_{i}" for i, v in enumerate(self.given)}
        self._evaluator = self._evaluator_of(constants)

    def __call__(self, feeds: Mapping[ir.Value, np.ndarray]) -> np.ndarray:
        """The value for these values of all that is `given`.

        Raises:
            Unreadable: The evaluator refuses: a size does not fit, an index is out of range.
        """
        return self.everything(feeds)[-1]

    def everything(self, feeds: Mapping[ir.Value, np.ndarray]) -> list[np.ndarray]:
        """What each node makes, the value itself last; see `__call__`."""
        if not self._nodes:
            return [feeds[self.value]]
        named = {name: feeds[value] for value, name in self._names.items()}
        try:
            with np.errstate(all="ignore"):  # the sum of two masks may be past the lowest float
                found: dict[str, Any] = self._evaluator.run(None, named, intermediate=True)
        except Exception as e:  # whatever numpy raises
            raise Unreadable(f"onnx's evaluator cannot compute {self.value.name!r}: {e}") from e
        made = [a for name, a in found.items() if name not in named and name != "value"]
        return [*(a for a in made if isinstance(a, np.ndarray)), found["value"]]

    def integers(self) -> set[int]:
        """The integers among the constants that it reads: limits, offsets, widths."""
        arrays = (read.constant(v) for n in self._nodes for v in n.inputs)
        return {
            int(n)
            for a in arrays
            if a is not None and a.dtype.kind in "iuf" and a.size == 1
            for n in a.reshape(-1)
            if np.isfinite(n) and n == int(n)
        }

    def _walk(self, value: ir.Value, stops: frozenset[ir.Value]) -> list[ir.Value]:
        constants: dict[ir.Value, None] = {}
        seen: set[ir.Node] = set()
        todo = [value]
        while todo:
            v = todo.pop()
            node = v.producer()
            if v in stops or v.is_graph_input():
                if v not in self.given:
                    self.given.append(v)
            elif node is None:
                constants[v] = None
            elif node not in seen:
                _check(node)
                seen.add(node)
                todo += [i for i in node.inputs if i is not None]
            if len(seen) > MOST_NODES:
                raise Unreadable(f"more than {MOST_NODES} nodes compute {value.name!r}")
        if sum(_size(v) for v in constants) > MOST_NUMBERS:
            raise Unreadable(f"weights go into {value.name!r}")
        graph = None if value.producer() is None else value.producer().graph  # type: ignore[union-attr]
        self._nodes = [n for n in graph or () if n in seen]
        if len(self._nodes) < len(seen):
            raise Unreadable(f"{value.name!r} is computed in a subgraph")
        return list(constants)

    def _read_by_size(self, value: ir.Value) -> bool:
        readers = [n for n in self._nodes if value in n.inputs]
        return value is not self.value and all(n.op_type in ("Shape", "Size") for n in readers)

    def _evaluator_of(self, constants: list[ir.Value]) -> Any:
        if not self._nodes:
            return None
        from onnx.reference import ReferenceEvaluator

        copies: dict[ir.Value | None, ir.Value | None] = {None: None}
        for value, name in self._names.items():
            copies[value] = ir.Value(name=name, type=value.type)
        for i, value in enumerate(constants):
            tensor = value.const_value
            if tensor is None:
                raise Unreadable(f"{value.name!r} comes from outside of the graph")
            copies[value] = ir.Value(name=f"constant_{i}", const_value=tensor, type=value.type)
        nodes = []
        for i, node in enumerate(self._nodes):
            outputs = [ir.Value(name=f"node_{i}_{j}") for j in range(len(node.outputs))]
            copies.update(zip(node.outputs, outputs, strict=True))
            if self.value in node.outputs:
                copies[self.value].name = "value"  # type: ignore[union-attr]
            inputs = [copies[v] for v in node.inputs]
            nodes.append(
                ir.Node("", node.op_type, inputs, node.attributes.values(), outputs=outputs)
            )
        made = copies[self.value]
        assert made is not None
        made.type = self.value.type
        graph = ir.Graph(
            [v for v in (copies[g] for g in self.given) if v is not None],
            [made],
            nodes=nodes,
            initializers=[v for v in (copies[c] for c in constants) if v is not None],
            opset_imports={"": _opset(self.value)},
            name="formula",
        )
        try:
            return ReferenceEvaluator(ir.to_proto(ir.Model(graph, ir_version=10)))
        except Exception as e:  # an op that it lacks, told in many ways
            raise Unreadable(f"onnx's evaluator does not take {self.value.name!r}: {e}") from e


class Unreadable(Exception):
    """A part of a graph that cannot be tried; the reason is its text."""


def _check(node: ir.Node) -> None:
    if node.domain not in ("", "ai.onnx"):
        raise Unreadable(f"{describe(node)} is of {node.domain}")
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    if any(a.type in graphs for a in node.attributes.values()):
        raise Unreadable(f"{describe(node)} has a body")


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else int(value.const_value.size)


def _opset(value: ir.Value) -> int:
    node = value.producer()
    graph = None if node is None else node.graph
    assert isinstance(graph, ir.Graph)
    return graph.opset_imports.get("", 0)
