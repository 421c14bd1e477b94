"""From the values of a tensor to its range, and from a range to scale and zero point.

A calibrator sees all calibration data once and keeps a fixed number of counts, so that its memory
does not grow with the data. Every range holds 0: kernels pad with it, masks and activations give
it by the million, and only a grid that has it as one of its points has it without an error; the
zero point would lie outside of its 8 bits otherwise.

    minmax        all values: nothing is clipped
    percentile    all but a share of the values at either end
    mse           the clipping that makes the mean squared error of 8 bits least
    entropy       the clipping that loses least information (KL divergence)

Clipping pays where few values are far away and mean nothing. In Transformers those that are far
away carry the signal: measure, do not assume (see the gate).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = np.ndarray[Any, Any]
Floats = npt.NDArray[np.float64]
Range = tuple[float, float]
Grid = Literal["uint8", "int8"]

CHUNK = 1 << 16  # values at a time: what is computed of them stays in the cache
BITS = 12
SIDE = 1 << BITS  # bins on either side of 0
LOWEST = -100  # exponent of the smallest histogram: 2**-100 is nothing to float32
TINY = float(np.finfo(np.float32).tiny)  # below it floats are denormal: slow, or 0
LARGEST = float(np.finfo(np.float32).max)


class Calibrator(ABC):
    """Sees the values of one tensor, batch by batch, and says which range to quantize.

    Attributes:
        seen: How many finite values it saw.
        nonfinite: How many values were NaN or infinite. They are left out of the range: whoever
            calibrates knows the tensor's name, and refuses.
        low: The lowest value, or 0.
        high: The highest value, or 0.
    """

    def __init__(self) -> None:
        self.seen, self.nonfinite = 0, 0
        self.low, self.high = 0.0, 0.0

    def see(self, array: Array) -> None:
        """Count the values of one batch: floats in any shape, or none."""
        flat = np.asarray(array).reshape(-1)
        for start in range(0, flat.size, CHUNK):
            with np.errstate(over="ignore"):  # what float32 cannot hold counts as infinite
                part = flat[start : start + CHUNK].astype(np.float32, copy=False)
            low, high = float(part.min()), float(part.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                finite = part[np.isfinite(part)]
                self.nonfinite += part.size - finite.size
                if not finite.size:
                    continue
                part, low, high = finite, float(finite.min()), float(finite.max())
            self.seen += part.size
            self.low, self.high = min(self.low, low), max(self.high, high)
            self._count(part)

    @abstractmethod
    def _count(self, part: npt.NDArray[np.float32]) -> None:
        """Take in finite values; `low` and `high` know them already."""

    @abstractmethod
    def range(self, *, symmetric: bool = False) -> Range:
        """The range to quantize, low <= 0 <= high; (0, 0) where nothing but zeros was seen.

        Args:
            symmetric: Whether the grid will be one without zero point. Then low is -high, and what
                is searched is searched on that grid.
        """


class MinMax(Calibrator):
    """From the lowest value to the highest: nothing is clipped."""

    def _count(self, part: npt.NDArray[np.float32]) -> None:
        pass

    def range(self, *, symmetric: bool = False) -> Range:
        """See `Calibrator.range`."""
        return _mirrored(self.low, self.high) if symmetric else (self.low, self.high)


class Histogram(Calibrator):
    """A calibrator that needs to know how often values occur.

    The bins are equal, their edges are multiples of a power of two, and the smallest power is
    taken that reaches all values seen. A value beyond them doubles the width, and each two bins
    become one; no second pass over the data is needed. Since edges of wide bins are edges of the
    narrow ones too, the result is the same in whatever order and in whatever batches the values
    come, but for those that underflow when they are divided by the width.
    """

    def __init__(self) -> None:
        super().__init__()
        self._exponent = LOWEST  # the bins reach from -2**exponent to 2**exponent
        self._counts = np.zeros(2 * SIDE, np.int64)
        self._zeros = 0

    @property
    def _width(self) -> float:
        return math.ldexp(1.0, self._exponent - BITS)

    def _count(self, part: npt.NDArray[np.float32]) -> None:
        exponent = math.frexp(max(-self.low, self.high))[1]
        if exponent > self._exponent:
            # Beyond BITS + 1 doublings nothing is left but the signs.
            index = np.arange(-SIDE, SIDE) >> min(exponent - self._exponent, BITS + 1)
            counts = np.zeros_like(self._counts)
            np.add.at(counts, index + SIDE, self._counts)
            self._counts, self._exponent = counts, exponent
        bins = np.floor(part * np.float32(1 / self._width)).astype(np.int32)
        bins += SIDE
        self._counts += np.bincount(bins, minlength=2 * SIDE)
        self._zeros += part.size - int(np.count_nonzero(part))

    def _density(self) -> tuple[Floats, Floats]:
        """The lower edges of the bins that are used, and how many values these hold but zeros.

        A zero is on every grid, so that no clipping and no scale moves it, while spread over its
        bin the zeros of a ReLU or of padding would outweigh all other values.
        """
        counts = self._counts.copy()
        counts[SIDE] -= self._zeros
        used = np.flatnonzero(counts)
        return (used - SIDE).astype(np.float64) * self._width, counts[used].astype(np.float64)


class Percentile(Histogram):
    """All but a share of the values, half of it cut at either end (zeros count as values).

    Args:
        percent: The percentage of values that are kept: 99.99 cuts one in 20,000 at either end.
    """

    def __init__(self, percent: float = 99.99) -> None:
        super().__init__()
        if not 50 < percent <= 100:
            raise ValueError(f"percent is {percent}, and must be above 50 and at most 100")
        self.percent = percent

    def range(self, *, symmetric: bool = False) -> Range:
        """See `Calibrator.range`."""
        if not self.seen:
            return 0.0, 0.0
        low, high = _mirrored(self.low, self.high)
        if symmetric:
            magnitudes = self._counts[SIDE:] + self._counts[SIDE - 1 :: -1]
            high = min(high, self._width * _quantile(magnitudes, self.percent / 100))
            return -high, high
        tail = (1 - self.percent / 100) / 2
        high = self._width * (_quantile(self._counts, 1 - tail) - SIDE)
        low = self._width * (_quantile(self._counts, tail) - SIDE)
        return min(0.0, max(low, self.low)), max(0.0, min(high, self.high))


def _quantile(counts: npt.NDArray[np.int64], share: float) -> float:
    """Below which (fractional) bin this share of all values lies."""
    total = np.cumsum(counts)
    wanted = share * float(total[-1])
    k = int(np.searchsorted(total, wanted))
    if not counts[k]:  # a share of 0, and the first bins are empty
        return float(np.flatnonzero(counts)[0])
    return k + 1 - float(total[k] - wanted) / float(counts[k])


class Search(Histogram):
    """A calibrator that tries ranges, each side by itself, and keeps the one that costs least."""

    COARSE = 2.0 ** (-np.arange(33) / 4)  # of the whole side; from 1 down, so that ties keep more
    FINE = 2.0 ** (-np.arange(-3, 4) / 16)  # around the best of those

    @abstractmethod
    def _cost(self, lower: Floats, counts: Floats, grid: _Levels) -> float:
        """What is lost where the values counted, from `lower` edges up, are rounded to `grid`."""

    def range(self, *, symmetric: bool = False) -> Range:
        """See `Calibrator.range`."""
        lower, counts = self._density()
        if not counts.size:
            return self.low, self.high

        def along(line: Callable[[float], Range]) -> Range:
            best = 1.0
            for steps in (self.COARSE, self.FINE):
                ratios = [r for r in (steps * best).tolist() if r <= 1]
                costs = [
                    self._cost(lower, counts, _Levels(*line(r), symmetric=symmetric))
                    for r in ratios
                ]
                best = ratios[int(np.argmin(costs))]
            return line(best)

        widest = _mirrored(self.low, self.high) if symmetric else (self.low, self.high)
        # Both sides at once, or an outlier on one side hides what clipping the other one gains.
        low, high = along(lambda r: (widest[0] * r, widest[1] * r))
        if not symmetric and self.low < 0 < self.high:
            for _ in range(2):
                low, high = along(lambda r, high=high: (widest[0] * r, high))  # type: ignore[misc]
                low, high = along(lambda r, low=low: (low, widest[1] * r))  # type: ignore[misc]
        return low, high


class Mse(Search):
    """The range with the least mean squared error after 8 bits, as the histogram expects it."""

    def _cost(self, lower: Floats, counts: Floats, grid: _Levels) -> float:
        # With values spread evenly over a bin, the error is an integral that has a closed form:
        # 1/12 for every whole step up to the level, and a cube from there on, clipped or not.
        steps = np.stack([lower, lower + self._width]) / grid.scale
        level = np.clip(np.rint(steps), grid.first, grid.last)
        rest = steps - level
        below, above = level / 12 + rest * rest * rest / 3
        return float(grid.scale**3 * (counts @ (above - below)))


class Entropy(Search):
    """The range whose 8 bits lose the least information (Migacz, GTC 2017, S7310).

    The values in range, with those beyond it at its ends (P), against the same at the resolution
    of the levels, without those beyond (Q): the range with the least KL(P || Q). The original
    knows a symmetric grid of magnitudes; here the levels are those that will be used, and zeros,
    which are on each grid, do not count.
    """

    def _cost(self, lower: Floats, counts: Floats, grid: _Levels) -> float:
        level = np.rint((lower + self._width / 2) / grid.scale).astype(np.int64)
        first, end = np.searchsorted(level, [grid.first, grid.last + 1])
        if first == end:
            return math.inf
        level, inside = level[first:end] - level[first], counts[first:end]
        p = inside.copy()
        p[0] += counts[:first].sum()
        p[-1] += counts[end:].sum()
        mass, bins = np.bincount(level, inside), np.bincount(level)
        q = (mass / np.maximum(bins, 1))[level]
        p, q = p / p.sum(), q / q.sum()
        return float(p @ np.log(p / q))


CALIBRATORS: dict[str, Callable[[], Calibrator]] = {
    "minmax": MinMax,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": Mse,
}


def quantization_of(
    low: float, high: float, *, symmetric: bool, dtype: Grid
) -> tuple[np.float32, np.uint8 | np.int8]:
    """Scale and zero point of 8 bits for a range: value = (integer - zero_point) * scale.

    Args:
        low: The lowest value; the range is widened to hold 0.
        high: The highest value; likewise.
        symmetric: No zero point to speak of (0, or 128 of uint8), and 127 levels on either side.
        dtype: uint8 or int8.

    Returns:
        The scale, never 0, denormal, nor so large that an integer stands for infinity; 1 where
        the range is empty. The zero point, of the dtype asked.

    Raises:
        ValueError: A bound is NaN or infinite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"the range to quantize is {low} to {high}")
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    bottom = 0 if dtype == "uint8" else -128
    kind = np.uint8 if dtype == "uint8" else np.int8
    if symmetric:
        low, high = _mirrored(low, high)
        scale, zero, reach = high / 127, bottom + 128, 127
    else:
        scale = (high - low) / 255
        from_low = round(-low / scale) if scale >= TINY else 0
        zero, reach = bottom + from_low, max(from_low, 255 - from_low)
    if low == high:
        return np.float32(1.0), kind(bottom + 128 if symmetric else bottom)
    if scale < TINY:  # all of it rounds to 0, or nearly
        return np.float32(TINY), kind(zero)
    # The ends of the grid may lie half a step beyond the range, and float32 ends there.
    largest = np.nextafter(np.float32(LARGEST / reach), np.float32(0))
    return min(np.float32(scale), largest), kind(zero)


def quantize_weight(
    w: Array, *, axis: int, mse: bool = False
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """A weight in int8 without zero point, one scale for each index of `axis`.

    Args:
        w: Floats, as a rule (K, N): inputs, outputs.
        axis: The axis that keeps scales of its own: 1 of (K, N) for one a column.
        mse: Clip each channel where that makes its squared error less.

    Returns:
        Integers from -127 to 127 in the shape of `w`, and the scales (N,); the scale of a channel
        of zeros is 1.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    w = np.asarray(w, np.float32)
    others = tuple(i for i in range(w.ndim) if i != axis % w.ndim)
    largest = np.maximum(
        w.max(axis=others, keepdims=True, initial=0.0),
        -w.min(axis=others, keepdims=True, initial=0.0),
    )
    if not np.isfinite(largest).all():
        raise ValueError("the weight has values that are NaN or infinite")
    scales = np.where(largest == 0, 1, np.maximum(largest / 127, TINY)).astype(np.float32)
    if mse:
        scales = _clipped(w, scales, others)
    return _rounded(w, scales).astype(np.int8), scales.reshape(-1)


def _clipped(w: Array, scales: Array, others: tuple[int, ...]) -> Array:
    """The scales, from the given ones to two fifths of them, that err least."""
    best, least = scales, None
    for ratio in np.linspace(1.0, 0.4, 31, dtype=np.float32):
        tried = np.maximum(scales * ratio, np.float32(TINY))
        error = _rounded(w, tried)
        error *= tried
        error -= w
        cost = np.square(error, out=error).sum(axis=others, keepdims=True)
        if least is None:
            least = cost
        else:
            best, least = np.where(cost < least, tried, best), np.minimum(cost, least)
    return best


def _rounded(w: Array, scales: Array) -> Array:
    levels = w / scales
    return np.clip(np.rint(levels, out=levels), -127, 127, out=levels)


class _Levels:
    """The grid of a range, counted in steps from 0."""

    def __init__(self, low: float, high: float, *, symmetric: bool) -> None:
        scale, zero = quantization_of(
            low, high, symmetric=symmetric, dtype="int8" if symmetric else "uint8"
        )
        self.scale = float(scale)
        self.first = -127 if symmetric else -int(zero)
        self.last = 127 if symmetric else 255 - int(zero)


def _mirrored(low: float, high: float) -> Range:
    most = max(-low, high)
    return -most, most
