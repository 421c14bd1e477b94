"""What calibration data says about heads, columns and weights, in memory that does not grow.

Whoever runs the graph gives out the values that `taps` names, and shows them batch by batch:

    importance = Importance(model)
    for arrays in runs: importance.see(arrays, mask)
    PruneHeads(0.25, importance.scores())(model)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...errors import InputError, UsageError
from .channels import array_of
from .mask_weights import maskable
from .prune_feed_forward import read_columns
from .prune_heads import read_heads
from .removal import Numbers, Score, sites

Arrays = Mapping[str, npt.NDArray[np.generic]]
Mask = npt.NDArray[np.generic] | Mapping[str, npt.NDArray[np.generic]] | None


class Importance:
    """How much each head and each feed-forward column matters.

    A unit u with channels a_u gives a_u @ W_u to the sum that its MatMul computes. When it goes
    its mean is made up for by the bias, so what is lost is how far it strays from its mean: the
    score is sqrt(E |(a_u - E a_u) @ W_u|^2), for a column std(a_j) * |W_j|. This is the fluctuation
    metric of FLAP (An et al. 2024, arXiv:2312.11983), with all channels of a head taken together.

    Attributes:
        notes: Attention and feed-forward blocks that cannot be pruned, and why.
    """

    def __init__(self, model: ir.Model) -> None:
        """Find what can be pruned; the weights are read now, and the graph is not kept."""
        self._moments: dict[str, _Moments] = {}
        self._products: dict[str, Numbers] = {}
        notes: list[str] = []
        for read in (read_heads, read_columns):
            found, why = sites(model, read)
            notes += why
            for _, site in found:
                span = site.cut.slices[site.out, 1]
                rows = array_of(site.out.inputs[1]).astype(np.float32)
                blocks = rows.reshape(span.units, span.width, -1)
                self._products[site.name] = (blocks @ blocks.transpose(0, 2, 1)).astype(np.float64)
                self._moments[site.name] = _Moments(span.units, span.width)
        self.notes = tuple(notes)

    @property
    def taps(self) -> list[str]:
        """The values to give out, (..., channels) each."""
        return list(self._moments)

    def see(self, arrays: Arrays, mask: Mask = None) -> None:
        """Take in one batch.

        Args:
            arrays: The values that `taps` names; others are ignored.
            mask: What counts, of the values' shape without channels, (B, S): 0 or False is
                padding. A mapping has one for each tap, where not all have the same.

        Raises:
            InputError: A value is missing, or a mask does not fit.
        """
        for name, moments in self._moments.items():
            moments.see(_rows(name, arrays, mask))

    def scores(self) -> dict[str, Score]:
        """Score and mean, by tap.

        Raises:
            UsageError: Nothing was seen.
        """
        found = {}
        for name, moments in self._moments.items():
            _check_seen(name, moments.count)
            lost = np.einsum("uij,uij->u", moments.squares, self._products[name]) / moments.count
            # Rounding can leave a hair below zero where a unit never changes.
            found[name] = Score(np.sqrt(np.maximum(lost, 0.0)), moments.mean.copy())
        return found


class InputNorms:
    """The size of each channel that enters a MatMul, for `MaskWeights`."""

    def __init__(self, model: ir.Model) -> None:
        """Find the MatMuls whose weights can be masked."""
        found, _ = maskable(model)
        self._sums = {str(node.inputs[0].name): (0, np.zeros(1)) for node in found}  # type: ignore[union-attr]

    @property
    def taps(self) -> list[str]:
        """The values to give out, (..., K) each."""
        return list(self._sums)

    def see(self, arrays: Arrays, mask: Mask = None) -> None:
        """Take in one batch, as `Importance.see` does."""
        for name, (count, total) in self._sums.items():
            rows = _rows(name, arrays, mask)
            self._sums[name] = count + len(rows), total + np.square(rows).sum(0)

    def norms(self) -> dict[str, Numbers]:
        """Root mean square of each channel, (K,), by tap.

        Raises:
            UsageError: Nothing was seen.
        """
        for name, (count, _) in self._sums.items():
            _check_seen(name, count)
        return {name: np.sqrt(total / count) for name, (count, total) in self._sums.items()}


class _Moments:
    """Mean of channels, and the sum of products of two of a unit around it, updated by batch.

    Batches are merged as Chan et al. 1983 do, for a mean far from zero would eat the digits of a
    plain sum of squares.
    """

    def __init__(self, units: int, width: int) -> None:
        self.count = 0
        self.mean: Numbers = np.zeros(units * width)
        self.squares: Numbers = np.zeros((units, width, width))

    def see(self, rows: Numbers) -> None:
        if not len(rows):
            return
        units, width, _ = self.squares.shape
        mean = rows.mean(0)
        apart = (rows - mean).reshape(len(rows), units, width).transpose(1, 2, 0)
        step = (mean - self.mean).reshape(units, width)
        total = self.count + len(rows)
        self.squares += apart @ apart.transpose(0, 2, 1)
        self.squares += step[:, :, None] * step[:, None, :] * (self.count * len(rows) / total)
        self.mean += (mean - self.mean) * (len(rows) / total)
        self.count = total


def _rows(name: str, arrays: Arrays, mask: Mask) -> Numbers:
    """What counts of a value, (n, channels)."""
    if name not in arrays:
        raise InputError(f"there is no value {name!r}", hint="give out all that `taps` names")
    array = np.asarray(arrays[name], np.float64)
    chosen = mask.get(name) if isinstance(mask, Mapping) else mask
    if chosen is None:
        return array.reshape(-1, array.shape[-1])
    if chosen.shape != array.shape[:-1]:
        raise InputError(
            f"a mask of shape {chosen.shape} does not fit {name!r} of shape {array.shape}",
            hint="give each tap its own mask, by name",
        )
    rows: Numbers = array[chosen.astype(bool)]
    return rows


def _check_seen(name: str, count: int) -> None:
    if not count:
        raise UsageError(
            f"no calibration data was seen for {name!r}", hint="show it at least one token"
        )
