"""Calibrators and 8-bit grids: known answers, brute force, and what must hold for any values."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnxpress.optimizers.precision.calibrators import (
    CALIBRATORS,
    SIDE,
    Entropy,
    MinMax,
    Mse,
    Percentile,
    quantization_of,
    quantize_weight,
)

NAMES = sorted(CALIBRATORS)
FLOATS = st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)
VALUES = arrays(np.float32, st.integers(0, 300), elements=FLOATS)


def calibrated(name: str, *batches: np.ndarray):
    calibrator = CALIBRATORS[name]()
    for batch in batches:
        calibrator.see(batch)
    return calibrator


def fake(x: np.ndarray, low: float, high: float, *, symmetric: bool = False) -> np.ndarray:
    """x after 8 bits, as QuantizeLinear and DequantizeLinear compute it."""
    dtype = "int8" if symmetric else "uint8"
    scale, zero = quantization_of(low, high, symmetric=symmetric, dtype=dtype)
    ends = (-127, 127) if symmetric else (0, 255)
    return (np.clip(np.rint(x / float(scale)) + int(zero), *ends) - int(zero)) * float(scale)


def error(x: np.ndarray, bounds: tuple[float, float], **how: bool) -> float:
    return float(np.mean((fake(x.astype(np.float64), *bounds, **how) - x) ** 2))


def gaussian(n: int = 100_000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def with_outliers(share: float, size: float) -> np.ndarray:
    x = gaussian()
    x[: int(share * x.size)] *= size
    return x


# What must hold for any values --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(VALUES, st.lists(st.integers(0, 300), max_size=5), st.randoms(use_true_random=False))
def test_batches_and_their_order_do_not_matter(name, values, cuts, random):
    parts = np.split(values, sorted(min(c, values.size) for c in cuts))
    random.shuffle(parts)
    for symmetric in (False, True):
        got = calibrated(name, *parts).range(symmetric=symmetric)
        assert got == calibrated(name, values).range(symmetric=symmetric)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("growth", [2, 100, 1e5, 1e9])
def test_batches_of_growing_size_are_one_histogram(name, growth):
    batches = [gaussian(20_000, seed) * np.float32(growth**seed) for seed in range(3)]
    for symmetric in (False, True):
        want = calibrated(name, *reversed(batches)).range(symmetric=symmetric)
        assert calibrated(name, *batches).range(symmetric=symmetric) == want


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(VALUES, st.booleans())
def test_a_range_holds_zero_and_nothing_beyond_the_values(name, values, symmetric):
    calibrator = calibrated(name, values)
    low, high = calibrator.range(symmetric=symmetric)
    most = max(np.abs(values), default=0)
    least = (-most, most) if symmetric else (min(values, default=0), max(values, default=0))
    assert min(0, least[0]) <= low <= 0 <= high <= max(0, least[1])
    assert not symmetric or low == -high
    assert calibrator.seen == values.size
    if values.any():
        assert low < high, "values that are there have a range"


@given(VALUES)
def test_min_max_is_just_that(values):
    want = (min(0.0, min(values, default=0)), max(0.0, max(values, default=0)))
    assert calibrated("minmax", values).range() == want


@pytest.mark.parametrize("name", NAMES)
def test_any_shape_any_float_or_nothing(name):
    x = gaussian(3000)
    want = calibrated(name, x).range()
    assert calibrated(name, x.reshape(3, 10, 100)[:, ::-1]).range() == want
    assert calibrated(name, x[:1500], np.zeros((0, 4), np.float32), x[1500:]).range() == want
    halves = calibrated(name, x.astype(np.float16)).range()
    np.testing.assert_allclose(halves, want, rtol=0.15)
    assert calibrated(name).range() == calibrated(name, np.zeros((2, 3))).range() == (0.0, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_values_that_are_no_numbers_are_counted_and_left_out(name):
    x = gaussian(3000)
    bad = np.concatenate([x[:1000], [np.nan, np.inf, -np.inf, 1e300], x[1000:]])
    calibrator = calibrated(name, bad, np.full(5, np.nan, np.float16))
    assert calibrator.nonfinite == 9
    assert calibrator.seen == 3000
    assert calibrator.range() == calibrated(name, x).range()


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_data(name):
    def size(calibrator) -> int:
        held = vars(calibrator).values()
        return sum(v.nbytes if isinstance(v, np.ndarray) else sys.getsizeof(v) for v in held)

    calibrator = calibrated(name, gaussian(100))
    before = size(calibrator)
    for seed in range(20):
        calibrator.see(gaussian(seed=seed) * 10.0 ** (seed - 10))
    assert size(calibrator) <= before + 64  # a longer integer
    assert before < 200_000


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [3.0, -0.7, 1e-30, 3e38])
def test_a_constant_tensor_is_exact(name, value):
    x = np.full(1000, value, np.float32)
    low, high = calibrated(name, x).range()
    got = fake(x, low, high)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, x, rtol=2e-3)


# Known answers ------------------------------------------------------------------------------------


def test_a_few_outliers_are_clipped_by_all_but_min_max():
    x = gaussian(1_000_000)
    x[:4] = 20, -20, 22, -25
    assert calibrated("minmax", x).range() == (-25, 22)
    for name, least, most in (("percentile", 3, 6), ("entropy", 3, 6), ("mse", 6, 12)):
        calibrator = calibrated(name, x)
        low, high = calibrator.range()
        assert least < -low < most, name
        assert least < high < most, name
        assert least < calibrator.range(symmetric=True)[1] < most, name


def test_many_outliers_are_kept_where_errors_are_squared():
    x = with_outliers(1e-3, 60)
    assert min(np.abs(calibrated("mse", x).range())) > 50
    assert max(np.abs(calibrated("entropy", x).range())) < 10


def test_uniform_values_are_not_clipped():
    x = np.random.default_rng(1).uniform(-2, 5, 200_000).astype(np.float32)
    for name in NAMES:
        np.testing.assert_allclose(calibrated(name, x).range(), (-2, 5), rtol=5e-3, err_msg=name)


def test_one_side_is_clipped_without_the_other():
    x = np.abs(gaussian(1_000_000)) * 0.1
    x[0], x[1:500_000] = 5.0, -x[1:500_000]
    for name in ("entropy", "mse"):
        low, high = calibrated(name, x).range()
        assert high < 3, name
        assert low < -0.25, name


def test_percentile_cuts_its_share_at_either_end():
    x = np.random.default_rng(2).permutation(np.linspace(-1, 1, 100_001)).astype(np.float32)
    calibrator = Percentile(90)
    calibrator.see(x)
    np.testing.assert_allclose(calibrator.range(), (-0.9, 0.9), atol=1e-3)
    np.testing.assert_allclose(calibrator.range(symmetric=True), (-0.9, 0.9), atol=1e-3)
    calibrator.see(np.abs(x))
    np.testing.assert_allclose(calibrator.range()[1], 1 - 0.05 * 4 / 3, atol=1e-3)
    for percent in (50, 101, math.nan):
        with pytest.raises(ValueError, match="percent"):
            Percentile(percent)


def test_zeros_of_a_relu_do_not_narrow_the_range():
    x = np.maximum(gaussian(), 0)
    for name in ("entropy", "mse"):
        assert calibrated(name, x).range() == calibrated(name, x[x > 0]).range(), name


LAPLACE = np.random.default_rng(3).laplace(size=50_000).astype(np.float32)
SAMPLES = {
    "gaussian": gaussian(50_000),
    "laplace": LAPLACE,
    "outliers": with_outliers(1e-4, 60)[:50_000],
    "relu": np.maximum(LAPLACE, 0),
    "skewed": np.where(LAPLACE > 0, LAPLACE * 8, LAPLACE / 8),
    "shifted": gaussian(50_000) + 3,
}


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_as_good_as_trying_all_ranges(kind, symmetric):
    x = SAMPLES[kind]
    ratios = np.geomspace(0.03, 1, 48)
    if symmetric:
        tried = [(-r * abs(x).max(), r * abs(x).max()) for r in ratios]
    else:
        lows = {min(0.0, float(x.min()) * r) for r in ratios[::2]}
        tried = [(low, float(x.max()) * r) for low in lows for r in ratios[::2]]
    some = x[:: 1 if symmetric else 10]  # the best of so many, found on fewer, judged on all
    errors = [error(some, bounds, symmetric=symmetric) for bounds in tried]
    best = min(error(x, tried[i], symmetric=symmetric) for i in np.argsort(errors)[:5])
    found = calibrated("mse", x).range(symmetric=symmetric)
    assert error(x, found, symmetric=symmetric) <= 1.02 * best


def test_entropy_finds_what_brute_force_over_raw_values_finds():
    x = np.abs(with_outliers(1e-3, 10))
    edges = np.arange(SIDE + 1) * (2.0 ** math.ceil(math.log2(x.max())) / SIDE)
    counts = np.histogram(x, edges)[0].astype(float)

    def divergence(high: float) -> float:
        """As the slides have it, one loop a level."""
        step = high / 255
        level = np.rint((edges[1:] + edges[:-1]) / 2 / step).astype(int)
        inside = level <= 255
        p = np.where(inside, counts, 0)
        p[np.flatnonzero(inside & (counts > 0))[-1]] += counts[~inside].sum()
        q = np.zeros_like(counts)
        for n in range(256):
            mine = (level == n) & (counts > 0)
            q[mine] = counts[mine].mean() if mine.any() else 0
        p, q = p / p.sum(), q / q.sum()
        return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))

    best = min(divergence(h) for h in np.geomspace(0.05, 1, 60) * x.max())
    assert divergence(calibrated("entropy", x).range()[1]) <= best * 1.05 + 1e-6


def test_classes_and_names():
    assert [CALIBRATORS[n] for n in ("minmax", "percentile", "entropy", "mse")] == [
        MinMax, Percentile, Entropy, Mse
    ]  # fmt: skip
    assert Percentile().percent == 99.99


# Scale and zero point -----------------------------------------------------------------------------

BOUNDS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(BOUNDS, BOUNDS, st.booleans(), st.sampled_from(["uint8", "int8"]))
def test_every_range_has_a_usable_grid(a, b, symmetric, dtype):
    low, high = min(a, b), max(a, b)
    scale, zero = quantization_of(low, high, symmetric=symmetric, dtype=dtype)
    assert scale.dtype == np.float32
    assert zero.dtype == np.dtype(dtype)
    assert np.isfinite(scale)
    assert scale >= np.finfo(np.float32).tiny
    first, last = (0, 255) if dtype == "uint8" else (-128, 127)
    first += symmetric
    assert first <= zero <= last
    ends = (np.array([first, last]) - int(zero)).astype(np.float32) * scale
    assert np.isfinite(ends).all(), "an integer stands for infinity"
    if symmetric:
        assert zero == (128 if dtype == "uint8" else 0)
    reaches = max(-low, high) if symmetric else max(high, 0) - min(low, 0)
    if reaches < 3e38:  # where float32 does not end
        assert ends[0] <= min(low, 0) + 0.51 * scale
        assert ends[1] >= max(high, 0) - 0.51 * scale


def test_known_grids():
    assert quantization_of(0.0, 0.0, symmetric=False, dtype="uint8") == (1.0, 0)
    assert quantization_of(0.0, 0.0, symmetric=True, dtype="int8") == (1.0, 0)
    assert quantization_of(2.0, 5.1, symmetric=False, dtype="uint8") == (np.float32(0.02), 0)
    assert quantization_of(-5.1, -2.0, symmetric=False, dtype="uint8") == (np.float32(0.02), 255)
    assert quantization_of(-1.27, 3.83, symmetric=False, dtype="int8") == (np.float32(0.02), -64)
    assert quantization_of(-1.27, 0.5, symmetric=True, dtype="int8") == (np.float32(0.01), 0)
    tiny = np.finfo(np.float32).tiny
    assert quantization_of(0.0, 1e-38, symmetric=False, dtype="uint8")[0] == tiny
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=str(bad)):
            quantization_of(0.0, bad, symmetric=False, dtype="uint8")


# Weights ------------------------------------------------------------------------------------------


def test_each_column_has_its_scale():
    w = gaussian(60).reshape(12, 5) * np.float32([1, 100, 0, 1e-3, 1e-44])
    q, scales = quantize_weight(w, axis=1)
    assert q.dtype == np.int8
    assert scales.dtype == np.float32
    assert scales.shape == (5,)
    assert scales[2] == 1.0
    assert (scales >= np.finfo(np.float32).tiny).all()
    assert np.abs(q[:, [0, 1, 3]]).max(0).tolist() == [127, 127, 127]
    assert (np.abs(q * scales - w) <= scales * 0.501).all()
    turned, same = quantize_weight(w.T, axis=0)
    assert (q == turned.T).all()
    assert (same == scales).all()
    assert (quantize_weight(w.T, axis=-2)[0] == turned).all()


def test_clipping_columns_errs_less_and_leaves_good_columns_alone():
    w = gaussian(200_000).reshape(100_000, 2).copy()
    w[0, 0], w[:, 1] = 8, np.linspace(-1, 1, 100_000)
    plain, clipped = quantize_weight(w, axis=1), quantize_weight(w, axis=1, mse=True)
    errors = [((q * s - w) ** 2).sum(0) for q, s in (plain, clipped)]
    assert (errors[1] <= errors[0]).all()
    assert clipped[1][0] < plain[1][0]
    assert clipped[1][1] == plain[1][1]


def test_weights_that_hold_no_numbers_or_nothing():
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize_weight(np.array([[1.0, bad]]), axis=1)
    q, scales = quantize_weight(np.zeros((0, 3), np.float32), axis=1, mse=True)
    assert q.shape == (0, 3)
    assert scales.tolist() == [1, 1, 1]
