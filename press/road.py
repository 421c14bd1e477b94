"""The road that export, press and optimize take, from a source to an artifact."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import artifact
from ..artifact import Manifest
from ..errors import GateError, UsageError
from .change import Base, Pressed, change_precision, lab_folder
from .common import graph_signature, needs_export, reference_of, run_model, some_feeds
from .record import manifest_of, target_of
from .trial import open_staged, try_task
from .wish import NOTHING, Wish

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..exporter import Parity, Reference, Source
    from ..optimizers import Step
    from ..optimizers.explain import Fusion
    from ..runtime import Session


@dataclass(frozen=True)
class Order:
    """What the user asked for.

    Attributes:
        spec: The source as the user named it.
        out: The artifact directory to write.
        target: A name of `optimizers.TARGETS`; None for the portable graph.
        until, skip, with_onnxsim: As `optimizers.optimize` takes them.
        require_fused: Refuse a graph in which a layer stays unfused.
        force: Replace an artifact that is at `out`.
        allow_fallback: Publish even where the target has no kernel for a node.
        allow_drift: Publish even where the check fails.
        times: Keep the times of the passes in measured.json.
        measure: Time the result against its reference too, and keep that there.
        wish: The precision, and what is pruned; the gate decides.
        shapes: Sizes that an engine is built for, by dimension.
        progress: Told each step as it begins.
    """

    spec: str
    out: str | os.PathLike[str]
    target: str | None = None
    until: str | None = None
    skip: tuple[str, ...] = ()
    with_onnxsim: bool = False
    require_fused: bool = False
    force: bool = False
    allow_drift: bool = False
    allow_fallback: bool = False
    times: bool = False
    measure: bool = False
    wish: Wish = NOTHING
    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Given:
    """A source, and where its graph lies if it has one already.

    Attributes:
        source: What the exporter knows of it.
        file: The ONNX file that an adopted graph is held against.
        before: The manifest of the artifact that it comes from.
    """

    source: Source
    file: str | os.PathLike[str] | None = None
    before: Manifest | None = None


def road(order: Order, take: Callable[[], Given]) -> Manifest:
    """Take a source to a published artifact; whatever stops it, nothing is left behind.

    Args:
        order: What the user asked for.
        take: Reads the source; called once the output is known to be free.

    Raises:
        GateError: The graph does not compute what its reference computes, or it has layers that
            stay unfused where `order.require_fused`.
        UsageError: The source cannot be captured, or the output cannot be written.
    """
    artifact.check_output(order.out, force=order.force)
    with needs_export():
        from .. import exporter  # noqa: F401  # here, where what is missing is told
        from ..optimizers import count_ops
        from ..optimizers.explain import explain
        from ..optimizers.lower.pack_attention import padded_right
    _check_order(order)
    progress = order.progress
    with contextlib.ExitStack() as stack:
        staging = stack.enter_context(artifact.stage(order.out, force=order.force))
        progress(f"read {order.spec}")
        given = take()
        source = given.source
        model, notes = _graph(source, progress)
        _check_given(order, given, model)
        # An adopted graph is its own reference: opened before a pass sees it.
        reference = reference_of(source, given.file)
        before = count_ops(model)
        steps, base = _optimize(model, order, reference, given)
        fusions = explain(model, steps)
        if order.require_fused:
            _refuse_unfused(fusions, order.spec)
        progress("write the weights")
        artifact.save_model(model, staging.path)
        session, why_not = open_staged(staging.path, order, given.before)
        right = bool(padded_right(model))
        parity = None
        if session is None:
            notes = [*notes, f"not checked, for the CPU cannot run it: {why_not}"]
        else:
            compared = _compared(session, given, staging.path)
            parity = _check(order, reference, compared, right=right)
            if parity.misstated:
                session = _restated(order, given, parity, staging.path, model, base)
        for name, content in source.files.items():
            staging.write(name, content)
        manifest = manifest_of(order, given, model, session, steps, fusions, parity, notes)
        pressed = Pressed(manifest, session, steps)
        if base is not None:
            folder = stack.enter_context(lab_folder(staging.path))
            pressed = change_precision(order, given, base, pressed, reference, folder, staging.path)
        if not order.allow_fallback:
            _refuse_elsewhere(pressed.manifest, order.spec)
        measured = pressed.measure(order, reference) if order.times else {}
        if measured:
            staging.write(artifact.MEASURED, json.dumps(measured, indent=2) + "\n")
        if order.target:
            report = pressed.report(before, measured, staging.files())
            staging.write(artifact.REPORT, report)
        if source.task != "tensors" and pressed.session is not None:
            progress("try the task")
            pressed.session.manifest = pressed.manifest
            try_task(pressed.session, source.task, order.spec)
        progress("publish")
        return staging.publish(pressed.manifest)


def _check_order(order: Order) -> None:
    """Refuse what needs no source to be refused."""
    if not order.wish:
        return
    from .candidates import check_target

    if order.until or order.skip:
        raise UsageError(
            "--precision and --prune need every pass; --until and --skip leave some out",
            hint="look at single passes without a change of precision",
        )
    target = order.target or "cpu"
    if order.wish.precision == "auto" and not (order.measure and target == "cpu"):
        raise UsageError(
            "auto keeps what is measured to be fastest, and nothing is measured here",
            hint="name a precision; --no-measure measures nothing, and so far no target but cpu is",
        )
    check_target(target, order.wish.precision)


def _check_given(order: Order, given: Given, model: ir.Model) -> None:
    """Refuse a source of which that cannot be made."""
    from .candidates import check_model

    past = given.before.precision if given.before else None
    if past is not None and given.before is not None and "int8" in past["precision"]:
        made_for = given.before.target["provider"]
        if order.target != made_for:
            raise UsageError(
                f"the artifact is {past['precision']} for {made_for}; for {order.target} the "
                "integers are other ones",
                hint=f"start from the artifact in float32: --target {order.target} --precision",
            )
    if given.before is not None and (given.before.kv or {}).get("layout") == "shared":
        raise UsageError(
            "the artifact's cache is one shared buffer already, which no pass takes back",
            hint="start from the artifact that `onnxpress export` makes of the source",
        )
    foreign = _foreign(model, order.target)
    lowered_for = given.before.target.get("provider") if given.before is not None else "any"
    if lowered_for not in ("any", order.target) and foreign:
        raise UsageError(
            f"the artifact was lowered for {lowered_for}: it has {foreign[0]}, "
            f"which is not written for {order.target}",
            hint="start from the artifact that `onnxpress export` makes of the source",
        )
    if order.shapes:
        from ..runtime.profiles import profile_of

        profile_of(graph_signature(model)[0], order.shapes)
    if not order.wish:
        return
    if past is not None and past["pruned"]:
        raise UsageError(
            "the artifact is pruned already: the gate would see the second change alone",
            hint="start from the artifact before it, with --prune and --precision together",
        )
    check_model(model)


def _foreign(model: ir.Model, target: str | None) -> list[str]:
    """The contrib ops of a graph that are not written for this target."""
    from ..optimizers import TARGETS, count_ops

    written = TARGETS[target or "cpu"].ops
    return [op for op in count_ops(model) if op.startswith("com.microsoft::") and op not in written]


def _optimize(
    model: ir.Model, order: Order, reference: Reference, given: Given
) -> tuple[list[Step], Base | None]:
    """The passes, in place; and the base graph between them, where its precision is to change."""
    from .. import optimizers
    from ..optimizers import pipeline
    from ..optimizers.observers import from_environment, runs_from_environment

    if order.target is None and given.source.kind == "onnx":
        return [], None
    order.progress(f"optimize for {order.target or 'any target'}")
    inputs, _ = graph_signature(model)
    runs = runs_from_environment(model, run_model, lambda: some_feeds(reference, inputs))
    observers = [*from_environment(), *runs]
    target = target_of(order.target, given.source.task)
    if order.target is None:  # branches are for one provider, and what is exported is for any
        target = replace(target, skips_empty_masks=False)
    if not order.wish:
        return optimizers.optimize(
            model,
            target,
            observers=observers,
            until=order.until,
            skip=order.skip,
            with_onnxsim=order.with_onnxsim,
        ), None
    todo = pipeline.raised(with_onnxsim=order.with_onnxsim)
    steps = pipeline.run_passes(model, todo, observers=observers)
    base = Base(model.clone(), tuple(steps))
    todo = pipeline.lowered(target)
    steps += pipeline.run_passes(model, todo, observers=observers, first=len(steps))
    return steps, base


def _check(order: Order, reference: Reference, session: Session, *, right: bool) -> Parity:
    from .. import exporter

    order.progress(f"check against {reference.name}")
    parity = exporter.check(
        reference,
        session.run,
        session.inputs,
        session.outputs,
        right=right,
        progress=lambda p: order.progress(f"  {p}"),
    )
    if not order.allow_drift:
        exporter.refuse(parity, what="the optimized graph" if order.target else "the graph")
    return parity


def _compared(session: Session, given: Given, path: Path) -> Session:
    """What is held against the reference: what ONNX Runtime makes of the graph, or it as it is.

    Where a graph rounds on purpose, another order of additions moves a number to its neighbor, far
    past what float32 may differ by. The reference runs as it is, so this does too.
    """
    from ..runtime import Session

    rounds = given.before is not None and given.before.precision is not None
    return Session(path, optimize=False) if rounds else session


def _restated(
    order: Order,
    given: Given,
    parity: Parity,
    path: Path,
    model: ir.Model,
    base: Base | None,
) -> Session | None:
    """The session once more, with the shapes of outputs as they were seen."""
    from .. import exporter

    exporter.restate(model, parity.misstated)
    if base is not None:
        exporter.restate(base.model, parity.misstated)
    artifact.save_model(model, path)
    return open_staged(path, order, given.before)[0]


def _graph(source: Source, progress: Callable[[str], None]) -> tuple[ir.Model, list[str]]:
    from ..exporter import capture

    if source.graph is not None:
        return source.graph, []
    progress("capture the graph")
    captured = capture(source)
    return captured.model, captured.notes


def _refuse_unfused(fusions: Sequence[Fusion], spec: str) -> None:
    missed = [m for f in fusions for m in f.missed]
    if missed:
        count = "1 layer stays" if len(missed) == 1 else f"{len(missed)} layers stay"
        raise GateError(
            f"{count} unfused\n" + "\n".join(f"    {m}" for m in missed),
            where=spec,
            hint="nothing was published; without --require-fused the manifest lists them instead",
        )


def _refuse_elsewhere(manifest: Manifest, spec: str) -> None:
    """Refuse a graph of which a node would run on another provider than its target."""
    placement = manifest.placement
    if placement is None or not placement["elsewhere"]:
        return
    fell = placement["elsewhere"]
    shown = [f"    {n['op']} {n['node']!r}: {n['why']}" for n in fell[:8]]
    more = [f"    and {len(fell) - 8} more"] if fell[8:] else []
    raise GateError(
        f"{len(fell)} of {placement['nodes']} nodes would not run on {placement['provider']} "
        f"(kernels of {placement['kernels']})\n" + "\n".join([*shown, *more]),
        where=spec,
        hint="nothing was published; --allow-fallback publishes it, for a session that allows it "
        "too",
    )
