"""From a float32 graph to one of another precision, by way of the gate."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifact
from ..artifact import Manifest
from .common import graph_signature
from .record import kv_of, placement_of, recorded, runtime_of, target_of
from .timing import default_shapes, time_against, time_sessions
from .trial import open_staged

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..exporter import Reference
    from ..optimizers import Step
    from ..runtime import Session
    from .lab import Found, Lab
    from .road import Given, Order


@dataclass(frozen=True)
class Base:
    """The base graph, and what the passes did that led to it."""

    model: ir.Model
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Pressed:
    """What is about to be published.

    Attributes:
        manifest: Of it.
        session: It, on the CPU; None where that lacks a kernel.
        steps: What each pass did.
        found: Of a change of precision: the search; None where none was asked for.
        float32: Of a change of precision: the session of the graph before it.
        worst: The examples that drift most, and `drifts` of all of them.
    """

    manifest: Manifest
    session: Session | None
    steps: Sequence[Step]
    found: Found | None = None
    float32: Session | None = None
    worst: Sequence[dict[str, Any]] = ()

    def measure(self, order: Order, reference: Reference) -> dict[str, Any]:
        """What measured.json holds: nothing of it is in the manifest, which has no clock."""
        measured: dict[str, Any] = {
            "passes": [{"name": s.name, "ms": round(s.seconds * 1e3, 1)} for s in self.steps]
        }
        if self.found is not None and self.found.times:
            measured["candidates"] = self.found.times
        if order.measure and self.session is not None and order.target == "cpu":
            order.progress("measure")
            shapes = default_shapes(self.session, reference)
            beside = {"fp32": self.float32} if self.float32 else {}
            measured |= time_against(self.session, reference, shapes, beside=beside)
        return measured

    def report(
        self, before: dict[str, int], measured: dict[str, Any], files: dict[str, dict[str, Any]]
    ) -> str:
        """report.html; `before` are the ops of the graph as it came."""
        from .report import report

        drift = self.found.chosen.drift if self.found else None
        manifest = replace(self.manifest, files=files)
        if manifest.precision is not None:  # of this change, or of one that was made before
            times = {row["name"]: row["ms"] for row in self.found.times} if self.found else {}
            tried = manifest.precision["candidates"]
            timed = [{**row, "ms": times.get(row["name"])} for row in tried]
            manifest = replace(manifest, precision={**manifest.precision, "candidates": timed})
        return report(
            manifest,
            measured=measured,
            examples=self.worst,
            drifts=drift.examples if drift else (),
            before_ops=before,
            after_ops=self.manifest.ops,
        )


@contextlib.contextmanager
def lab_folder(beside: Path) -> Iterator[Path]:
    """A directory for candidates, on the disk that has room for the artifact."""
    with tempfile.TemporaryDirectory(prefix=f"{beside.name}.", dir=beside.parent) as folder:
        yield Path(folder)


def change_precision(
    order: Order,
    given: Given,
    base: Base,
    float32: Pressed,
    reference: Reference,
    folder: Path,
    path: Path,
) -> Pressed:
    """Search for the precision, and write what was found in the place of the float32 graph.

    Args:
        order: What the user asked for.
        given: The source.
        base: The base graph.
        float32: What would be published without a change.
        reference: What it was held against, for feeds to time with.
        folder: Where candidates may lie.
        path: The directory that will be published.

    Raises:
        GateError: Nothing meets the budget, or what does is not faster.
        UsageError: There is no calibration data for the task, or nothing to change.
    """
    from ..optimizers import count_ops
    from ..optimizers.observers import from_environment
    from .data import prepare
    from .drift import worst_examples
    from .lab import Lab
    from .precision import precise

    source, wish, target = given.source, order.wish, order.target or "cpu"
    order.progress("read the examples")
    sets = prepare(
        source.task,
        graph_signature(base.model)[0],
        calibration=wish.calibration,
        evaluation=wish.evaluation,
    )
    for note in sets.notes:
        order.progress(note)
    lab = Lab(
        base.model, target, sets, float32.manifest, source.files, folder,
        budget=wish.max_drift, first=len(base.steps), observers=from_environment(),
    )  # fmt: skip
    timed = order.measure and target == "cpu"
    shapes = default_shapes(lab.float32.session, reference) if timed else []

    def clock(sessions: dict[str, Session]) -> list[dict[str, Any]]:
        return time_sessions(sessions, reference, shapes)

    found = precise(
        lab, wish, allow_drift=order.allow_drift, spec=order.spec,
        clock=clock if timed else None, progress=order.progress,
    )  # fmt: skip
    for name in (artifact.MODEL, artifact.WEIGHTS):
        (path / name).unlink(missing_ok=True)  # not written over: a session may have it mapped
    model, drift = found.chosen.model, lab.judge(found.chosen)
    artifact.save_model(model, path)
    chosen = found.chosen
    session, why_not = open_staged(
        path, order, given.before, target=chosen.target, options=chosen.options or None
    )
    steps = [*base.steps, *found.chosen.steps]
    manifest = float32.manifest
    notes = manifest.source["notes"]
    if session is None:
        notes = [*notes, f"not run as it is, for the CPU cannot: {why_not}"]
    kv = kv_of(manifest.kv, model)
    shared = kv is not None and kv.get("layout") == "shared"
    if shared:
        _check_shared(order, lab, found, reference)
    elif kv is not None and wish.half_io:
        kv = {**kv, "dtype": {"fp16": "float16", "bf16": "bfloat16"}[found.precision]}
    inputs, outputs = manifest.inputs, manifest.outputs
    if shared or wish.half_io:
        inputs, outputs = graph_signature(model)
    manifest = replace(
        manifest,
        inputs=inputs,
        outputs=outputs,
        kv=kv,
        source={**manifest.source, "notes": notes},
        target={**manifest.target, "provider": chosen.target, "precision": found.precision},
        runtime=runtime_of(chosen.target, chosen.options, manifest.runtime),
        ops=count_ops(model),
        passes=[recorded(s) for s in steps],
        precision=found.record,
        placement=placement_of(model, target_of(found.chosen.target, source.task)),
    )
    worst = worst_examples(sets.evaluation, drift)
    return Pressed(manifest, session, steps, found, lab.float32.session, worst)


def _check_shared(order: Order, lab: Lab, found: Found, reference: Reference) -> None:
    """Hold the form with one buffer for past and present against its reference, in float32.

    Of a pruned graph that is the graph before it was lowered: the source computes something else.

    Raises:
        GateError: It computes something else.
    """
    from .. import exporter
    from ..optimizers import TARGETS
    from ..optimizers.pipeline import Change
    from .shared_cache import as_concat, seen_alone

    chosen = found.chosen
    change = Change(base=chosen.change.base)
    order.progress("check the shared cache")
    if order.wish.pruning:
        before = lab.attempt("before", change, target=TARGETS["cpu"]).session
        reference = replace(
            reference,
            name="the pruned graph",
            run=lambda feeds: list(before.run(feeds).values()),
            prepare=lambda feeds: lambda: before.run(feeds),
        )
    target = target_of(chosen.target, lab.manifest.task, found.precision)
    shared, session = lab.as_it_is(change, target)
    kv = kv_of(lab.manifest.kv, shared)
    assert kv is not None
    parity = exporter.check(
        seen_alone(reference), as_concat(session.run, kv), graph_signature(lab.base)[0], ()
    )
    if not order.allow_drift:
        exporter.refuse(parity, what="the graph with one shared cache")
