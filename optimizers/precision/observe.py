"""What the activations of a graph look like on calibration data, in memory that does not grow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...errors import InputError
from .calibrators import Calibrator

Array = npt.NDArray[np.float32]
Feeds = Mapping[str, npt.NDArray[np.generic]]
Run = Callable[[ir.Model, Iterable[Feeds]], Iterator[Mapping[str, npt.NDArray[np.generic]]]]
"""Opens a graph as it is and runs it on each of the feeds, lazily; the outputs by name."""
Real = Callable[[Feeds], npt.NDArray[np.bool_] | None]
"""Which (batch, sequence) places of some feeds hold a token; None where all of them do."""

ROWS = 1024  # of each activation are kept, drawn evenly from all that pass by
WIDEST = 4096  # channels of which the products are kept too: as many squared floats


@dataclass
class Seen:
    """One activation of shape (..., K), over all of the calibration data.

    Attributes:
        calibrator: Has seen every value.
        low: Least value of each channel, (K,).
        high: Greatest value of each channel, (K,).
        rows: A sample, (at most ROWS, K): each row that passed by was as likely to stay.
        gram: x^T x over all rows, (K, K); None where it was not asked for, or K is above WIDEST.
        count: Rows seen.
    """

    calibrator: Calibrator
    low: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    high: Array = field(default_factory=lambda: np.zeros(0, np.float32))
    rows: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    gram: Array | None = None
    count: int = 0
    wants_gram: bool = False
    _keys: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    _rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def see(self, rows: Array) -> None:
        """Take in rows, (n, K)."""
        if not len(rows):
            return
        self.calibrator.see(rows)
        low, high = rows.min(0), rows.max(0)
        if self.count:
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        else:
            self.low, self.high, self.rows = low, high, rows[:0]
        if self.wants_gram and rows.shape[1] <= WIDEST:
            product = rows.T @ rows
            self.gram = product if self.gram is None else self.gram + product
        self.count += len(rows)
        # The rows with the least of so many random keys: a sample without a second pass.
        keys = np.concatenate([self._keys, self._rng.random(len(rows))])
        every = np.concatenate([self.rows, rows])
        best = np.sort(np.argsort(keys, kind="stable")[:ROWS])
        self._keys, self.rows = keys[best], every[best]


def observe(
    model: ir.Model,
    values: Sequence[str],
    run: Run,
    batches: Iterable[Feeds],
    calibrator: Callable[[], Calibrator],
    *,
    real: Real = lambda _: None,
    gram: bool = False,
) -> dict[str, Seen]:
    """Run `model` once over calibration data, and look at some of its activations.

    Args:
        model: The graph; it is left as it is.
        values: Names of the activations, float32 of rank 2 or more.
        run: Runs a graph.
        batches: The data.
        calibrator: Makes the calibrator of one activation.
        real: Leaves out padding, whose activations matter to no one.
        gram: Whether to sum up the products of channels too.

    Returns:
        What was seen, by name; its count is 0 where all of an activation is padding, or empty.

    Raises:
        InputError: An activation holds NaN or infinity; the message names it. Or there is no data.
    """
    seen = {name: Seen(calibrator(), wants_gram=gram) for name in values}
    outputs, runs = with_outputs(model, values), 0
    for feeds, found in _both(batches, lambda given: run(outputs, given)):
        mask = real(feeds)
        runs += 1
        for name, look in seen.items():
            array = np.asarray(found[name], np.float32)
            if mask is not None and array.shape[:-1] == mask.shape:
                array = array[mask]
            rows = array.reshape(-1, array.shape[-1])
            if not np.isfinite(rows).all():
                raise InputError(
                    f"the activation {name!r} holds NaN or infinity on the calibration data",
                    hint="look for the example that makes it: int8 has no number for it",
                )
            look.see(rows)
    if not runs:
        raise InputError("there is no calibration data", hint="one example is the least")
    return seen


def _both(
    data: Iterable[Feeds],
    run: Callable[[Iterable[Feeds]], Iterator[Mapping[str, npt.NDArray[np.generic]]]],
) -> Iterator[tuple[Feeds, Mapping[str, npt.NDArray[np.generic]]]]:
    """Each of the feeds with what came of it, without holding them all."""
    given: deque[Feeds] = deque()  # a run may read ahead

    def tell() -> Iterator[Feeds]:
        for feeds in data:
            given.append(feeds)
            yield feeds

    for outputs in run(tell()):
        yield given.popleft(), outputs


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of the graph (its weights shared) whose outputs are these values."""
    copy = model.clone()
    found = {v.name: v for node in copy.graph for v in node.outputs}
    found |= {v.name: v for v in copy.graph.inputs}
    copy.graph.outputs[:] = [found[name] for name in names]
    return copy
