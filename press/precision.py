"""The gate: candidates of a precision, held to a budget, and kept only where they are faster.

A candidate past the budget loses layers to float, those first that drift most by themselves, until
it meets the budget with the fewest. What no layer can mend is refused, with its numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from ..errors import GateError, OnnxpressError, UsageError
from ..optimizers import TARGETS, Target
from ..optimizers.precision.layers import Layer, layers
from ..runtime import openvino
from . import candidates
from .candidates import Maker
from .evaluator import plain
from .lab import Attempt, Found, Lab
from .wish import Pruning, Wish

if TYPE_CHECKING:
    from ..runtime import Session
    from .drift import Drift

Progress = Callable[[str], None]
Clock = Callable[[dict[str, "Session"]], list[dict[str, Any]]]
"""Times sessions against each other: rows of sizes and `ms`, a median for each name."""

OPENVINO = TARGETS["openvino"]  # runs on the CPU too, so `auto` tries it beside
SINGLY = 96  # layers, above which sensitivity is measured by kind: each takes a session


@dataclass
class Row:
    """One line of the table of candidates."""

    name: str
    attempt: Attempt | None
    precision: str
    target: Target
    maker: Maker | None = None
    sensitivity: dict[str, float] = field(default_factory=dict)
    why: str = ""
    ms: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether it is within budget."""
        drift = self.attempt.drift if self.attempt else None
        return drift is not None and drift.passed


def precise(
    lab: Lab, wish: Wish, *, allow_drift: bool, spec: str, clock: Clock | None, progress: Progress
) -> Found:
    """Find the graph of the precision that was asked for.

    Args:
        lab: Where candidates are tried.
        wish: What was asked for.
        allow_drift: Publish past the budget, too.
        spec: The source, for errors.
        clock: Times sessions; None where nothing is to be timed, or cannot be here; auto needs one.
        progress: Told each step as it begins.

    Raises:
        GateError: Nothing meets the budget, or what does is not faster than float32.
        UsageError: The model has nothing to change.
    """
    wanted = [(wish.precision, lab.target)]
    notes: list[str] = []
    if wish.precision == "auto":
        wanted = [(name, lab.target) for name in lab.target.precisions]
        if why := openvino.missing():
            notes.append(f"openvino was not tried: {why}")
        else:
            wanted += [(name, OPENVINO) for name in OPENVINO.precisions]
    zeros = wish.pruning.weights or wish.pruning.two_of_four
    if zeros and clock is not None and wish.precision == "fp32":
        raise UsageError(
            "zeros in place make nothing faster on cpu, whose kernels multiply them too",
            where=spec,
            hint="--target tensorrt reads 2:4; --no-measure publishes without asking for speed",
        )
    pruning = candidates.prune(lab, wish.pruning, progress) if wish.pruning else []
    rows = [Row("fp32", lab.float32, "fp32", lab.target)]
    lab.judge(lab.float32)
    for name, target in wanted:
        beside = target is not lab.target
        if name == "fp32" and not pruning and not beside:
            continue
        shown = f"{target.name} {name}" if beside else name
        row = Row(f"{shown} pruned" if pruning else shown, None, name, target)
        rows.append(row)
        try:
            row.maker = candidates.maker(lab, target, name, pruning, wish, progress)
            progress(f"try {row.name}")
            if beside:
                _try_beside(row, rows, lab, progress)
            else:
                _try(row, lab, progress, search=not allow_drift)
        except OnnxpressError as e:
            if wish.precision != "auto":
                raise
            row.why = e.what
    single = rows[-1] if wish.precision != "auto" else None
    if single is not None and not single.passed and not allow_drift:
        _refuse(single, lab, spec)
    if clock is not None:
        _time(rows, clock, progress, only=single)
    chosen = single or min((r for r in rows if r.passed or r is rows[0]), key=_speed)
    if pruning and chosen is rows[0]:
        _refuse_unpruned(rows, spec)
    if single is not None and single.ms:
        gain = _speed(rows[0]) / _speed(single)
        if gain <= 1 and not allow_drift:
            raise GateError(
                f"{single.name} is not faster than fp32 here: {gain:.2f} times its speed, "
                f"over {', '.join(single.ms)}",
                where=spec,
                hint="nothing was published; --no-measure publishes without asking for speed",
            )
    return _found(chosen, rows, lab, wish, allow_drift, notes)


def _try(row: Row, lab: Lab, progress: Progress, *, search: bool) -> None:
    assert row.maker is not None
    row.attempt = row.maker.make(())
    _refuse_unchanged(row, row.precision)
    drift = lab.judge(row.attempt)
    progress(f"  {drift.metric}: mean {drift.mean:.2g}, worst {drift.worst:.2g}")
    if not row.maker.layers:
        return
    lab.watching = False  # what follows are trials
    if row.precision == "int8" or not drift.passed:
        row.sensitivity = _sensitivity(lab, row.maker, progress)
    if not drift.passed and search:
        row.attempt = _put_back(lab, row, progress)
    lab.watching = True


def _try_beside(row: Row, rows: Sequence[Row], lab: Lab, progress: Progress) -> None:
    """Of another target that runs on this machine: with those layers in float that a row has."""
    assert row.maker is not None
    like = next((r for r in rows if r.precision == row.precision and r is not row), None)
    kept = like.attempt.kept if like and like.attempt else ()
    row.sensitivity = like.sensitivity if like else {}
    row.attempt = row.maker.make(kept)
    drift = lab.judge(row.attempt)
    progress(f"  {drift.metric}: mean {drift.mean:.2g}, worst {drift.worst:.2g}")


def _refuse_unchanged(row: Row, name: str) -> None:
    """A graph in which nothing changed would pass any gate."""
    assert row.maker is not None
    assert row.attempt is not None
    found = row.maker.layers
    if name != "fp32" and found and len(_still_float(row.attempt) & _nodes(found)) == len(found):
        said = [note for step in row.attempt.steps for note in step.notes]
        raise UsageError(
            "\n".join([f"nothing in the model becomes {name}", *said[:5]]),
            hint="the notes above say why, layer by layer",
        )


def _still_float(attempt: Attempt) -> set[str]:
    """Names of the nodes of the finished graph that multiply with a weight in float32."""
    return _nodes(layers(attempt.model)[0])


def _nodes(found: Sequence[Layer]) -> set[str]:
    return {str(layer.node.name) for layer in found}


# The search -----------------------------------------------------------------------------------


def _sensitivity(lab: Lab, maker: Maker, progress: Progress) -> dict[str, float]:
    """The drift of each layer by itself, all others in float, on what choices are made on."""
    names = [layer.name for layer in maker.layers]
    groups = [[name] for name in names]
    if len(names) > SINGLY:
        kinds: dict[str, list[str]] = {}
        for layer in maker.layers:
            kinds.setdefault(layer.kind, []).append(layer.name)
        groups = list(kinds.values())
    found: dict[str, float] = {}
    for i, group in enumerate(groups):
        if not i:
            progress("drift of each layer by itself")
        progress(f"  {i + 1} of {len(groups)}")
        alone = maker.make([name for name in names if name not in group])
        drift = lab.search(alone)
        found |= dict.fromkeys(group, drift.mean / len(group))
        lab.drop(alone)
    return found


def _put_back(lab: Lab, row: Row, progress: Progress) -> Attempt:
    """The candidate with the fewest layers in float that meets the budget; else the closest one.

    Those that drift most go first. How many is decided on what choices are made on; the gate then
    judges that candidate, and further ones with more in float while it refuses.
    """
    assert row.maker is not None
    assert row.attempt is not None
    make = row.maker.make
    order = sorted(row.sensitivity, key=lambda n: -_rank(row.sensitivity[n]))
    most = len(order) - 1  # all of them in float would be float32 again

    def build(count: int) -> Attempt:
        progress(f"{count} of {len(order)} layers back to float")
        return make(order[:count])

    def within(count: int) -> bool:
        attempt = build(count)
        lab.drop(attempt)
        return lab.search(attempt).passed

    low, high = 0, 1
    while high < most and not within(high):
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if within(middle) else (middle, high)
    best, count = row.attempt, high
    while count <= most:
        attempt = build(count)
        drift = lab.judge(attempt)
        progress(f"  {drift.metric}: mean {drift.mean:.2g}, worst {drift.worst:.2g}")
        closer = drift.passed or _distance(attempt) < _distance(best)
        lab.drop(best if closer else attempt)
        best = attempt if closer else best
        if drift.passed or count == most:
            break
        count = min(count + max(1, count // 4), most)
    return best


def _rank(drift: float) -> float:
    return math.inf if math.isnan(drift) else drift


def _distance(attempt: Attempt) -> float:
    return _rank(attempt.drift.mean) if attempt.drift else math.inf


def _refuse(row: Row, lab: Lab, spec: str) -> None:
    assert row.attempt is not None
    drift = row.attempt.drift
    assert drift is not None
    count = len(row.attempt.kept)
    how = (
        f", with {count} of {len(row.sensitivity)} layers in float at its closest" if count else ""
    )
    lines = [f"{row.name} is past the budget{how}: {drift.why}"]
    worst = sorted(row.sensitivity.items(), key=lambda item: -_rank(item[1]))[:3]
    lines += [f"    {name}: {value:.3g} by itself" for name, value in worst]
    raise GateError(
        "\n".join(lines),
        where=spec,
        hint="nothing was published; a larger --max-drift, more --calibration data, "
        "or --allow-drift",
    )


def _refuse_unpruned(rows: Sequence[Row], spec: str) -> None:
    lines = ["of what is pruned, nothing passes and is faster than fp32"]
    for row in rows[1:]:
        drift = row.attempt.drift if row.attempt else None
        lines.append(f"    {row.name}: {row.why or (drift and drift.why) or 'not faster'}")
    raise GateError(
        "\n".join(lines), where=spec, hint="nothing was published; auto without --prune has more"
    )


# Speed ----------------------------------------------------------------------------------------


def _time(rows: Sequence[Row], clock: Clock, progress: Progress, only: Row | None) -> None:
    wanted = [r for r in rows if r.attempt and (r.passed or r is only)]
    if len(wanted) < 2:
        return
    progress(f"time {', '.join(r.name for r in wanted)}")
    for line in clock({r.name: r.attempt.session for r in wanted if r.attempt}):
        sizes = "x".join(str(v) for k, v in line.items() if k not in ("ms", "speedup") and v)
        for row in wanted:
            row.ms[sizes or "fixed"] = line["ms"][row.name]


def _speed(row: Row) -> float:
    """The mean time over the shapes, all of equal weight."""
    return geometric_mean(row.ms.values()) if row.ms else math.inf


# The record -----------------------------------------------------------------------------------


def _found(
    chosen: Row,
    rows: Sequence[Row],
    lab: Lab,
    wish: Wish,
    allow_drift: bool,
    notes: Sequence[str],
) -> Found:
    attempt = chosen.attempt
    assert attempt is not None
    drift = lab.judge(attempt)
    precision = chosen.precision
    notes = [*lab.sets.notes, *notes, *(chosen.maker.notes if chosen.maker else ())]
    record = {
        "asked": wish.precision,
        "precision": precision,
        "recipe": chosen.maker.recipe if chosen.maker else {},
        "calibration": lab.sets.calibration.summary(),
        "search": lab.sets.search.summary(),
        "given": {
            "calibration": _path(wish.calibration),
            "eval": _path(wish.evaluation),
        },
        "eval": lab.sets.evaluation.summary(),
        "drift": {**drift.summary(), "allowed": allow_drift and not drift.passed},
        "layers": _layers(chosen, precision, drift),
        "candidates": [_candidate(row, row is chosen) for row in rows],
        "pruned": _pruned(wish.pruning),
        "notes": notes,
    }
    times = [{"name": row.name, "ms": row.ms} for row in rows if row.ms]
    return Found(attempt, precision, record, times)


def _layers(row: Row, precision: str, drift: Drift) -> list[dict[str, Any]]:
    maker, attempt = row.maker, row.attempt
    if maker is None or attempt is None:
        return []
    still = _still_float(attempt)

    def reason(layer: Layer) -> str:
        if layer.name in maker.reasons:
            return maker.reasons[layer.name]
        if str(layer.node.name) not in still or precision == "fp32":
            return ""
        if layer.name in attempt.kept:
            return (
                f"it drifts {row.sensitivity[layer.name]:.3g} by itself: {len(attempt.kept)} "
                f"layers are in float for a budget of {drift.budget:g}"
            )
        return "a pass declined it: `inspect --passes` has its note"

    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "precision": "fp32" if reason(layer) else precision,
            "sensitivity": plain(row.sensitivity[layer.name])
            if layer.name in row.sensitivity
            else None,
            "alpha": maker.alphas.get(layer.name),
            "reason": reason(layer),
        }
        for layer in maker.layers
    ]


def _candidate(row: Row, chosen: bool) -> dict[str, Any]:
    drift = row.attempt.drift if row.attempt else None
    return {
        "name": row.name,
        "drift": None if drift is None else plain(drift.mean),
        "worst": None if drift is None else plain(drift.worst),
        "passed": row.passed,
        "kept": chosen,
        "bytes": row.attempt.bytes if row.attempt else None,
        "float_layers": len(row.attempt.kept) if row.attempt else None,
        "why": row.why or (drift.why if drift else ""),
    }


def _path(given: str | os.PathLike[str] | None) -> str | None:
    return None if given is None else os.fspath(given)


def _pruned(pruning: Pruning) -> dict[str, Any] | None:
    if not pruning:
        return None
    return {
        "heads": pruning.heads,
        "ffn": pruning.ffn,
        "weights": 0.5 if pruning.two_of_four else pruning.weights,
        "pattern": "2:4" if pruning.two_of_four else "unstructured" if pruning.weights else "",
    }
