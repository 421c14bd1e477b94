"""The check of a graph against PyTorch, at points that it was not traced at, failing closed.

What PyTorch refuses at a point is no point; what PyTorch answers with NaN is not compared
there, and counted; infinities have to be the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..artifact import TensorSpec, evaluate
from ..errors import ExportError, GateError, OnnxpressError
from .points import Point, Points
from .reference import Array, Feeds, Reference

Run = Callable[[Feeds], Mapping[str, Array]]

AT_LEAST = 8
# What a value may be off, relative to itself and to the ordinary size of its output's values.
TOLERANCE = {"float32": 5e-5, "float64": 5e-5, "float16": 5e-3, "bfloat16": 4e-2}
FLOOR = 0.02  # added to that size: 1e-6 in float32, below which all is rounding


@dataclass
class Parity:
    """What was compared, and how far apart it was.

    Attributes:
        reference: Who computed the other side.
        points: Each point as text, with the largest absolute difference met there.
        max_abs: Per output, the largest absolute difference over all points.
        worst: Output, point and position of the largest difference relative to its tolerance.
        ratio: That difference as a share of what is allowed; past 1 the gate refuses.
        undefined: How many values the reference left NaN (they are not compared).
        compared: The outputs of which at least one value was compared.
        refused: Points that the reference itself does not take.
        constant: Inputs of integers that took one value at every point: nothing else ran.
        misstated: Outputs and axes whose size was another one than the signature says.
        fixed: Dimensions that took one size at every point, although the signature lets them vary.
    """

    reference: str
    points: list[tuple[str, float]] = field(default_factory=list)
    max_abs: dict[str, float] = field(default_factory=dict)
    worst: str = ""
    ratio: float = 0.0
    undefined: int = 0
    compared: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)
    constant: list[str] = field(default_factory=list)
    misstated: set[tuple[str, int]] = field(default_factory=set)
    fixed: list[str] = field(default_factory=list)

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
            "tolerance": "|difference| <= t * (|reference| + its ordinary size + "
            f"{FLOOR:g}), t = " + ", ".join(f"{t:g} for {d}" for d, t in TOLERANCE.items()),
            "passed": self.passed,
            "worst": self.worst,
            "undefined": self.undefined,
            "refused": self.refused,
            "constant_inputs": self.constant,
            "fixed_dimensions": self.fixed,
        }


def check(
    reference: Reference,
    run: Run,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec] = (),
    *,
    seed: int = 0,
    right: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Parity:
    """Run a graph against its reference at `AT_LEAST` points or more.

    Args:
        reference: See `pytorch`.
        run: Runs the graph: numpy feeds by name to numpy outputs by name.
        inputs: The graph's inputs; the dimensions named there are the ones that vary.
        outputs: The graph's outputs; what their shapes say is held against what comes out.
        seed: Of the fresh values; the same seed gives the same points and values.
        right: Whether the graph takes masks that pad on the right alone, and no row throughout.
        progress: Told each point.

    Raises:
        ExportError: The reference itself takes fewer points than `AT_LEAST`.
    """
    found = Parity(reference.name)
    points = Points(reference, inputs, seed=seed, right=right)
    found.constant = points.constant()
    seen: dict[str, set[int]] = {name: set() for name in points.traced}
    for point in points:
        if point.again and len(found.points) >= AT_LEAST:
            break
        try:
            feeds = points.feeds(point)
            want = reference.run(feeds)
        except Exception:  # whatever it raises: it does not take this point, so it is none
            found.refused.append(str(point))
            continue
        progress(str(point))
        for name, size in point.dims:
            seen[name].add(size)
        _compare(found, point, feeds, want, run)
        _check_shapes(found, point, outputs, want)
    if len(found.points) < AT_LEAST:
        raise ExportError(
            f"{reference.name} ran at {len(found.points)} of the points to check at, "
            f"{AT_LEAST} are needed",
            hint="give larger example inputs, or dynamic shapes with Dim(min=, max=); refused: "
            + "; ".join(found.refused[:4]),
        )
    if blank := sorted(set(found.max_abs) - found.compared):
        found.fail(f"of {', '.join(blank)} it computes NaN alone, at every point")
    found.fixed = [f"{name}={min(s)}" for name, s in seen.items() if len(s) == 1]
    if found.fixed and reference.strict:
        found.fail(
            f"{', '.join(found.fixed)} may vary in the signature, but {reference.name} took no "
            "other size: nothing shows that the graph does"
        )
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


def _check_shapes(
    found: Parity, point: Point, outputs: Sequence[TensorSpec], want: Sequence[Array]
) -> None:
    for spec, wanted in zip(outputs, want, strict=False):
        for i, (dim, size) in enumerate(zip(spec.shape, wanted.shape, strict=False)):
            if evaluate(dim, dict(point.dims)) not in (None, size):
                found.misstated.add((spec.name, i))


def _difference(found: Parity, point: Point, name: str, have: Array, wanted: Array) -> float:
    want: Array = wanted.astype(np.float64)
    allowed = TOLERANCE.get(wanted.dtype.name, 0.0)
    if have.shape != want.shape:
        shapes = f"has shape {have.shape}, {found.reference} gives {want.shape}"
        found.fail(f"{name} at {point} {shapes}")
        return math.inf
    finite, infinite = np.isfinite(want), np.isinf(want)
    found.undefined += int(np.isnan(want).sum())
    if finite.any() or infinite.any() or not want.size:
        found.compared.add(name)
    if not want.size:
        return 0.0
    got = have.astype(np.float64)
    if (got[infinite] != want[infinite]).any():
        found.fail(f"{name} at {point} is not infinite where {found.reference} is")
    want = np.where(finite, want, 0.0)
    apart = np.where(finite, np.where(np.isfinite(got), np.abs(got - want), np.inf), 0.0)
    if allowed:
        limits = allowed * (np.abs(want) + _ordinary(want) + FLOOR)
    else:  # integers and booleans are equal, or they are not
        apart, limits = np.asarray(have != wanted, np.float64), np.full(want.shape, 0.5)
    at = np.unravel_index(int(np.argmax(apart / limits)), apart.shape)
    worst, limit = float(apart[at]), float(limits[at])
    if worst / limit > found.ratio:
        found.ratio = worst / limit
        position = ", ".join(str(int(i)) for i in at)
        found.worst = (
            f"output {name} of shape {tuple(have.shape)} at {point} differs by {worst:.3g} "
            f"(allowed {limit:.3g}) at position [{position}]: {float(have[at]):.6g} against "
            f"{float(want[at]):.6g}"
        )
    return float(apart.max())


def _ordinary(want: Array) -> float:
    """The size of an output's values, the largest of those that are not out of all proportion.

    One column of "minus infinity" (-1e9, -3.4e38) would let any error pass elsewhere, and next to
    probabilities of 1e-5 an error of 1e-5 is not small.
    """
    sizes = np.abs(want[want != 0])
    if not sizes.size:
        return 0.0
    return float(sizes[sizes <= 1e3 * np.median(sizes)].max())


def _round(value: float) -> float | str:
    return float(f"{value:.1e}") if math.isfinite(value) else str(value)
