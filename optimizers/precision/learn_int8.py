"""Everything that static int8 has to learn from calibration data, before a graph is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...errors import InputError, UsageError
from .calibrators import CALIBRATORS, quantize_weight
from .compensate_weights import compensate
from .layers import Layer, layers
from .observe import Feeds, Real, Run, Seen, observe
from .quantize_static import QuantizeStatic, Scheme, array_of
from .simulate import rounded_activation, weight_of
from .smooth_activations import SmoothActivations, Smoothing, choose_smoothing

Array = npt.NDArray[np.float32]

CHUNK = 16  # activations that one run hands out: it bounds the memory, at a run for each chunk


@dataclass(frozen=True)
class Int8:
    """How to make a graph int8.

    Attributes:
        scheme: The kinds of integers, which the target decides.
        calibrator: Of the activations: minmax, percentile, entropy or mse.
        smooth: Search for SmoothQuant's alpha, activation by activation.
        compensate: Round weights so that their errors cancel (GPTQ), not each to its nearest.
        correct: Take the mean of the error out of the biases.
    """

    scheme: Scheme = field(default_factory=Scheme)
    calibrator: str = "minmax"
    smooth: bool = True
    compensate: bool = True
    correct: bool = True


@dataclass(frozen=True)
class Learned:
    """What calibration data taught, by name of the activation or of the layer.

    Attributes:
        int8: How it was learned.
        smoothings: Factors of the activations that are smoothed.
        ranges: Lowest and highest value of each activation, smoothed.
        weights: int8 weights (K, N), and a scale a column (N,).
        corrections: What is added to biases, (N,).
        constant: Activations that never changed.
    """

    int8: Int8
    smoothings: list[Smoothing] = field(default_factory=list)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    weights: dict[str, tuple[npt.NDArray[np.int8], Array]] = field(default_factory=dict)
    corrections: dict[str, Array] = field(default_factory=dict)
    constant: list[str] = field(default_factory=list)

    def passes(self, keep: Iterable[str] = ()) -> list[ir.passes.InPlacePass]:
        """What makes the base graph int8, but for the layers of `keep`."""
        return [
            SmoothActivations(self.smoothings),  # first: the ranges are those of smoothed ones
            QuantizeStatic(
                self.ranges,
                scheme=self.int8.scheme,
                keep=set(keep),
                weights=self.weights,
                corrections=self.corrections,
            ),
        ]


def learn(
    model: ir.Model,
    int8: Int8,
    run: Run,
    batches: Callable[[], Iterable[Feeds]],
    *,
    real: Real = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
) -> Learned:
    """Run the base graph on calibration data, and learn all that int8 needs.

    Args:
        model: The base graph, in float32; it is left as it is.
        int8: How to make it int8.
        run: Runs a graph.
        batches: Gives the data from its start, as often as it is asked.
        real: Which places of a batch hold tokens.
        progress: Told each step as it begins.

    Raises:
        InputError: An activation or a weight holds NaN or infinity, or there is no data.
        UsageError: There is no linear layer, or the calibrator has no such name.
    """
    if int8.calibrator not in CALIBRATORS:
        raise UsageError(
            f"there is no calibrator {int8.calibrator!r}", hint="one of " + ", ".join(CALIBRATORS)
        )
    found, _ = layers(model)
    if not found:
        raise UsageError(
            "the model has no MatMul with a constant weight: there is nothing to make int8",
            hint="--precision fp16 or bf16 take other ops too",
        )
    for layer in found:
        if not np.isfinite(array_of(layer.weight)).all():
            raise InputError(
                f"the weight {layer.weight.name!r} of {layer.name} holds NaN or infinity",
                hint="int8 has no number for it; nor has the model an answer in float32",
            )
    learned = Learned(int8)
    copy = model.clone()
    if int8.smooth:
        for names in _chunks(found, progress, "smooth"):
            seen = observe(copy, names, run, batches(), CALIBRATORS["minmax"], real=real)
            learned.smoothings.extend(choose_smoothing(copy, seen, scheme=int8.scheme))
        SmoothActivations(learned.smoothings)(copy)
    found, _ = layers(copy)
    rounded: dict[ir.Value, tuple[npt.NDArray[np.int8], Array]] = {}
    for names in _chunks(found, progress, "calibrate"):
        seen = observe(
            copy, names, run, batches(), CALIBRATORS[int8.calibrator],
            real=real, gram=int8.compensate,
        )  # fmt: skip
        for name, look in seen.items():
            if not look.count:
                continue  # all of it is padding: nothing is known of its range
            symmetric = int8.scheme.activations == "int8"
            learned.ranges[name] = look.calibrator.range(symmetric=symmetric)
            if (look.low == look.high).all():
                learned.constant.append(name)
        for layer in found:
            if str(layer.input.name) in seen and str(layer.input.name) in learned.ranges:
                _learn_layer(layer, seen[str(layer.input.name)], learned, rounded)
    return learned


def _chunks(
    found: Sequence[Layer], progress: Callable[[str], None], what: str
) -> Iterator[list[str]]:
    names = list(dict.fromkeys(str(layer.input.name) for layer in found))
    for start in range(0, len(names), CHUNK):
        progress(f"{what}: {start} of {len(names)} activations")
        yield names[start : start + CHUNK]


def _learn_layer(
    layer: Layer,
    look: Seen,
    learned: Learned,
    rounded: dict[ir.Value, tuple[npt.NDArray[np.int8], Array]],
) -> None:
    int8 = learned.int8
    w = array_of(layer.weight)
    if layer.weight not in rounded:  # who shares a weight has it as the first of them rounded it
        q, scales = quantize_weight(w, axis=1, mse=int8.scheme.clip_weights)
        if int8.compensate and look.gram is not None:
            q = compensate(w, look.gram, scales)
        rounded[layer.weight] = q, scales
    q, scales = rounded[layer.weight]
    if int8.compensate and look.gram is not None:
        learned.weights[layer.name] = q, scales
    if int8.correct:
        # Rounding shifts the mean of an output, and no later layer takes that back.
        x = rounded_activation(look.rows, *learned.ranges[str(layer.input.name)], int8.scheme)
        wrong = x @ weight_of(q, scales) - look.rows @ w
        known, held = np.array_split(wrong, 2)
        # Only where it helps on rows that it has not seen: what is no shift but chance does not.
        if len(known) and (np.square(held - known.mean(0)).sum() < np.square(held).sum()):
            learned.corrections[layer.name] = -wrong.mean(0)
