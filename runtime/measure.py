"""Timing that a decision can rest on, and feeds to time with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep

import numpy as np

from ..artifact import TensorSpec, evaluate
from ..errors import InputError
from .signature import Array

PAUSE = 0.05  # seconds between contestants


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the rounds: the median, the best and the worst round."""

    median: float
    min: float
    max: float
    calls: int


def time_runs(
    fns: Mapping[str, Callable[[], object]], *, rounds: int = 9, min_seconds: float = 0.05
) -> dict[str, Timing]:
    """Time functions against each other: all of them in every round, in turn.

    What slows the machine for a while slows every contestant. Each is warmed up first, and
    called as often in a round as it takes to fill `min_seconds`. Differences below some 15% are
    ties on a machine that is shared.

    Args:
        fns: The contestants by name.
        rounds: Rounds; odd, so that the median was measured.
        min_seconds: Least duration of one contestant in one round.

    Raises:
        InputError: `rounds` is below 1.
    """
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, not {rounds}")
    calls, times = {}, {name: list[float]() for name in fns}
    for name, fn in fns.items():
        fn()  # the first call allocates
        calls[name] = max(1, int(min_seconds / max(_seconds(fn, 1), 1e-9)))
        if calls[name] > 1:  # one call says little about a short one
            calls[name] = max(1, int(min_seconds / _seconds(fn, min(calls[name], 100))))
    names = list(fns)
    for r in range(rounds):
        # Every round starts with another one: whoever follows a heavy one is not always the same.
        for name in names[r % len(names) :] + names[: r % len(names)] if names else []:
            # Thread pools spin for a while after their last call, and would take the cores of
            # whoever comes next; and its own threads wake up on its first call.
            sleep(PAUSE)
            fns[name]()
            times[name].append(_seconds(fns[name], calls[name]) * 1e3)
    return {n: Timing(median(t), min(t), max(t), calls[n] * rounds) for n, t in times.items()}


def _seconds(fn: Callable[[], object], calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        fn()
    return (perf_counter() - start) / calls


def random_feeds(
    inputs: Sequence[TensorSpec],
    dims: Mapping[str, int],
    *,
    seed: int = 0,
    high: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Feeds of the right names, dtypes and shapes, the same for the same seed.

    Masks are ones, position ids count up, floats are normal, and other integers lie in [0, high),
    which is 100 where `high` does not give another bound for the input: ids of any vocabulary.

    Args:
        inputs: The signature.
        dims: The size of each name in it. Expressions are evaluated.
        seed: Of the random numbers.
        high: Bounds of integer inputs by input name.

    Raises:
        InputError: A dimension is not given, or the dtype cannot be made up.
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for spec in inputs:
        sizes = [evaluate(d, dims) for d in spec.shape]
        shape = tuple(n for n in sizes if n is not None)
        if len(shape) != spec.rank:
            unknown = [d for d, n in zip(spec.shape, sizes, strict=True) if n is None]
            raise InputError(
                f"the input {spec.name!r} has dimensions whose size is not given: {unknown}",
                where=str(spec),
                hint=f"dims={{{str(unknown[0])!r}: 8, ...}}",
            )
        kind = (
            "O"
            if spec.dtype in ("object", "bfloat16", "tensor(bfloat16)")
            else np.dtype(spec.dtype).kind
        )
        bound = (high or {}).get(spec.name, 2 if spec.name == "token_type_ids" else 100)
        value: Array
        if "mask" in spec.name:
            value = np.ones(shape)
        elif spec.name == "position_ids" and shape:
            past = dims.get("past_sequence", 0)
            value = np.broadcast_to(np.arange(shape[-1]) + past, shape)
        elif kind == "f":
            value = rng.standard_normal(shape)
        elif kind in "iu":
            value = rng.integers(0, min(bound, np.iinfo(spec.dtype).max), shape)
        elif kind == "b":
            value = rng.integers(0, 2, shape)
        else:
            raise InputError(f"no values can be made up for {spec.dtype}", where=str(spec))
        feeds[spec.name] = np.ascontiguousarray(value, spec.dtype).reshape(shape)
    return feeds
