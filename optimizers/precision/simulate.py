"""What 8 bits make of one linear layer, in numpy: for searches that run no graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .calibrators import quantization_of, quantize_weight
from .quantize_static import Scheme

Array = npt.NDArray[np.float32]


def rounded_activation(x: Array, low: float, high: float, scheme: Scheme) -> Array:
    """QuantizeLinear and DequantizeLinear of `x`, any shape, with the range [low, high]."""
    kind = scheme.activations
    scale, zero = quantization_of(low, high, symmetric=kind == "int8", dtype=kind)
    limits = np.iinfo(kind)
    q = np.clip(np.rint(x / scale) + int(zero), limits.min, limits.max)
    return np.asarray((q - int(zero)) * scale, np.float32)


def rounded_weight(w: Array, scheme: Scheme) -> Array:
    """A weight (K, N) after int8 with one scale a column, each element to its nearest."""
    return weight_of(*quantize_weight(w, axis=1, mse=scheme.clip_weights))


def weight_of(q: npt.NDArray[np.int8], scales: Array) -> Array:
    """What DequantizeLinear makes of a weight (K, N) and its scales (N,)."""
    return np.asarray(q.astype(np.float32) * scales)
