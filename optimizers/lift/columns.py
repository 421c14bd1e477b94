"""What the last axes of a value are made of, entry by entry.

A rotation can be spelled with Slice, Split, Gather, Reshape, Concat and their kin in more ways than
anyone would list, and all of them only move columns about. So the columns are followed one by
one: two columns that get the same number here hold the same numbers in every run.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from ..dims import dim, same_dim
from ..read import constant, ints, producer, rank

LIMIT = 2048  # entries that are followed at once; heads have 32 to 256 columns
UNARY = ("Cos", "Sin", "Cast", "Neg")
BINARY = ("Mul", "Div", "Add", "Sub")
FAR = 24  # nodes on the way to a leaf: rotations are short, networks are long

Columns = np.ndarray  # of int64, one number for each entry of the last axes


class Follow:
    """Numbers the columns of values; equal numbers are equal columns.

    `of(value)` is one number for each column: the last axis. With `depth` 2 or 3 it is a table for
    the last axes, as an interleaved rotation has them. All other axes are never looked into: a
    node that works on them is noted in the number.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[ir.Value, int], Columns | None] = {}
        self._numbers: dict[Hashable, int] = {}
        self.keys: list[Hashable] = []
        self._level = 0

    def of(self, value: ir.Value | None, depth: int = 1) -> Columns | None:
        """The numbers of the last `depth` axes of `value`; None where they cannot be told."""
        n = rank(value)
        if value is None or n is None or not 1 <= depth <= min(n, 3):
            return None
        if (value, depth) not in self._seen:
            found, node = self.leaf(value, depth), producer(value)
            if found is None and node is not None and self._level < FAR:
                self._level += 1
                found = self._moved(node, value, n, depth)
                if found is None:
                    found = self.computed(node, depth)
                self._level -= 1
            if found is None:
                found = self.opaque(value, depth)
            if found is not None and found.size > LIMIT:
                found = None
            self._seen[value, depth] = found
        return self._seen[value, depth]

    def number(self, key: Hashable) -> int:
        """The number of a column that is described by `key`."""
        if key not in self._numbers:
            self._numbers[key] = len(self.keys)
            self.keys.append(key)
        return self._numbers[key]

    def leaf(self, value: ir.Value, depth: int) -> Columns | None:
        """The numbers of a value at which to stop: here, a constant, whose columns compare."""
        array = constant(value)
        if array is None or math.prod(array.shape[-depth:]) > LIMIT:
            return None
        sizes = array.shape[-depth:]
        columns = array.reshape(-1, math.prod(sizes)).T
        kind = ("constant", str(array.dtype), array.shape, depth)
        keys = [(kind, c.tobytes()) for c in columns]
        return np.array([self.number(key) for key in keys]).reshape(sizes)

    def computed(self, node: ir.Node, depth: int) -> Columns | None:
        """The numbers of what a node computes from the columns of its inputs, each by itself."""
        if node.op_type not in (*UNARY, *BINARY):
            return None
        found = []
        for x in node.inputs:
            n = rank(x)
            part = None if n is None else self.of(x, min(depth, n)) if n else self._scalar(x)
            if part is None:
                return None
            found.append(part)
        try:
            tables = np.broadcast_arrays(*found)
        except ValueError:
            return None
        token = (node.op_type, str(sorted((k, str(a.value)) for k, a in node.attributes.items())))
        keys = zip(*(t.reshape(-1).tolist() for t in tables), strict=True)
        return np.array([self.number((token, *key)) for key in keys]).reshape(tables[0].shape)

    def _scalar(self, value: ir.Value | None) -> Columns:
        array = constant(value)
        return np.array(self.number((value,) if array is None else ("scalar", array.tobytes())))

    def opaque(self, value: ir.Value, depth: int) -> Columns | None:
        """The numbers of a value that nothing is known about: all different."""
        sizes = _sizes(value, depth)
        if sizes is None:
            return None
        numbers = [self.number(("column", value, depth, i)) for i in range(math.prod(sizes))]
        return np.array(numbers, np.int64).reshape(sizes)

    def elsewhere(self, node: ir.Node, sizes: Hashable, inner: Columns | None) -> Columns | None:
        """The numbers `inner` after `node` has worked on the other axes."""
        if inner is None:
            return None
        attributes = str(sorted((k, str(a.value)) for k, a in node.attributes.items()))
        token = (node.op_type, attributes, sizes, *node.inputs[1:])
        numbers = [self.number((token, k)) for k in inner.reshape(-1).tolist()]
        return np.array(numbers, np.int64).reshape(inner.shape)

    def _moved(self, node: ir.Node, value: ir.Value, n: int, depth: int) -> Columns | None:
        """The numbers of what a node takes, repeats, joins or reorders."""
        x, first = (node.inputs[0] if node.inputs else None), n - depth
        if x is None:
            return None
        match node.op_type:
            case "Identity":
                return self.of(x, depth)
            case "Concat":
                axis = node.attributes.get_int("axis", 0) % n - first
                parts = [self.of(v, depth) for v in node.inputs]
                if axis < 0 or any(p is None for p in parts):
                    return None
                return np.concatenate([p for p in parts if p is not None], axis)
            case "Split":
                return self._split(node, value, n, depth)
            case "Slice":
                return self._slice(node, self.of(x, depth), n, depth)
            case "Gather":
                return self._gather(node, x, depth)
            case "Transpose":
                perm = list(node.attributes.get_ints("perm", range(n)[::-1]))
                inner = self.of(x, depth)
                if inner is None or min(perm[first:]) < first:
                    return None
                inner = inner.transpose([p - first for p in perm[first:]])
                lead = perm[:first] == list(range(first))
                return inner if lead else self.elsewhere(node, depth, inner)
            case "Expand":
                sizes, m = _sizes(value, depth), rank(x)
                inner = None if m is None else self.of(x, min(depth, m))
                if inner is None or sizes is None or m is None:
                    return None
                inner = np.broadcast_to(inner, sizes)
                same = m == n and _same_lead(x, value, first)
                return inner if same else self.elsewhere(node, depth, inner)
            case "Tile":
                repeats, inner = constant(node.inputs[1]), self.of(x, depth)
                if repeats is None or inner is None or inner.size * repeats.prod() > LIMIT:
                    return None
                inner = np.tile(inner, repeats[first:].tolist())
                return inner if (repeats[:first] == 1).all() else self.elsewhere(node, depth, inner)
            case "Unsqueeze" | "Squeeze":
                return self._squeeze(node, x, n, depth)
            case "Reshape" | "Flatten":
                return self._reshape(node, x, value, depth)
        return None

    def _split(self, node: ir.Node, value: ir.Value, n: int, depth: int) -> Columns | None:
        axis = node.attributes.get_int("axis", 0) % n - (n - depth)
        inner = self.of(node.inputs[0], depth)
        if axis < 0 or inner is None:
            return None
        sizes = ints(node, "split", 1)
        if sizes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
            return None
        if sizes is None:  # equal parts, the last one may be smaller
            parts = len(node.outputs)
            sizes = [-(-inner.shape[axis] // parts)] * parts
        index = node.outputs.index(value)
        start = sum(sizes[:index])
        return inner.take(range(start, min(start + sizes[index], inner.shape[axis])), axis)

    def _slice(self, node: ir.Node, inner: Columns | None, n: int, depth: int) -> Columns | None:
        given = [*node.inputs[1:], None, None][:4]
        starts, ends, axes, steps = (constant(v) for v in given)
        if inner is None or (given[2] is not None and axes is None):
            return None
        count = dim(given[0], 0)
        if axes is None and isinstance(count, int):
            axes = np.arange(count)
        if axes is None:
            return None
        at = [int(a) % n - (n - depth) for a in axes]
        if all(a < 0 for a in at):
            return self.elsewhere(node, depth, inner)
        steps = np.ones(len(at), np.int64) if given[3] is None else steps
        if min(at) < 0 or starts is None or ends is None or steps is None or min(steps) < 1:
            return None
        bounds = [slice(None)] * depth
        for axis, start, end, step in zip(at, starts, ends, steps, strict=True):
            bounds[axis] = slice(int(start), int(end), int(step))
        return inner[tuple(bounds)]

    def _gather(self, node: ir.Node, x: ir.Value, depth: int) -> Columns | None:
        index, m = node.inputs[1], rank(x)
        array, k = constant(index), rank(index)
        if m is None or k is None:
            return None
        axis = node.attributes.get_int("axis", 0) % m
        if axis < m - depth:
            return self.elsewhere(node, depth, self.of(x, depth))
        # One index takes its axis away, and the axis before comes into view.
        inner = self.of(x, depth + 1 - k) if array is not None and k < 2 else None
        at = axis - (m - depth - 1 + k)
        if inner is None or array is None or at < 0:
            return None
        held = inner.shape[at]
        inside = bool(np.all((-held <= array) & (array < held)))
        return inner.take(array, at) if inside else None

    def _squeeze(self, node: ir.Node, x: ir.Value, n: int, depth: int) -> Columns | None:
        axes, m = ints(node, "axes", 1), rank(x)
        if axes is None or m is None:
            return None
        more = node.op_type == "Squeeze"
        wide = m if more else n  # the rank that the axes count in
        axes = [a % wide for a in axes]
        if all(a < wide - depth for a in axes):
            return self.elsewhere(node, depth, self.of(x, depth))
        inner_depth = depth + len(axes) if more else depth - len(axes)
        if any(a < wide - max(depth, inner_depth) for a in axes) or inner_depth < 1:
            return None
        inner = self.of(x, inner_depth)
        if inner is None:
            return None
        if more:
            return inner.squeeze(tuple(a - (m - inner_depth) for a in axes))
        return np.expand_dims(inner, tuple(a - (n - depth) for a in axes))

    def _reshape(self, node: ir.Node, x: ir.Value, value: ir.Value, depth: int) -> Columns | None:
        sizes, n = _sizes(value, depth), rank(value)
        if sizes is None or n is None:
            return None
        lead, m, apart = n - depth, rank(x) or 0, None
        for inner_depth in range(1, min(m, 3) + 1):
            have = _sizes(x, inner_depth)
            if have is None or math.prod(have) != math.prod(sizes) or 0 in sizes:
                continue
            inner = self.of(x, inner_depth)
            if inner is None:
                continue
            inner = inner.reshape(sizes)
            if lead == m - inner_depth and _same_lead(x, value, lead):
                return inner
            apart = self.elsewhere(node, sizes, inner) if apart is None else apart
        return apart


def _sizes(value: ir.Value, depth: int) -> tuple[int, ...] | None:
    """The last `depth` sizes of `value`, where all are numbers."""
    found = tuple(dim(value, i) for i in range(-depth, 0))
    numbers = tuple(i for i in found if isinstance(i, int))
    return numbers if len(numbers) == depth and math.prod(numbers) <= LIMIT else None


def _same_lead(a: ir.Value, b: ir.Value, count: int) -> bool:
    """Whether the first `count` sizes of two values are known to be equal."""
    return all(same_dim(dim(a, i), dim(b, i)) for i in range(count))
