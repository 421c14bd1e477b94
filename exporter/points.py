"""Points to check a graph at: sizes it was not traced at, and fresh values of the right kind.

The sizes: batch 1, length 1, empty past, lengths past the traced one, each dimension by itself.
The values of an input follow from its example:

    an additive mask    floats, all of them zero or hugely negative
    a mask              booleans, or integers of 0 and 1; its name does not matter
    ids                 other integers, up to the highest that the reference takes
    numbers             other floats, normal with the example's mean and spread

Masks are filled ragged, from both sides, and with one row throughout 0 or 1, since both
polarities are in use (1 is valid in `attention_mask`, padding in `key_padding_mask`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..artifact import TensorSpec, evaluate
from .reference import Array, Feeds, Reference

HUGE = -1e4  # the mildest number that is in use for "minus infinity" (float16's)
MASKS = ("ragged", "ragged left", "row 0 all 0", "row 0 all 1")
HIGHS = (2, 8, 64, 1024)  # bounds to try for integers of which the example shows too little


@dataclass(frozen=True)
class Point:
    """Sizes of the named dimensions, and how masks are filled: full, ragged, one row empty."""

    dims: tuple[tuple[str, int], ...]
    mask: str = "full"
    again: int = 0  # the traced sizes with other values, where there is little to vary

    def __str__(self) -> str:
        sizes = " ".join(f"{n}={v}" for n, v in self.dims) or "fixed shapes"
        if self.again:
            return f"{sizes}, other values {self.again}"
        return sizes if self.mask == "full" else f"{sizes}, mask {self.mask}"


class Points:
    """The points for one reference, and the feeds at each; with `right` masks pad there alone."""

    def __init__(
        self,
        reference: Reference,
        inputs: Sequence[TensorSpec],
        *,
        seed: int,
        right: bool = False,
    ) -> None:
        self.reference, self.inputs, self.seed = reference, inputs, seed
        self.masks = MASKS[:1] if right else MASKS
        self.traced: dict[str, int] = {}
        for spec in inputs:
            for dim, size in zip(spec.shape, reference.examples[spec.name].shape, strict=True):
                if isinstance(dim, str) and dim.isidentifier():
                    self.traced.setdefault(dim, size)
        self.kinds = {s.name: kind_of(s.name, reference.examples[s.name]) for s in inputs}
        self.highs = self._highs()

    def __iter__(self) -> Iterator[Point]:
        names, least, most = list(self.traced), self.reference.least, self.reference.limits

        def point(sizes: Mapping[str, int] | None = None, mask: str = "full") -> Point:
            chosen = {**self.traced, **(sizes or {})}
            within = {n: max(least.get(n, 0), min(most.get(n, v), v)) for n, v in chosen.items()}
            return Point(tuple(within.items()), mask)

        points = [point()]
        longer: dict[str, int] = {}
        if names:
            batch, *rest = names
            traced = self.traced
            past = [n for n in rest if "past" in n]
            short, longer = dict.fromkeys(rest, 1), {n: traced[n] + 3 for n in rest}
            points += [
                point({batch: 1}),
                point(short),
                point(longer),
                point({batch: 1, **short}),
                point({batch: traced[batch] + 1, **{n: 2 * traced[n] + 1 for n in rest}}),
                point({batch: 1, **{n: 5 * traced[n] + 2 for n in rest}}),
            ]
            # One dimension at a time: two that are free of each other may have been tied.
            points += [point({n: traced[n] + 2}) for n in names]
            points += [point({n: 2 * traced[n]}) for n in names]
            points += [point({n: 0}) for n in past]
            points += [point({batch: 1, n: 600}) for n in past]
        if {"mask", "additive mask"} & set(self.kinds.values()):
            points += [point(mask=m) for m in self.masks]
            points += [point(longer, "ragged")]
        yield from dict.fromkeys(points)
        sizes = tuple(self.traced.items())
        yield from (Point(sizes, again=i) for i in range(1, 9))

    def feeds(self, point: Point) -> Feeds:
        """Fresh values at one point, the same for the same seed."""
        rng = np.random.default_rng([self.seed, zlib.crc32(str(point).encode())])
        feeds = {}
        for spec in self.inputs:
            example = self.reference.examples[spec.name]
            shape = [evaluate(dim, dict(point.dims)) for dim in spec.shape]
            # An expression that we cannot read keeps the traced size; the reference judges it.
            sizes = [n if s is None else s for s, n in zip(shape, example.shape, strict=True)]
            kind = self.kinds[spec.name]
            if kind == "mask":
                values = _mask(point.mask, sizes, rng)
            elif kind == "additive mask":
                low = float(example.min()) if example.size and example.min() < 0 else -np.inf
                values = np.where(_mask(point.mask, sizes, rng) == 1, 0.0, low)
            elif kind == "ids":
                low = 0 if self.highs[spec.name] else int(example.min(initial=0))
                values = rng.integers(low, max(low + 1, self.highs[spec.name]), size=sizes)
            else:
                values = _numbers(example, sizes, rng)
            # reshape: a scalar has no dimensions, and ascontiguousarray gives it one
            feeds[spec.name] = np.ascontiguousarray(values, example.dtype).reshape(sizes)
        return self.reference.settle(feeds)

    def constant(self) -> list[str]:
        """Inputs of which one value was fed at every point."""
        return [n for n, high in self.highs.items() if high <= 1 and self.kinds[n] == "ids"]

    def _highs(self) -> dict[str, int]:
        """Exclusive bounds of integers: what the source says, else what the reference takes."""
        highs = {n: h for n, h in self.reference.highs.items() if n in self.kinds}
        for name, kind in self.kinds.items():
            example = self.reference.examples[name]
            if kind != "ids" or name in highs:
                continue
            highs[name] = int(example.max(initial=0)) + 1
            for high in HIGHS:
                if high <= highs[name]:
                    continue
                trial = np.full_like(example, high - 1)
                try:
                    self.reference.run({**self.reference.examples, name: trial})
                except Exception:  # whatever it raises: out of range
                    break
                highs[name] = high
        return highs


def kind_of(name: str, example: Array) -> str:
    """mask, additive mask, ids or numbers: see the head of this file."""
    if example.dtype == np.bool_:
        return "mask"
    named = "mask" in name.lower()
    if example.dtype.kind in "iu":
        two = example.size > 0 and bool(np.isin(example, (0, 1)).all())
        return "mask" if two and (named or bool((example == 1).any())) else "ids"
    flat = example.astype(np.float64)
    low = (flat <= HUGE).any()
    return "additive mask" if (low or named) and ((flat == 0) | (flat <= HUGE)).all() else "numbers"


def _mask(kind: str, shape: list[int], rng: np.random.Generator) -> Array:
    mask = np.ones(shape, dtype=np.int64)
    if not shape:
        return np.asarray(kind != "row 0 all 0", dtype=np.int64)
    rows, length = shape[0], shape[-1]
    if kind.startswith("ragged") and length:
        lengths = rng.integers(1, length + 1, size=(rows, *[1] * (len(shape) - 1)))
        valid = np.arange(length) < (lengths if len(shape) > 1 else lengths[0])
        mask[:] = valid[..., ::-1] if kind.endswith("left") else valid
    elif kind == "row 0 all 0" and rows:
        mask[0] = 0
    elif kind == "row 0 all 1":
        mask[1:] = 0
    return mask


def _numbers(example: Array, shape: list[int], rng: np.random.Generator) -> Array:
    flat = example.astype(np.float64)
    known = flat[np.isfinite(flat)]
    spread = float(known.std()) if known.size > 1 else 1.0
    mean = float(known.mean()) if known.size else 0.0
    values = np.asarray(mean + (spread or 1.0) * rng.standard_normal(shape))
    return np.abs(values) if known.size and float(known.min()) >= 0 else values
