"""The arithmetic of shapes: what the integer ops that exporters write do to lists of sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from .. import read
from .sizes import Size, product

LIMIT = 64  # entries: shapes have fewer, and longer integer tensors are data

Sizes = tuple[Size, ...]

ONE, ZERO = Size.of(1), Size.of(0)

INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


@dataclass(frozen=True)
class Content:
    """The entries of an integer or bool tensor of rank 0 or 1."""

    entries: Sizes
    rank: int

    @property
    def numbers(self) -> list[int] | None:
        """The entries as numbers, where all of them are known."""
        found = [n for e in self.entries if (n := e.number) is not None]
        return found if len(found) == len(self.entries) else None


def compute(
    node: ir.Node,
    content: Callable[[ir.Value | None], Content | None],
    shape: Callable[[ir.Value | None], Sizes | None],
) -> Content | None:
    """The entries of the first output of `node`; None where they are not known."""
    op = node.op_type
    if op == "Shape":
        sizes = shape(node.inputs[0])
        if sizes is None:
            return None
        start, end = (node.attributes.get_int(k, d) for k, d in (("start", 0), ("end", len(sizes))))
        return Content(sizes[start:end], 1)
    if op == "Size":
        sizes = shape(node.inputs[0])
        return None if sizes is None else Content((product(sizes),), 0)
    if op not in KNOWN or not node.inputs:
        return None
    parts = [content(v) for v in node.inputs]
    if parts[0] is None:
        return None
    x, rest = parts[0], parts[1:]
    match op:
        case "Identity":
            return x
        case "Cast":
            return x if node.attributes.get_int("to", 0) in INTEGERS else None
        case "Squeeze":
            return Content(x.entries, 0) if len(x.entries) == 1 else None
        case "Unsqueeze" | "Reshape":
            result = shape(node.outputs[0])
            return None if result is None or len(result) > 1 else Content(x.entries, len(result))
        case "Gather":
            return _gather(x, rest[0])
        case "Slice":
            return _slice(node, x, rest)
        case "Concat":
            if x.rank != 1 or any(p is None for p in rest):
                return None
            return Content(sum((p.entries for p in parts if p is not None), ()), 1)
        case "ConstantOfShape":
            value = node.attributes.get_tensor("value", None)  # without it, zeros in float
            length = x.entries[0].number if len(x.entries) == 1 and x.rank == 1 else None
            if length is None or not 0 <= length <= LIMIT or value is None:
                return None
            if value.dtype not in INTEGERS:
                return None
            return Content((Size.of(int(value.numpy().reshape(-1)[0])),) * length, 1)
        case "ReduceProd":
            keep = node.attributes.get_int("keepdims", 1)
            return Content((product(x.entries),), 1 if keep else 0) if x.rank == 1 else None
        case "Where":
            return _where(x, *rest)
    if len(rest) != 1 or rest[0] is None:
        return None
    return _elementwise(op, x, rest[0])


KNOWN = {
    *("Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Gather", "Identity", "Max"),
    *("Min", "Mod", "Mul", "ReduceProd", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze"),
    "Where",
}


def _gather(x: Content, at: Content | None) -> Content | None:
    where = None if at is None else at.numbers
    if at is None or where is None or x.rank != 1:
        return None
    n = len(x.entries)
    if not all(-n <= i < n for i in where):
        return None
    return Content(tuple(x.entries[i] for i in where), at.rank)


def _slice(node: ir.Node, x: Content, rest: list[Content | None]) -> Content | None:
    bounds = [p.numbers for p in rest[:2] if p is not None]
    steps = [1] if len(node.inputs) < 5 or node.inputs[4] is None else read.ints(node, "", 4)
    if x.rank != 1 or len(bounds) != 2 or steps is None:
        return None
    starts, ends = bounds
    if starts is None or ends is None or len(starts) != 1 or len(steps) != 1 or steps[0] < 1:
        return None
    return Content(x.entries[starts[0] : ends[0] : steps[0]], 1)


def _where(c: Content, a: Content | None, b: Content | None) -> Content | None:
    if a is None or b is None or (chosen := c.numbers) is None:
        return None
    n, rank = max(len(p.entries) for p in (c, a, b)), max(p.rank for p in (c, a, b))
    if any(len(p.entries) not in (1, n) for p in (c, a, b)):
        return None
    pick = [(a if chosen[i % len(chosen)] else b).entries for i in range(n)]
    return Content(tuple(e[i % len(e)] for i, e in enumerate(pick)), rank)


def _elementwise(op: str, a: Content, b: Content) -> Content | None:
    n = max(len(a.entries), len(b.entries))
    if any(len(p.entries) not in (1, n) for p in (a, b)):
        return None
    found = []
    for i in range(n):
        entry = _pair(op, a.entries[i % len(a.entries)], b.entries[i % len(b.entries)])
        if entry is None:
            return None
        found.append(entry)
    return Content(tuple(found), max(a.rank, b.rank))


def _pair(op: str, a: Size, b: Size) -> Size | None:
    x, y = a.number, b.number
    match op:
        case "Add":
            return a + b
        case "Sub":
            return a + -b
        case "Mul":
            return a * b
        case "Div":
            if x is not None and y is not None:  # integers divide toward 0: both above, or exact
                return Size.of(x // y) if y > 0 and x >= 0 else None
            return a.over(b)
        case "Mod":
            return Size.of(x % y) if x is not None and y is not None and y > 0 <= x else None
        case "Max" | "Min":
            if x is None or y is None:
                return a if a == b else None
            return Size.of(max(x, y) if op == "Max" else min(x, y))
        case "Equal":
            if a == b:
                return ONE
            below = (x is not None and x < 0 and b.is_size) or (
                y is not None and y < 0 and a.is_size
            )
            return ZERO if below or (x is not None and y is not None) else None
    return None
