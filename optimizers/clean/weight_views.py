"""Parts and turned forms of weights, computed when the model is saved, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir


def is_weight(value: ir.Value | None) -> bool:
    """Whether `value` is an initializer that nobody outside of the graph sets or reads."""
    if value is None or value.const_value is None or not value.is_initializer():
        return False
    return not (value.is_graph_input() or value.is_graph_output())


def view_of(
    weight: ir.Value, view: Callable[[np.ndarray], np.ndarray], shape: Sequence[int], name: str = ""
) -> ir.Value:
    """A new initializer beside `weight`, of `shape`, that computes `view` when it is asked.

    Args:
        weight: An initializer; nothing of it is read before that.
        view: Computes the part or the form that is wanted.
        shape: Its shape.
        name: Its name; by default that of `weight`, as far as it is free.
    """
    tensor, graph = weight.const_value, weight.graph
    assert tensor is not None
    assert isinstance(graph, ir.Graph)
    name = name or f"{weight.name}_view"
    while name in graph.initializers:
        name += "_"
    lazy = ir.LazyTensor(
        lambda: ir.tensor(np.asarray(view(tensor.numpy()), order="C"), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=ir.Shape(shape),
        name=name,
    )
    made = ir.Value(
        name=name, const_value=lazy, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(made)
    return made
