"""The whole road: source -> capture -> optimize -> check against PyTorch -> measure -> artifact.

This is the only module that sees every room. What one room needs of another it is handed from
here: the exporter's check gets a function that runs ONNX Runtime, never the runtime itself.
Rooms that load torch are imported inside the functions, so that `import onnxpress` stays light.

    common.py   a source's reference, the export extra
    proof.py    verify: files, signature and parity again
    timing.py   bench: interleaved medians
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import artifact
from ..artifact import Manifest
from ..errors import ArtifactError, ExportError, OnnxpressError, ProviderError, UsageError
from .common import needs_export, reference_of
from .proof import Finding, verify
from .timing import bench, default_shapes, time_against

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..exporter import Source
    from ..runtime import Session
    from ..runtime.tasks import TextTask

__all__ = ["Finding", "bench", "export", "press", "verify"]

PathLike = str | os.PathLike[str]
Progress = Callable[[str], None]


def export(
    source: str,
    out: PathLike,
    *,
    task: str | None = None,
    force: bool = False,
    allow_drift: bool = False,
    trust_pickle: bool = False,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Export a model, check it against PyTorch, and publish it as an artifact.

    The graph is the portable one: ai.onnx ops only, cleaned, its masks in the form that the CPU
    kernel takes and that every other one takes too.

    Args:
        source: A Hugging Face directory or hub id, `package.module:factory`,
            `path/to/file.py:factory`, a name of models/, or an .onnx file.
        out: The artifact directory to write.
        task: embed, classify, answer, generate, translate or tensors; found where None.
        force: Replace an artifact that is at `out`.
        allow_drift: Publish even where the check fails, and record it.
        trust_pickle: Read pickled weights, which can run code of whoever wrote them.
        progress: Told each step as it begins.

    Returns:
        The manifest of the published artifact.

    Raises:
        GateError: The graph does not compute what PyTorch computes.
        UsageError: The source cannot be found, built or captured, or `out` cannot be written.
    """
    return _road(source, out, None, task, force, allow_drift, trust_pickle, False, progress)


def press(
    source: str,
    out: PathLike,
    *,
    target: str = "cpu",
    task: str | None = None,
    force: bool = False,
    allow_drift: bool = False,
    trust_pickle: bool = False,
    measure: bool = True,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Export a model, optimize it for a target, check and measure it, and publish it.

    Args:
        target: What it is lowered for: cpu.
        measure: Time it against PyTorch and keep the table in measured.json.

    The other arguments, what is returned and what is raised are those of `export`.
    """
    return _road(source, out, target, task, force, allow_drift, trust_pickle, measure, progress)


def _road(
    spec: str,
    out: PathLike,
    target_name: str | None,
    task: str | None,
    force: bool,
    allow_drift: bool,
    trust_pickle: bool,
    measure: bool,
    progress: Progress,
) -> Manifest:
    artifact.check_output(out, force=force)
    _check_target(target_name)
    with needs_export():
        from .. import exporter, optimizers
        from ..optimizers.observers import from_environment
        from ..runtime import Session
    target = optimizers.TARGETS["cpu"]
    observers = from_environment()
    with artifact.stage(out, force=force) as staging:
        progress(f"read {spec}")
        source = exporter.resolve(spec, task=task, trust_pickle=trust_pickle)
        progress("capture the graph")
        model, notes = _graph(source)
        # The adopted graph of an ONNX file is its own reference: opened before a pass sees it.
        reference = reference_of(source)
        if target_name or source.kind != "onnx":
            progress(f"optimize for {target_name or 'any target'}")
            steps = optimizers.optimize(model, target, observers=observers)
        else:
            steps = []
        progress("write the weights")
        artifact.save_model(model, staging.path)
        session = _open(Session, staging.path, spec)
        progress(f"check against {reference.name}")
        parity = exporter.check(
            reference,
            session.run,
            session.inputs,
            session.outputs,
            progress=lambda p: progress(f"  {p}"),
        )
        if not allow_drift:
            exporter.refuse(parity, what="the optimized graph" if target_name else "the graph")
        if parity.misstated:
            exporter.restate(model, parity.misstated)
            artifact.save_model(model, staging.path)
            session = _open(Session, staging.path, spec)
        for name, content in source.files.items():
            staging.write(name, content)
        if measure:
            progress("measure")
            rows = time_against(session, reference, default_shapes(session, reference))
            staging.write(artifact.MEASURED, json.dumps(rows, indent=2) + "\n")
        manifest = Manifest(
            task=source.task,
            source={
                "spec": spec,
                "kind": source.kind,
                "weights_sha256": source.weights_sha256,
                "notes": [*source.notes, *notes],
            },
            target={
                "provider": target_name or "any",
                "precision": _precision(model) or target.precision,
                "opset": model.opset_imports.get("", 0),
            },
            inputs=session.inputs,
            outputs=session.outputs,
            settings=source.settings,
            kv=source.kv,
            ops=optimizers.count_ops(model),
            passes=[
                {"name": s.name, "changed": s.changed, "ops": s.ops, "notes": list(s.notes)}
                for s in steps
            ],
            parity={**parity.summary(), "allowed_drift": allow_drift and not parity.passed},
            tools=_tools(source.kind),
        )
        if source.task != "tensors":
            progress("try the task")
            session.manifest = manifest
            _try_task(session, source.task, spec)
        progress("publish")
        return staging.publish(manifest)


def _check_target(name: str | None) -> None:
    if name not in (None, "cpu"):
        raise UsageError(
            f"the target {name!r} cannot be lowered for yet",
            hint="this version lowers for: cpu; `onnxpress export` writes a portable graph",
        )


def _open(session: type[Session], path: Path, spec: str) -> Session:
    try:
        return session(path)
    except (ProviderError, ArtifactError) as e:  # `path` is about to go: name the source instead
        raise ExportError(
            f"ONNX Runtime does not open the graph: {e.what}",
            where=spec,
            hint="no CPU kernel for an op, or for its dtype: replace it, or export module.float()",
        ) from e


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


def _graph(source: Source) -> tuple[ir.Model, list[str]]:
    from ..exporter import capture

    if source.graph is not None:
        return source.graph, []
    captured = capture(source)
    return captured.model, captured.notes


def _tools(kind: str) -> dict[str, str]:
    packages = ["numpy", "onnx-ir", "onnxscript", "tokenizers"]
    packages += ["torch"] if kind != "onnx" else []
    packages += ["transformers"] if importlib.util.find_spec("transformers") else []
    versions = {p: importlib.metadata.version(p).split("+")[0] for p in packages}
    import onnxruntime

    return {**versions, "onnxruntime": onnxruntime.__version__, "onnxpress": _own_version()}


def _own_version() -> str:
    return importlib.metadata.version("onnxpress")
