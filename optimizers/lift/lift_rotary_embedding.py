"""Raise rotary position embeddings to RotaryEmbedding.

What the kernel of ONNX Runtime 1.32 does on CPU, tried for opset 23 and 24, halves and
interleaved, all alike (B in the batch, H heads, S positions, D columns, of which R are rotated):

    X                cos_cache, sin_cache, position_ids          ORT on CPU
    [B,H,S,D]        [B,S,R/2]                                   right, num_heads or not
    [B,S,H*D]        [B,S,R/2]                                   right, num_heads=H
    any              [1,S,R/2], [B,1,R/2]                        error: it does not broadcast
    any              [S,R/2] without position_ids                error: 3 dimensions expected
    any              [max,R/2], [B,S]                            right; error if out of range
    any              [max,R/2], [1,S] or [S]                     error: [B,S] expected

R < D takes rotary_embedding_dim, in either form; R/2 may be odd. float and float16 run, all
inputs of one type; B or S may be 0. It never computed wrong numbers. Its caches are never
broadcast, so one that serves the whole batch is written out here (`over_batch`), once for all
layers. On one thread, [1,9,128,64] takes 26 us against 106 of the nodes that it replaces, and
[1,9,1,64] 11 against 20.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from .. import edit
from ..dims import dim, same_dim
from ..outcome import Outcome, describe
from ..read import last_axis, producer, rank, reader
from .columns import Columns, Follow
from .rotary_cache import MOVERS, Cache, Made, over_batch, take_half
from .walk import lift

KIND = "RotaryEmbedding"
PICKERS = ("Reshape", "Slice", "Split", "Gather")  # begin to take the columns of X apart
DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

Term = tuple[int, int, int]  # sign, column of X, index of what it is multiplied by (-1: nothing)


@dataclass(frozen=True)
class Rotary:
    """What is rotated (`x`, where `heads` is the axis that caches are broadcast over), into `y`."""

    x: ir.Value
    y: ir.Value
    cos: Cache
    sin: Cache
    interleaved: bool
    heads: int


class LiftRotaryEmbedding(ir.passes.InPlacePass):
    """Raise rotary position embeddings (https://arxiv.org/abs/2104.09864) to RotaryEmbedding.

    ```
    f = Mul(position, frequencies)  e = Concat<axis=-1>(f, f)  cos = Cos(e)  sin = Sin(e)
    x1 = Slice(x, [0], [d/2], [3])  x2 = Slice(x, [d/2], [d], [3])      x [batch, heads, seq, d]
    r = Concat<axis=-1>(Neg(x2), x1)
    y = Add(Mul(x, Unsqueeze(cos, [1])), Mul(r, Unsqueeze(sin, [1])))   cos, sin [1, seq, d]
    ->
    f = Mul(position, frequencies)  cos = Cos(f)  sin = Sin(f)
    to = Concat<axis=0>(Shape<end=1>(x), [1, 1])
    y = RotaryEmbedding(x, Expand(cos, to), Expand(sin, to))            [batch, seq, d/2]
    ```

    Each column of `y` is read as a sum of columns of `x` times columns of caches, whatever the
    spelling: the rotated half joined before the multiplication or after it, even and odd columns
    for halves (`interleaved`), the first columns rotated and the rest passed through
    (`rotary_embedding_dim`), heads after the positions ([batch, seq, heads, d]: a Reshape to rank
    3 and `num_heads`). Where a cache is read at both columns of a pair, the two have to be equal
    by construction, and a half of it is taken, once for all that read it.

    Declined: caches with a size that is not proved to be the length of `x` or 1; caches of other
    shapes than one row for each position; types that the op does not take; a rotation the other
    way round.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit what can end a rotation: an Add, a Concat of halves, a Reshape of pairs."""
        follow: Follow = Follow()
        made: Made = {}
        return lift(
            model,
            KIND,
            since=23,
            anchors=("Add", "Concat", "Reshape"),
            read=lambda node: _read(node, follow),
            write=lambda _, found: _write(found, made, follow),
        )


class _Sum(Follow):
    """Reads columns as sums of columns of `x`, each times a column of something or nothing."""

    def __init__(self, x: ir.Value) -> None:
        super().__init__()
        self.x = x
        self.factors: list[tuple[ir.Value, int]] = []
        self.why: str | None = None  # the last node that could not be followed

    def terms(self, number: int) -> tuple[Term, ...]:
        """What is added up in the column of that number."""
        return self.keys[number]  # type: ignore[return-value]

    def negates(self) -> bool:
        """Whether a negative column came up, as in the half of a vector that is turned."""
        return any(sign < 0 for key in self.keys for sign, _, _ in self.terms(self.number(key)))

    def leaf(self, value: ir.Value, depth: int) -> Columns | None:
        columns = dim(value, -1)
        if value is not self.x or depth != 1 or not isinstance(columns, int):
            return None
        return np.array([self.number(((1, i, -1),)) for i in range(columns)])

    def opaque(self, value: ir.Value, depth: int) -> Columns | None:
        return None

    def elsewhere(self, node: ir.Node, sizes: object, inner: Columns | None) -> Columns | None:
        if inner is not None:  # a row of another head or position is no column of this one
            self.why = f"{describe(node)} is not proved to leave the rows of {self.x.name!r} alone"
        return None

    def computed(self, node: ir.Node, depth: int) -> Columns | None:
        match node.op_type:
            case "Neg":
                a = self.of(node.inputs[0], depth)
                return None if a is None else self._each(_negative, a)
            case "Add" | "Sub":
                a, b = (self.of(v, depth) for v in node.inputs)
                if a is None or b is None or a.shape != b.shape:
                    return None
                if node.op_type == "Sub":
                    b = self._each(_negative, b)
                pairs = zip(a.reshape(-1).tolist(), b.reshape(-1).tolist(), strict=True)
                sums = [self.number((*self.terms(i), *self.terms(j))) for i, j in pairs]
                return np.array(sums).reshape(a.shape)
            case "Mul" if depth == 1:
                for part, factor in (node.inputs, reversed(node.inputs)):
                    if factor is not None and (found := self._product(part, factor)) is not None:
                        return found
        return None

    def _each(
        self, change: Callable[[tuple[Term, ...]], tuple[Term, ...]], columns: Columns
    ) -> Columns:
        changed = [self.number(change(self.terms(i))) for i in columns.reshape(-1).tolist()]
        return np.array(changed, np.int64).reshape(columns.shape)

    def _product(self, part: ir.Value | None, factor: ir.Value) -> Columns | None:
        columns, width = self.of(part), dim(factor, -1)
        if columns is None or width not in (1, len(columns)):
            if columns is not None and rank(factor) != 0 and not isinstance(width, int):
                self.why = f"the last size of {factor.name!r} {factor.shape} is not known"
            return None
        if any(by >= 0 for i in columns.tolist() for _, _, by in self.terms(i)):
            return None
        found = []
        for j, i in enumerate(columns.tolist()):
            by = len(self.factors)
            self.factors.append((factor, 0 if width == 1 else j))
            found.append(self.number(tuple((sign, c, by) for sign, c, _ in self.terms(i))))
        return np.array(found)


def _negative(terms: Sequence[Term]) -> tuple[Term, ...]:
    return tuple((-sign, column, by) for sign, column, by in terms)


def _read(node: ir.Node, follow: Follow) -> Rotary | str | None:
    """What ends at `node`; with the columns that pass by the rotation, where they are joined."""
    y = node.outputs[0]
    if node.op_type == "Concat" and not last_axis(y, [node.attributes.get_int("axis", 0)]):
        return None
    found = _ends_at(y, follow)
    if isinstance(found, Rotary):
        joined = reader(y, "Concat")
        more = None if joined is None else _ends_at(joined.outputs[0], follow)
        return more if isinstance(more, Rotary) else found
    return found


def _ends_at(y: ir.Value, follow: Follow) -> Rotary | str | None:
    why: str | None = None
    for x in _candidates(y):
        found = _rotation(x, y, follow)
        if isinstance(found, Rotary):
            return found
        why = why or found
    return why


def _candidates(y: ir.Value) -> list[ir.Value]:
    """Values before `y` whose columns are taken apart."""
    found: dict[ir.Value, None] = {}
    seen, front = {y}, [y]
    for _ in range(10):
        behind = []
        for value in front:
            node = producer(value, *MOVERS)
            if node is None:
                continue
            x = node.inputs[0]
            picks = node.op_type in PICKERS and x is not None and rank(x) == rank(y)
            if x is not None and picks and isinstance(dim(x, -1), int):
                found[x] = None
            ways = node.inputs[:1] if node.op_type in PICKERS else node.inputs
            behind += [v for v in ways if v is not None and v not in seen]
            seen.update(behind)
        front = behind
    return list(found)[:8]


def _rotation(x: ir.Value, y: ir.Value, follow: Follow) -> Rotary | str | None:
    """Whether `y` is `x` rotated. None: it is no sum of pairs of columns at all."""
    sums = _Sum(x)
    columns = sums.of(y)
    if columns is None:
        return sums.why if sums.negates() else None
    if len(columns) != dim(x, -1):
        return None
    terms = [sums.terms(i) for i in columns.tolist()]
    rot = sum(len(t) == 2 and all(by >= 0 for _, _, by in t) for t in terms)
    if rot == 0 or not any(sign < 0 for t in terms for sign, _, _ in t):
        return None
    if any(t != ((1, j, -1),) for j, t in enumerate(terms[rot:], rot)):
        return f"column {rot} and those after it do not pass as they are"
    if rot % 2:
        return f"an odd number of columns is rotated: {rot}"
    half = rot // 2
    halves = _factors(terms, [(i, i + half) for i in range(half)])
    pairs = None if halves else _factors(terms, [(2 * i, 2 * i + 1) for i in range(half)])
    factors = halves or pairs
    if factors is None:
        return f"column 0 is {_spell(terms[0])}, column {half} {_spell(terms[half])}: no rotation"
    cos, sin = (_cache(sums.factors, *f, follow) for f in factors)
    if isinstance(cos, str) or isinstance(sin, str):
        return f"cos: {cos}" if isinstance(cos, str) else f"sin: {sin}"
    return _judged(Rotary(x, y, cos, sin, interleaved=pairs is not None, heads=1))


Pair = tuple[list[int], list[int]]  # factors of the first columns of pairs, and of the second


def _factors(terms: list[tuple[Term, ...]], pairs: list[tuple[int, int]]) -> list[Pair] | None:
    """The factors of (cos, sin), where each pair (a, b) becomes (a*cos - b*sin, b*cos + a*sin)."""
    cos: Pair = ([], [])
    sin: Pair = ([], [])
    for a, b in pairs:
        for side, (own, other, sign) in enumerate(((a, b, -1), (b, a, 1))):
            by = {column: (s, factor) for s, column, factor in terms[own] if factor >= 0}
            if (
                len(terms[own]) != 2
                or by.keys() != {a, b}
                or by[own][0] != 1
                or by[other][0] != sign
            ):
                return None
            cos[side].append(by[own][1])
            sin[side].append(by[other][1])
    return [cos, sin]


def _spell(terms: tuple[Term, ...]) -> str:
    return " ".join(f"{'-' if sign < 0 else '+'}x[{column}]*c" for sign, column, _ in terms)


def _cache(
    factors: list[tuple[ir.Value, int]], real: list[int], imaginary: list[int], follow: Follow
) -> Cache | str:
    """The cache read for the first columns of pairs, if the one for the second is the same."""
    for i, j in zip(real, imaginary, strict=True):
        (first, a), (second, b) = factors[i], factors[j]
        if (first, a) == (second, b):
            continue
        one, two = follow.of(first), follow.of(second)
        if one is None or two is None or one[a] != two[b]:
            return (
                f"column {a} of {first.name!r} and column {b} of {second.name!r} "
                "are not proved to be equal"
            )
    value, half = factors[real[0]][0], len(real)
    read = [factors[i] for i in real]
    for step in (1, 2):
        if read == [(value, step * i) for i in range(half)]:
            return Cache(value, half, step)
    return f"columns {[column for _, column in read[:4]]}... of {value.name!r} are no half of it"


def _judged(found: Rotary) -> Rotary | str:
    """The rotation, if RotaryEmbedding can say it: types, ranks, and sizes of the caches."""
    x, caches = found.x, (found.cos.value, found.sin.value)
    if x.dtype not in DTYPES:
        return f"x {x.name!r} is {x.dtype}"
    if rank(x) != 4:
        return f"x {x.name!r} has rank {rank(x)}, not 4"
    for cache in caches:
        if cache.dtype is not None and cache.dtype != x.dtype:
            return f"cache {cache.name!r} is {cache.dtype}, x is {x.dtype}"
    before = [_misfit(x, cache, 1) for cache in caches]
    if not any(before):
        return found
    after = [_misfit(x, cache, 2) for cache in caches]
    if not any(after):
        if isinstance(dim(x, 2), int):
            return replace(found, heads=2)
        return f"x {x.name!r} is [batch, seq, heads, d] and its number of heads is not known"
    return before[0] or before[1]


def _misfit(x: ir.Value, cache: ir.Value, heads: int) -> str:
    """Why the cache is not [batch or 1, seq, d], broadcast over axis `heads` of `x`; or ''."""
    n = rank(cache)
    if n is None or not 2 <= n <= 4:
        return f"cache {cache.name!r} has rank {n}"
    for axis in range(-n, -1):
        have = dim(cache, axis)
        if axis + 4 == heads:
            if have != 1:
                return f"cache {cache.name!r} has {have} heads in {cache.shape}"
        elif not (axis == -4 and have == 1) and not same_dim(dim(cache, axis), dim(x, axis)):
            return f"axis {axis} of cache {cache.name!r} {cache.shape} is not that of {x.shape}"
    if heads == 2 and n < 3:
        return f"cache {cache.name!r} has rank {n}"
    return ""


def _write(found: Rotary, made: Made, follow: Follow) -> None:
    x, y, at = found.x, found.y, found.y.producer()
    assert at is not None
    assert isinstance(at.graph, ir.Graph)
    halves = [take_half(c, found.heads, at, made, follow) for c in (found.cos, found.sin)]
    caches = [over_batch(half, x, at, made) for half in halves]
    attributes: dict[str, int] = {}
    if found.interleaved:
        attributes["interleaved"] = 1
    if 2 * found.cos.half != dim(x, -1):
        attributes["rotary_embedding_dim"] = 2 * found.cos.half
    if found.heads == 1:
        rotary = ir.node(KIND, [x, *caches], attributes=attributes)
        edit.replace(y, rotary.outputs[0], [rotary])
        return
    heads, columns = dim(x, 2), dim(x, 3)
    assert isinstance(heads, int)
    assert isinstance(columns, int)
    attributes["num_heads"] = heads
    flat = edit.constant(at.graph, "rotary_rows", np.array([0, 0, heads * columns]))
    whole = edit.constant(at.graph, "rotary_heads", np.array([0, 0, heads, columns]))
    rows = ir.node("Reshape", [x, flat])
    rotary = ir.node(KIND, [*rows.outputs, *caches], attributes=attributes)
    assert x.shape is not None
    for value in (*rows.outputs, *rotary.outputs):
        value.type, value.shape = x.type, ir.Shape([x.shape[0], x.shape[1], heads * columns])
    back = ir.node("Reshape", [*rotary.outputs, whole])
    edit.replace(y, back.outputs[0], [rows, rotary, back])
