"""The road that export, press and optimize take, from a source to an artifact."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifact
from ..artifact import Manifest
from ..errors import ArtifactError, ExportError, GateError, OnnxpressError, ProviderError
from .common import graph_signature, needs_export, reference_of, run_model, some_feeds
from .timing import default_shapes, time_against

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..exporter import Parity, Reference, Source
    from ..optimizers import Step
    from ..optimizers.explain import Fusion
    from ..optimizers.pipeline import Observer
    from ..runtime import Session
    from ..runtime.tasks import TextTask


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
        allow_drift: Publish even where the check fails.
        times: Keep the times of the passes in measured.json.
        measure: Time the result against its reference too, and keep that there.
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
    times: bool = False
    measure: bool = False
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
        from .. import exporter
        from ..optimizers.explain import explain
        from ..optimizers.observers import from_environment
    observers, progress = from_environment(), order.progress
    with artifact.stage(order.out, force=order.force) as staging:
        progress(f"read {order.spec}")
        given = take()
        source = given.source
        model, notes = _graph(source, progress)
        # An adopted graph is its own reference: opened before a pass sees it.
        reference = reference_of(source, given.file)
        steps: list[Step] = []
        if order.target or source.kind != "onnx":
            progress(f"optimize for {order.target or 'any target'}")
            steps = _optimize(model, order, reference, observers)
        fusions = explain(model, steps)
        if order.require_fused:
            _refuse_unfused(fusions, order.spec)
        progress("write the weights")
        artifact.save_model(model, staging.path)
        session, why_not = _open(staging.path, order, given.before)
        parity = None
        if session is None:
            notes = [*notes, f"not checked, for the CPU cannot run it: {why_not}"]
        else:
            progress(f"check against {reference.name}")
            parity = exporter.check(
                reference,
                session.run,
                session.inputs,
                session.outputs,
                progress=lambda p: progress(f"  {p}"),
            )
            if not order.allow_drift:
                exporter.refuse(parity, what="the optimized graph" if order.target else "the graph")
            if parity.misstated:
                exporter.restate(model, parity.misstated)
                artifact.save_model(model, staging.path)
                session, _ = _open(staging.path, order, given.before)
        for name, content in source.files.items():
            staging.write(name, content)
        if order.times:
            measured = {
                "passes": [{"name": s.name, "ms": round(s.seconds * 1e3, 1)} for s in steps]
            }
            if order.measure and session is not None:
                progress("measure")
                shapes = default_shapes(session, reference)
                measured |= time_against(session, reference, shapes)
            staging.write(artifact.MEASURED, json.dumps(measured, indent=2) + "\n")
        manifest = _manifest(order, given, model, session, steps, fusions, parity, notes)
        if source.task != "tensors" and session is not None:
            progress("try the task")
            session.manifest = manifest
            _try_task(session, source.task, order.spec)
        progress("publish")
        return staging.publish(manifest)


def _optimize(
    model: ir.Model, order: Order, reference: Reference, observers: list[Observer]
) -> list[Step]:
    from .. import optimizers
    from ..optimizers.observers import runs_from_environment

    inputs, _ = graph_signature(model)
    runs = runs_from_environment(model, run_model, lambda: some_feeds(reference, inputs))
    return optimizers.optimize(
        model,
        optimizers.TARGETS[order.target or "cpu"],
        observers=[*observers, *runs],
        until=order.until,
        skip=order.skip,
        with_onnxsim=order.with_onnxsim,
    )


def _manifest(
    order: Order,
    given: Given,
    model: ir.Model,
    session: Session | None,
    steps: Sequence[Step],
    fusions: Sequence[Fusion],
    parity: Parity | None,
    notes: Sequence[str],
) -> Manifest:
    from ..optimizers import TARGETS, count_ops

    source, before = given.source, given.before
    inputs, outputs = (session.inputs, session.outputs) if session else graph_signature(model)
    runtime: dict[str, Any] = {"onnxruntime": artifact.ORT_RANGE}
    if order.target and (disabled := TARGETS[order.target].disabled_optimizers):
        runtime["disabled_optimizers"] = list(disabled)
    if before is not None and "optimize" in before.runtime:
        runtime["optimize"] = before.runtime["optimize"]
    return Manifest(
        task=source.task,
        source={
            "spec": source.spec,
            "kind": source.kind,
            "weights_sha256": source.weights_sha256,
            "notes": [*source.notes, *notes],
        },
        target={
            "provider": order.target or "any",
            "precision": _precision(model) or TARGETS[order.target or "cpu"].precision,
            "opset": model.opset_imports.get("", 0),
        },
        inputs=inputs,
        outputs=outputs,
        settings=source.settings,
        kv=source.kv,
        ops=count_ops(model),
        passes=[
            {
                "name": s.name,
                "changed": s.changed,
                "ops": s.ops,
                "hits": s.hits,
                "notes": list(s.notes),
            }
            for s in steps
        ],
        fusions=[
            {
                "kind": f.kind,
                "fused": f.fused,
                "lifted": f.lifted,
                "missed": [{"node": m.node, "reason": m.reason} for m in f.missed],
            }
            for f in fusions
        ],
        parity=_recorded(parity, before),
        runtime=runtime,
        tools={**before.tools, **_tools("onnx")} if before else _tools(source.kind),
    )


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


def _open(path: Path, order: Order, before: Manifest | None) -> tuple[Session | None, str]:
    """The graph on the CPU; where another target's has an op without a kernel there, which op."""
    from ..optimizers import TARGETS
    from ..runtime import Session

    other = order.target not in (None, "cpu")
    # Another provider's graph is checked as it is: what ONNX Runtime would make of it for the CPU
    # says nothing about it.
    optimize = False if other else before.runtime.get("optimize") if before else None
    try:
        disabled = TARGETS[order.target].disabled_optimizers if order.target else ()
        return Session(path, optimize=optimize, disabled_optimizers=disabled), ""
    except (ProviderError, ArtifactError) as e:  # `path` is about to go: name the source instead
        if other and isinstance(e, ProviderError):
            return None, e.what
        raise ExportError(
            f"ONNX Runtime does not open the graph: {e.what}",
            where=order.spec,
            hint="no CPU kernel for an op, or for its dtype: replace it, or export module.float()",
        ) from e


def _recorded(parity: Parity | None, before: Manifest | None) -> dict[str, Any] | None:
    """The check for the manifest; a drift that was allowed once stays allowed."""
    if parity is None:
        return None
    past = (before.parity if before else None) or {}
    drifts = not parity.passed
    summary = parity.summary()
    if past.get("allowed_drift") and not drifts:
        summary["worst"] = past["worst"]
    return {**summary, "allowed_drift": drifts or bool(past.get("allowed_drift"))}


def _try_task(session: Session, task: str, spec: str) -> None:
    """Run the task on one short text: a label or a tokenizer that does not fit shows only then."""
    from .. import runtime

    text = "a"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", runtime.TruncationWarning)
            match runtime.task_of(session, task):
                case runtime.Embedder() as t:
                    t.embed(text)
                case runtime.Classifier() as t:
                    t.classify(text)
                case runtime.Translator() as t:
                    t.translate(text, max_new_tokens=2)
                # Of these, the tokenizer may not know the text, and then there is nothing to run.
                case runtime.Answerer() as t if _knows(t, text):
                    t.answer(text, text)
                case runtime.Generator() as t if _knows(t, text):
                    t.generate(text, max_new_tokens=2)
    except Exception as e:  # whatever it raises, it would raise for whoever runs the artifact
        what = e.what if isinstance(e, OnnxpressError) else f"{type(e).__name__}: {e}"
        raise ExportError(
            f"the artifact does not run as its task, {task}: {what}",
            where=spec,
            hint="mend the files of the model that say it, or export it with --task tensors",
        ) from e


def _knows(task: TextTask, text: str) -> bool:
    return bool(len(task.tokenizer.encode(text, special=False)[0]))


def _precision(model: ir.Model) -> str | None:
    """The precision of most bytes of the weights, or None where no weight is of floats."""
    names = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64"}
    found: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.name in names:
            found[names[tensor.dtype.name]] += tensor.nbytes
    return found.most_common(1)[0][0] if found else None


def _tools(kind: str) -> dict[str, str]:
    packages = ["numpy", "onnx-ir", "onnxscript", "tokenizers"]
    packages += ["torch"] if kind != "onnx" else []
    packages += ["transformers"] if importlib.util.find_spec("transformers") else []
    versions = {p: importlib.metadata.version(p).split("+")[0] for p in packages}
    import onnxruntime

    own = importlib.metadata.version("onnxpress")
    return {**versions, "onnxruntime": onnxruntime.__version__, "onnxpress": own}
