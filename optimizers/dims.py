"""What shapes prove. Passes ask here, so that all of them trust shapes to the same degree."""

from __future__ import annotations

import onnx_ir as ir

Dim = int | ir.SymbolicDim | None


def dim(value: ir.Value | None, axis: int) -> Dim:
    """Size of one axis; None where the rank is unknown or too small."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    return value.shape[axis]


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two sizes are known to be equal: the same number, or the same name.

    ONNX gives a dimension's name one meaning in a whole graph, so equal names prove equal sizes.
    """
    if isinstance(a, int) or isinstance(b, int):
        return a == b
    return a is not None and b is not None and a.value is not None and a.value == b.value


def same_shape(a: ir.Value, b: ir.Value) -> bool:
    """Whether two values are known to have the same shape."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(same_dim(x, y) for x, y in zip(a.shape, b.shape, strict=True))
