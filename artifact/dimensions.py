"""Dimensions of a signature: numbers, names that vary, and expressions over such names."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def is_symbol(dim: str) -> bool:
    """Whether a dimension is a plain name, the same size wherever it stands."""
    return re.search(r"[\s()+*/?-]", dim) is None


def evaluate(dim: int | str, sizes: Mapping[str, int]) -> int | None:
    """The size of a dimension where its names have these sizes.

    Integers, names and + - * // are understood; anything else, and a name that is not in
    `sizes`, gives None.
    """
    if isinstance(dim, int):
        return dim
    if is_symbol(dim):
        return sizes.get(dim)
    try:
        return _value(ast.parse(dim.strip(), mode="eval").body, sizes)
    except (SyntaxError, ZeroDivisionError):
        return None


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int | None:
    match node:
        case ast.Constant(value=int(n)):
            return n
        case ast.Name(id=name):
            return sizes.get(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _value(operand, sizes)
            return None if value is None else -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _value(left, sizes), _value(right, sizes)
            return None if a is None or b is None else _OPERATORS[type(op)](a, b)
    return None
