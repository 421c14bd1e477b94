"""What the rules that take an op apart share: the nodes that they write, typed, in order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from ..edit import constant


class Writer:
    """Collects the nodes that take the place of `node`, which is still there while they are made.

    Args:
        node: The node that is about to be replaced; `graph` is the one that it lies in.
        stem: What the names of new values begin with; `NameFixPass` makes them unique.
    """

    def __init__(self, node: ir.Node, stem: str) -> None:
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        self.graph, self.stem = graph, stem
        self.nodes: list[ir.Node] = []

    def op(
        self,
        kind: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        **attributes: int | float | Sequence[int],
    ) -> ir.Value:
        """The output of a new ai.onnx node, of the type of its first input where none is given."""
        first = inputs[0].dtype if inputs and inputs[0] is not None else None
        kept = dtype or first
        node = ir.node(kind, list(inputs), attributes=attributes or None)
        value = node.outputs[0]
        value.name = f"{self.stem}_{kind.lower()}_{len(self.nodes)}"
        value.type = None if kept is None else ir.TensorType(kept)
        self.nodes.append(node)
        return value

    def halves(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The two equal parts of a Split along the last axis."""
        node = ir.node("Split", [value], attributes={"axis": -1, "num_outputs": 2}, num_outputs=2)
        for i, part in enumerate(node.outputs):
            part.name, part.type = f"{self.stem}_half_{len(self.nodes)}_{i}", value.type
        self.nodes.append(node)
        return node.outputs[0], node.outputs[1]

    def ints(self, *numbers: int) -> ir.Value:
        """A constant of int64, of one dimension."""
        return self.array(np.array(numbers, np.int64))

    def number(self, number: float, like: ir.Value) -> ir.Value:
        """A scalar constant of the type of `like`."""
        assert like.dtype is not None
        return self.array(np.array(number, like.dtype.numpy()))

    def array(self, array: np.ndarray) -> ir.Value:
        """A constant."""
        return constant(self.graph, f"{self.stem}_constant_{len(self.nodes)}", array)
