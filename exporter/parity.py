"""The check of a graph against PyTorch, at points that it was not traced at, failing closed.

A point is a size for every dimension that varies, and fresh values. The sizes: batch 1, length
1, empty past, lengths past the traced one. The masks: ragged, and a fully masked row, in both
polarities, since PyTorch itself uses both (1 is valid in `attention_mask`, padding in
`key_padding_mask`). What PyTorch refuses at a point is no point; what PyTorch answers with NaN
or infinity is not compared there, and counted.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from ..artifact import TensorSpec, evaluate
from ..errors import ExportError, GateError, OnnxpressError
from .capture import quiet, reference_mode
from .names import flatten_inputs
from .source import Source

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
Run = Callable[[Feeds], Mapping[str, Array]]

AT_LEAST = 8
# Largest difference allowed, relative to the largest magnitude of the output (at least 1).
TOLERANCE = {"float32": 5e-5, "float64": 5e-5, "float16": 5e-3, "bfloat16": 4e-2}


@dataclass(frozen=True)
class Point:
    """Sizes of the named dimensions, and how masks are filled: full, ragged, or one row empty."""

    dims: tuple[tuple[str, int], ...]
    mask: str
    spare: bool = False  # the traced sizes with fresh values, for models with little to vary

    def __str__(self) -> str:
        sizes = " ".join(f"{n}={v}" for n, v in self.dims) or "fixed shapes"
        return sizes if self.mask == "full" else f"{sizes}, mask {self.mask}"


@dataclass
class Parity:
    """What was compared, and how far apart it was.

    Attributes:
        reference: Who computed the other side.
        points: Each point as text, with the largest absolute difference met there.
        max_abs: Per output, the largest absolute difference over all points.
        worst: Output, point and position of the largest difference relative to its tolerance.
        ratio: That difference as a share of what is allowed; past 1 the gate refuses.
        undefined: How many values PyTorch left NaN or infinite (they are not compared).
        compared: The outputs of which at least one value was compared.
        refused: Points that PyTorch itself does not take.
    """

    reference: str
    points: list[tuple[str, float]] = field(default_factory=list)
    max_abs: dict[str, float] = field(default_factory=dict)
    worst: str = ""
    ratio: float = 0.0
    undefined: int = 0
    compared: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every output was within tolerance at every point."""
        return self.ratio <= 1.0

    def fail(self, worst: str) -> None:
        """Refuse for what is no number; the first reason stays."""
        if not math.isinf(self.ratio):
            self.ratio, self.worst = math.inf, worst

    def summary(self) -> dict[str, Any]:
        """For the manifest; differences are rounded to two digits, so that it is stable."""
        return {
            "reference": self.reference,
            "points": [{"point": p, "max_abs": _round(d)} for p, d in self.points],
            "max_abs": {name: _round(d) for name, d in self.max_abs.items()},
            "tolerance": "max |difference| <= t * max(1, max |reference|), t = "
            + ", ".join(f"{t:g} for {d}" for d, t in TOLERANCE.items()),
            "passed": self.passed,
            "worst": self.worst,
            "undefined": self.undefined,
        }


@dataclass(frozen=True)
class Reference:
    """What a graph is held against.

    Attributes:
        name: Who computes it, for the manifest: "torch 2.13.0".
        run: Feeds by name to the outputs in the graph's order; whatever it raises means that
            it does not take these feeds.
        prepare: Feeds by name to a call that computes the same and nothing else, to be timed.
        examples: One value of each input: its dtype, its kind of values, and the sizes of the
            dimensions that vary.
        settle: Makes fresh feeds ones that can occur, where not every value can.
        highs: Exclusive upper bounds of integer inputs.
        limits: Largest sizes of dimensions.
        least: Smallest sizes of dimensions.
    """

    name: str
    run: Callable[[Feeds], Sequence[Array]]
    prepare: Callable[[Feeds], Callable[[], object]]
    examples: Feeds
    settle: Callable[[Feeds], Feeds] = lambda feeds: feeds
    highs: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)


def pytorch(source: Source) -> Reference:
    """The source's module as a reference."""
    module = source.module
    assert module is not None
    tensors = flatten_inputs(source)
    names = {id(t): name for name, t in tensors}

    def arguments(feeds: Feeds) -> Any:
        def swap(leaf: Any) -> Any:
            if id(leaf) not in names:
                return leaf
            return torch.from_numpy(feeds[names[id(leaf)]].copy()).to(leaf.dtype)

        return pytree.tree_map(swap, (source.args, source.kwargs))

    def run(feeds: Feeds) -> list[Array]:
        args, kwargs = arguments(feeds)
        with torch.no_grad(), reference_mode(), quiet():
            output = module(*args, **kwargs)
        return [_numpy(t) for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]

    def prepare(feeds: Feeds) -> Callable[[], object]:
        args, kwargs = arguments(feeds)
        return torch.inference_mode()(lambda: module(*args, **kwargs))

    return Reference(
        name=f"torch {torch.__version__.split('+')[0]}",
        run=run,
        prepare=prepare,
        settle=lambda feeds: _written_past(source, run, feeds) if source.kv else feeds,
        examples={name: _numpy(t) for name, t in tensors},
        highs=source.highs,
        limits=source.limits,
        least=source.least,
    )


def _written_past(source: Source, run: Callable[[Feeds], list[Array]], feeds: Feeds) -> Feeds:
    """Feeds with a cache that the model itself wrote, on as many fresh tokens before.

    Random keys and values are nothing that a model ever meets: they drive its activations so
    high that float32 rounding alone would pass the tolerance.
    """
    past = [name for name in feeds if name.startswith("past_key_values.")]
    batch, _, length, _ = feeds[past[0]].shape
    if not length:
        return feeds
    rng = np.random.default_rng(length)
    prefix = {
        **{name: feeds[name][:, :, :0] for name in past},
        "input_ids": rng.integers(0, source.highs["input_ids"], size=(batch, length)),
        "attention_mask": feeds["attention_mask"][:, :length],
        "position_ids": np.broadcast_to(np.arange(length), (batch, length)).copy(),
    }
    given = {name: prefix[name] for name in feeds}
    return {**feeds, **dict(zip(past, run(given)[1:], strict=True))}


def check(
    reference: Reference,
    run: Run,
    inputs: Sequence[TensorSpec],
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> Parity:
    """Run a graph against its reference at `AT_LEAST` points or more.

    Args:
        reference: See `pytorch`.
        run: Runs the graph: numpy feeds by name to numpy outputs by name.
        inputs: The graph's inputs; the dimensions named there are the ones that vary.
        seed: Of the fresh values; the same seed gives the same points and values.
        progress: Told each point.

    Raises:
        ExportError: The reference itself takes fewer points than `AT_LEAST`.
    """
    found = Parity(reference.name)
    for point in _points(reference, inputs):
        if point.spare and len(found.points) >= AT_LEAST:
            break
        feeds = _feeds(point, inputs, reference, seed)
        try:
            feeds = reference.settle(feeds)
            want = reference.run(feeds)
        except Exception:  # whatever it raises: it does not take this point, so it is none
            found.refused.append(str(point))
            continue
        progress(str(point))
        _compare(found, point, feeds, want, run)
    if len(found.points) < AT_LEAST:
        raise ExportError(
            f"{reference.name} ran at {len(found.points)} of the points to check at, "
            f"{AT_LEAST} are needed",
            hint="give larger example inputs, or dynamic shapes with Dim(min=, max=); refused: "
            + "; ".join(found.refused[:4]),
        )
    if blank := sorted(set(found.max_abs) - found.compared):
        found.fail(f"of {', '.join(blank)} it computes NaN and infinity alone, at every point")
    return found


def refuse(parity: Parity, *, what: str = "the graph") -> None:
    """Raise if a check did not pass.

    Raises:
        GateError: With the worst output, point and position.
    """
    if not parity.passed:
        raise GateError(
            f"{what} does not compute what {parity.reference} computes: {parity.worst}",
            hint="nothing was published; --allow-drift publishes it with this in its manifest",
        )


# Points -------------------------------------------------------------------------------------


def _points(reference: Reference, inputs: Sequence[TensorSpec]) -> Iterator[Point]:
    traced: dict[str, int] = {}
    for spec in inputs:
        for dim, size in zip(spec.shape, reference.examples[spec.name].shape, strict=True):
            if isinstance(dim, str) and dim.isidentifier():
                traced.setdefault(dim, size)
    names = list(traced)
    least, most = reference.least, reference.limits

    def point(sizes: Mapping[str, int] | None = None, mask: str = "full") -> Point:
        chosen = {**traced, **(sizes or {})}
        within = {n: max(least.get(n, 0), min(most.get(n, v), v)) for n, v in chosen.items()}
        return Point(tuple(within.items()), mask)

    points = [point()]
    if names:
        batch, *rest = names
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
        points += [point({n: traced[n] + 2}) for n in rest]
        points += [point({n: 0}) for n in past]
        points += [point({batch: 1, n: 600}) for n in past]
        if any(_is_mask(s) for s in inputs):
            masks = ("ragged", "ragged left", "row 0 all 0", "row 0 all 1")
            points += [point(mask=m) for m in masks]
            points += [point(longer, "ragged")]
    yield from dict.fromkeys(points)
    sizes = tuple(traced.items())
    yield from (Point(sizes, f"full, values {i}", spare=True) for i in range(1, AT_LEAST))


def _is_mask(spec: TensorSpec) -> bool:
    return "mask" in spec.name.lower() and not spec.dtype.startswith(("float", "bfloat"))


def _feeds(point: Point, inputs: Sequence[TensorSpec], reference: Reference, seed: int) -> Feeds:
    rng = np.random.default_rng([seed, zlib.crc32(str(point).encode())])
    feeds = {}
    for spec in inputs:
        example = reference.examples[spec.name]
        shape = [evaluate(dim, dict(point.dims)) for dim in spec.shape]
        # An expression that we cannot read keeps the traced size; the reference judges it.
        sizes = [n if s is None else s for s, n in zip(shape, example.shape, strict=True)]
        if _is_mask(spec) and len(sizes) >= 2:
            values = _mask(point.mask, sizes, rng)
        else:
            values = _fresh(example, sizes, rng, reference.highs.get(spec.name))
        feeds[spec.name] = np.ascontiguousarray(values).astype(example.dtype)
    return feeds


def _mask(kind: str, shape: list[int], rng: np.random.Generator) -> Array:
    mask = np.ones(shape, dtype=np.int64)
    rows, length = shape[0], shape[-1]
    if kind.startswith("ragged") and length:
        lengths = rng.integers(1, length + 1, size=(rows, *[1] * (len(shape) - 1)))
        valid = np.arange(length) < lengths
        mask[:] = valid[..., ::-1] if kind.endswith("left") else valid
    elif kind == "row 0 all 0" and rows:
        mask[0] = 0
    elif kind == "row 0 all 1":
        mask[1:] = 0
    return mask


def _fresh(example: Array, shape: list[int], rng: np.random.Generator, high: int | None) -> Array:
    """Values of the kind that the example holds, at another shape."""
    if example.dtype == np.bool_:
        return rng.integers(0, 2, size=shape).astype(bool)
    if example.dtype.kind in "iu":
        if not example.size:
            return np.zeros(shape, dtype=np.int64)
        low = 0 if high else int(example.min())
        return rng.integers(low, high or int(example.max()) + 1, size=shape)
    flat = example.astype(np.float64)
    known = flat[np.isfinite(flat)]
    if known.size < flat.size:
        # An additive mask: infinities among finite values, and never a whole row of them.
        values = np.where(rng.random(shape) < 0.3, -np.inf, 0.0)
        values[..., :1] = 0.0
        return values
    spread = float(known.std()) if known.size > 1 else 1.0
    mean = float(known.mean()) if known.size else 0.0
    values = mean + (spread or 1.0) * rng.standard_normal(shape)
    return np.abs(values) if known.size and float(known.min()) >= 0 else values


# Comparing ----------------------------------------------------------------------------------


def _compare(found: Parity, point: Point, feeds: Feeds, want: Sequence[Array], run: Run) -> None:
    try:
        got = run(feeds)
    except OnnxpressError as e:
        found.points.append((str(point), math.inf))
        found.fail(f"at {point} {found.reference} runs and ONNX Runtime does not: {e.what}")
        return
    largest = 0.0
    for (name, have), wanted in zip(got.items(), want, strict=True):
        difference = _difference(found, point, name, np.asarray(have), np.asarray(wanted))
        found.max_abs[name] = max(found.max_abs.get(name, 0.0), difference)
        largest = max(largest, difference)
    found.points.append((str(point), largest))


def _difference(found: Parity, point: Point, name: str, have: Array, wanted: Array) -> float:
    want = wanted.astype(np.float64)
    allowed = TOLERANCE.get(wanted.dtype.name, 0.0)
    if have.shape != want.shape:
        shapes = f"has shape {have.shape}, {found.reference} gives {want.shape}"
        found.fail(f"{name} at {point} {shapes}")
        return math.inf
    finite = np.isfinite(want)
    found.undefined += int(want.size - finite.sum())
    if finite.any() or not want.size:
        found.compared.add(name)
    apart = np.where(finite, np.abs(have.astype(np.float64) - np.where(finite, want, 0.0)), 0.0)
    apart = np.where(finite & ~np.isfinite(have.astype(np.float64)), np.inf, apart)
    if not apart.size:
        return 0.0
    at = np.unravel_index(int(np.argmax(apart)), apart.shape)
    worst = float(apart[at])
    scale = max(1.0, float(np.abs(want[finite]).max())) if finite.any() else 1.0
    limit = allowed * scale if allowed else 0.5  # integers and booleans are equal, or they are not
    if worst / limit > found.ratio:
        found.ratio = worst / limit
        position = ", ".join(str(int(i)) for i in at)
        found.worst = (
            f"output {name} of shape {tuple(have.shape)} at {point} differs by {worst:.3g} "
            f"(allowed {limit:.3g}) at position [{position}]: {float(have[at]):.6g} against "
            f"{float(want[at]):.6g}"
        )
    return worst


def _numpy(t: torch.Tensor) -> Array:
    t = t.detach()
    if t.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(t.numpy())


def _round(value: float) -> float | str:
    return float(f"{value:.1e}") if math.isfinite(value) else str(value)
