"""What the user asked of precision and pruning."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError, UsageError

PRECISIONS = ("fp32", "int8", "int8-dynamic", "fp16", "bf16", "auto")
CALIBRATORS = ("minmax", "percentile", "entropy", "mse")


@dataclass(frozen=True)
class Pruning:
    """What is removed before anything else: fractions, and a pattern of zeros.

    Attributes:
        heads: Of the attention heads of each layer.
        ffn: Of the columns of each feed-forward block.
        weights: Of the weights of each MatMul, set to zero in place.
        two_of_four: Set two of every four neighbors to zero, as sparse tensor cores read.
    """

    heads: float = 0.0
    ffn: float = 0.0
    weights: float = 0.0
    two_of_four: bool = False

    def __bool__(self) -> bool:
        return bool(self.heads or self.ffn or self.weights or self.two_of_four)


@dataclass(frozen=True)
class Wish:
    """What the user asked for.

    Attributes:
        precision: One of `PRECISIONS`; auto is the fastest that passes the gate.
        calibration: File of examples to learn from; None for the task's default set.
        evaluation: File of examples to judge on; None holds some out.
        max_drift: Budget of the mean drift; None for the task's default.
        calibrator: minmax, percentile, entropy or mse.
        pruning: What is pruned before.
        half_io: Whether fp16 and bf16 are the types of inputs and outputs too.
    """

    precision: str = "fp32"
    calibration: str | os.PathLike[str] | None = None
    evaluation: str | os.PathLike[str] | None = None
    max_drift: float | None = None
    calibrator: str = "minmax"
    pruning: Pruning = field(default_factory=Pruning)
    half_io: bool = False

    def __bool__(self) -> bool:
        return self.precision != "fp32" or bool(self.pruning)


NOTHING = Wish()


def wish_of(
    precision: str,
    calibration: str | os.PathLike[str] | None,
    evaluation: str | os.PathLike[str] | None,
    max_drift: float | None,
    calibrator: str | None,
    prune: str | None,
    half_io: bool = False,
) -> Wish:
    """The wish, checked; see `Wish` for the arguments, and `pruning_of` for `prune`.

    Raises:
        UsageError: There is no such precision, or an argument has no use without one.
        InputError: A file is not there: now, and not after minutes of work.
    """
    if precision not in PRECISIONS:
        raise UsageError(
            f"there is no precision {precision!r}", hint="one of " + ", ".join(PRECISIONS)
        )
    if calibrator is not None and calibrator not in CALIBRATORS:
        raise UsageError(
            f"there is no calibrator {calibrator!r}", hint="one of " + ", ".join(CALIBRATORS)
        )
    if max_drift is not None and not (math.isfinite(max_drift) and max_drift >= 0):
        raise UsageError(
            f"--max-drift is {max_drift}; it is a number that is not negative",
            hint="each task has a budget of its own: 0.005 for embed",
        )
    if calibrator is not None and precision not in ("int8", "auto"):
        raise UsageError(f"--calibrator has no use with {precision}", hint="--precision int8")
    if half_io and precision not in ("fp16", "bf16"):
        raise UsageError(f"--half-io has no use with {precision}", hint="--precision fp16 or bf16")
    wish = Wish(
        precision,
        calibration,
        evaluation,
        max_drift,
        calibrator or "minmax",
        pruning_of(prune or ""),
        half_io,
    )
    given = {"--calibration": calibration, "--eval": evaluation, "--max-drift": max_drift}
    useless = [name for name, value in given.items() if value is not None]
    if useless and not wish:
        raise UsageError(
            f"{useless[0]} has no use without a change of precision",
            hint="add --precision int8, or another",
        )
    for file in (calibration, evaluation):
        if file is not None and not Path(file).exists():
            raise InputError("there is no such file", where=os.fspath(file))
    return wish


def pruning_of(text: str) -> Pruning:
    """`heads:0.25,ffn:0.25` as a `Pruning`; also `weights:0.5`, and `2:4`.

    Raises:
        UsageError: It is not written like that, or a fraction is not between 0 and 1.
    """
    found: dict[str, float] = {}
    how = "heads:0.25,ffn:0.25 removes a quarter of each; weights:0.5 or 2:4 set weights to zero"
    for part in (p.strip() for p in text.split(",") if text):
        if part == "2:4":
            found["two_of_four"] = 1.0
            continue
        name, _, number = part.partition(":")
        try:
            fraction = float(number)
        except ValueError:
            fraction = math.nan
        if name not in ("heads", "ffn", "weights") or not 0 < fraction < 1 or name in found:
            raise UsageError(f"--prune does not take {part!r}", hint=how)
        found[name] = fraction
    if "two_of_four" in found and "weights" in found:
        raise UsageError("--prune takes weights:... or 2:4, not both", hint=how)
    pattern = bool(found.pop("two_of_four", 0.0))
    return Pruning(**found, two_of_four=pattern)
