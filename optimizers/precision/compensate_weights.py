"""Round a weight so that the errors of its elements cancel on the data that it will see."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DAMP = 0.01  # of the mean of the diagonal, as in the paper: channels that move together
BLOCK = 128


def compensate(
    w: npt.NDArray[np.float32], gram: npt.NDArray[np.float32], scales: npt.NDArray[np.float32]
) -> npt.NDArray[np.int8]:
    """int8 weights that keep x W, not W: each row takes on the error of the rows before it.

    GPTQ (Frantar et al. 2022, arXiv:2210.17323), rows in the order of falling activation, at the
    scales given. Where rounding to nearest errs by half a step a weight, this errs by as little
    as the correlation of the channels lets it; the graph costs the same.

    Args:
        w: The weight, (K, N).
        gram: X^T X over the calibration data, (K, K).
        scales: Step of each column, (N,).

    Returns:
        (K, N), within [-127, 127].
    """
    k, n = w.shape
    h = gram.astype(np.float64)
    diagonal = np.diag(h).copy()
    order = np.argsort(-diagonal, kind="stable")
    h = h[np.ix_(order, order)]
    # A channel that was never seen has no say, and must not make the matrix singular.
    h[np.diag_indices(k)] += max(DAMP * float(diagonal.mean()), 1e-12)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    rest = w[order].astype(np.float64)
    pruned = rest == 0  # what was pruned stays so: a pattern of zeros is worth more than its error
    q = np.empty((k, n), np.int8)
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        errors = np.empty((end - start, n))
        for i in range(start, end):
            q[i] = np.where(pruned[i], 0, np.clip(np.rint(rest[i] / scales), -127, 127))
            errors[i - start] = (rest[i] - q[i] * scales) / upper[i, i]
            rest[i + 1 : end] -= np.outer(upper[i, i + 1 : end], errors[i - start])
        rest[end:] -= upper[start:end, end:].T @ errors
    found = np.empty_like(q)
    found[order] = q
    return found
