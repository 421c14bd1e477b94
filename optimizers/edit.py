"""How rules change a graph: constants, and one value in the place of another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from .outcome import SCOPE


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer that holds `array`: one that is there already, or a new one."""
    tensor = ir.tensor(array)
    for value in graph.initializers.values():
        have = value.const_value
        if (
            have is None
            or have.dtype != tensor.dtype
            or have.shape != tensor.shape
            or have.size > 64
            or value.is_graph_input()
            or value.is_graph_output()
        ):
            continue
        if have.dtype.is_string():
            continue
        if have.numpy().tobytes() == array.tobytes():
            return value
    while name in graph.initializers:
        name += "_"
    value = ir.Value(name=name, const_value=tensor)
    tensor.name = name
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
    graph.register_initializer(value)
    return value


def replace(old: ir.Value, new: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Let everyone who reads `old` read `new`, made by `nodes`, which are put in `old`'s place.

    `new` takes over the name, the type and the shape of `old`; nodes left without readers go with
    the dead code. All that `nodes` read must be made before `old` is.
    """
    at = old.producer()
    assert at is not None
    graph = at.graph
    assert graph is not None
    graph.insert_before(at, list(nodes))
    new.type, new.shape = old.type or new.type, old.shape or new.shape
    scope = at.metadata_props.get(SCOPE)
    for node in nodes:
        if scope and SCOPE not in node.metadata_props:
            node.metadata_props[SCOPE] = scope
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, f"{old.name}_replaced"
