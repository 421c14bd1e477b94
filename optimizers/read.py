"""What rules ask of a graph: constants, producers, operands. Nothing here changes it.

The rules that lift read a graph from an anchor (a Softmax, an Erf, a ReduceMean) along its edges
instead of drawing every spelling of a formula: a product of four factors has dozens of them, and
a walk names the node at which it stopped.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

LIMIT = 1 << 20  # elements; what rules compare is small, and weights stay on disk


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The ai.onnx node of one of these types that makes `value`, or None."""
    node = None if value is None else value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    return node if not op_types or node.op_type in op_types else None


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read `value`, each once, in no particular order; subgraphs included."""
    return list(dict.fromkeys(node for node, _ in value.uses()))


def reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The only reader of `value`, where there is one, of one of these types, and no output."""
    found = readers(value)
    if len(found) != 1 or value.is_graph_output() or found[0].domain not in ("", "ai.onnx"):
        return None
    return found[0] if not op_types or found[0].op_type in op_types else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of a small constant (initializer, or output of Constant); None for all others."""
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > LIMIT or tensor.dtype.is_string():
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds, of any rank; None for all others."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def factor_of(value: ir.Value | None, tensor: ir.Value | None) -> float | None:
    """`scalar`, where arithmetic with it leaves the rank of `tensor` alone; or None."""
    array = constant(value)
    if array is None or array.size != 1 or array.ndim > (rank(tensor) or 0):
        return None
    return float(array.reshape(()))


def is_scalar(value: ir.Value | None, number: float, rtol: float = 1e-3) -> bool:
    """Whether `value` is the constant `number`; float16 keeps three digits, hence the tolerance."""
    found = scalar(value)
    return found is not None and bool(np.isclose(found, number, rtol=rtol, atol=0.0))


def other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The operand of a binary node that is not `value` (which may be both)."""
    first, second = node.inputs
    return second if first is value else first


def with_scalar(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(tensor, number) of a binary node with a constant operand on either side; or None."""
    if len(node.inputs) != 2:
        return None
    for a, b in (node.inputs, reversed(node.inputs)):
        number = scalar(b)
        if a is not None and number is not None and constant(a) is None:
            return a, number
    return None


def ints(node: ir.Node, name: str, index: int) -> list[int] | None:
    """Integers that are an attribute in old opsets and a constant input in new ones; or None."""
    attribute = node.attributes.get_ints(name, None)
    if attribute is not None:
        return list(attribute)
    array = constant(node.inputs[index]) if len(node.inputs) > index else None
    return None if array is None else [int(i) for i in array.reshape(-1)]


def rank(value: ir.Value | None) -> int | None:
    """Number of dimensions, where known."""
    return None if value is None or value.shape is None else len(value.shape)


def last_axis(value: ir.Value | None, axes: list[int] | None) -> bool:
    """Whether `axes` is the last axis of `value`, and only that."""
    if axes is None or len(axes) != 1:
        return False
    n = rank(value)
    return axes[0] == -1 or (n is not None and axes[0] == n - 1)


def alike(a: ir.Value | None, b: ir.Value | None, depth: int = 4) -> bool:
    """Whether two values are one, or the same ops make them of the same values (`depth` deep)."""
    if a is b:
        return a is not None
    one, two = producer(a, *_REPEATABLE), producer(b, *_REPEATABLE)
    if one is None or two is None or depth == 0 or one.op_type != two.op_type:
        return False
    settings = [{name: a.value for name, a in n.attributes.items()} for n in (one, two)]
    if len(one.inputs) != len(two.inputs) or settings[0] != settings[1]:
        return False
    return all(alike(x, y, depth - 1) for x, y in zip(one.inputs, two.inputs, strict=True))


_REPEATABLE = ("Add", "Cast", "Div", "Mul", "Pow", "ReduceMean", "Sub")  # no state, no randomness
