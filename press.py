"""The whole road: source -> capture -> optimize -> check against PyTorch -> measure -> artifact.

This is the only module that sees every room. What one room needs of another it is handed from
here: the exporter's check gets a function that runs ONNX Runtime, never the runtime itself.
Rooms that load torch are imported inside the functions, so that `import onnxpress` stays light.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import artifact
from .artifact import Manifest, TensorSpec, evaluate
from .errors import ArtifactError, GateError, MissingPackage, OnnxpressError, UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

    from .exporter import Parity, Reference, Source
    from .runtime import Session

PathLike = str | os.PathLike[str]
Progress = Callable[[str], None]

EXPORT_HINT = "pip install 'onnxpress[export]' (and [cpu] or [gpu] to run it)"


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

    The graph is the portable one: ai.onnx ops only, cleaned, not lowered for any target.

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
    with _needs_export():
        from . import exporter, optimizers
        from .optimizers.observers import from_environment
        from .runtime import Session
    target = _target(target_name)
    with artifact.stage(out, force=force) as staging:
        progress(f"read {spec}")
        source = exporter.resolve(spec, task=task, trust_pickle=trust_pickle)
        progress("capture the graph")
        model, notes = _graph(source)
        # The adopted graph of an ONNX file is its own reference: opened before a pass sees it.
        reference = _reference(source)
        if target_name or source.kind != "onnx":
            progress(f"optimize for {target_name or 'any target'}")
            steps = optimizers.optimize(model, target, observers=from_environment())
        else:
            steps = []
        progress("write the weights")
        artifact.save_model(model, staging.path)
        session = Session(staging.path)
        progress(f"check against {reference.name}")
        parity = exporter.check(
            reference, session.run, session.inputs, progress=lambda p: progress(f"  {p}")
        )
        if not allow_drift:
            exporter.refuse(parity, what="the optimized graph" if target_name else "the graph")
        for name, content in source.files.items():
            staging.write(name, content)
        if measure:
            progress("measure")
            rows = time_against(session, reference, _default_shapes(session, reference))
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
                "precision": target.precision,
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
        progress("publish")
        return staging.publish(manifest)


def _target(name: str | None) -> Any:
    from .optimizers import TARGETS

    if name not in (None, "cpu"):
        raise UsageError(
            f"the target {name!r} cannot be lowered for yet",
            hint="this version lowers for: cpu; `onnxpress export` writes a portable graph",
        )
    return TARGETS["cpu"]


def _graph(source: Source) -> tuple[ir.Model, list[str]]:
    from .exporter import capture

    if source.graph is not None:
        return source.graph, []
    captured = capture(source)
    return captured.model, captured.notes


def _reference(source: Source) -> Reference:
    """PyTorch; for an adopted ONNX file the file itself, run without any optimization."""
    from .exporter import Reference, pytorch
    from .runtime import Session, random_feeds

    if source.module is not None:
        return pytorch(source)
    original = Session(source.spec, optimize=False)
    names = dict.fromkeys(
        d for spec in original.inputs for d in spec.shape if isinstance(d, str) and d.isidentifier()
    )
    sizes = {name: 2 + i for i, name in enumerate(names)}
    return Reference(
        name="the adopted file",
        run=lambda feeds: list(original.run(feeds).values()),
        examples=random_feeds(original.inputs, sizes, high=dict.fromkeys(_names(original), 2)),
    )


def _names(session: Session) -> list[str]:
    return [spec.name for spec in session.inputs]


def _tools(kind: str) -> dict[str, str]:
    packages = ["numpy", "onnx-ir", "onnxscript", "tokenizers"]
    packages += ["torch"] if kind != "onnx" else []
    packages += ["transformers"] if importlib.util.find_spec("transformers") else []
    versions = {p: importlib.metadata.version(p).split("+")[0] for p in packages}
    import onnxruntime

    return {**versions, "onnxruntime": onnxruntime.__version__, "onnxpress": _own_version()}


def _own_version() -> str:
    return importlib.metadata.version("onnxpress")


@contextmanager
def _needs_export() -> Iterator[None]:
    try:
        yield
    except ImportError as e:
        raise MissingPackage(
            f"exporting needs {e.name or e}, which is not installed", hint=EXPORT_HINT
        ) from e


# Verify -------------------------------------------------------------------------------------


@dataclass
class Finding:
    """One check of `verify`: what, whether it passed (None: it could not be made), and why."""

    check: str
    passed: bool | None
    detail: str


def verify(
    directory: PathLike,
    *,
    source: str | None = None,
    trust_pickle: bool = False,
    progress: Progress = lambda _: None,
) -> list[Finding]:
    """Check an artifact again: its files, its signature, and PyTorch where the source is at hand.

    Args:
        directory: The artifact.
        source: Where its source lies now; the one that the manifest names where None.
        trust_pickle: As in `export`.
        progress: Told each step as it begins.

    Raises:
        ArtifactError: A file is missing or changed, or the graph has another signature.
        GateError: The graph does not compute what PyTorch computes.
    """
    manifest = artifact.read_manifest(directory)
    progress("hash the files")
    artifact.check_files(directory, manifest, hashes=True)
    found = [Finding("files", True, f"{len(manifest.files)} files have the published sha256")]
    from .runtime import Session

    progress("open the session")
    session = Session(directory)
    for side in ("inputs", "outputs"):
        have, want = getattr(session, side), getattr(manifest, side)
        if [str(s) for s in have] != [str(s) for s in want]:
            raise ArtifactError(
                f"the graph's {side} are not those of the manifest: "
                f"{', '.join(map(str, have))} against {', '.join(map(str, want))}",
                where=str(directory),
                hint="make the artifact again from its source",
            )
    found.append(Finding("signature", True, "; ".join(map(str, session.inputs))))
    found.append(_verify_parity(manifest, session, source, trust_pickle, progress))
    return found


def _verify_parity(
    manifest: Manifest,
    session: Session,
    source: str | None,
    trust_pickle: bool,
    progress: Progress,
) -> Finding:
    spec = source or str(manifest.source["spec"])
    try:
        with _needs_export():
            from . import exporter
        progress(f"read {spec}")
        built = exporter.resolve(spec, task=manifest.task, trust_pickle=trust_pickle)
        reference = _reference(built)
    except OnnxpressError as e:
        if source:
            raise
        return Finding("parity", None, f"the source is not at hand: {e.what}")
    if built.weights_sha256 != manifest.source["weights_sha256"]:
        if source:
            raise GateError(
                "the source's weights are not those that the artifact was made of",
                where=spec,
                hint="press it again, or name the source as it was",
            )
        return Finding("parity", None, f"{spec} has other weights by now: not compared")
    progress(f"check against {reference.name}")
    parity = exporter.check(
        reference, session.run, session.inputs, progress=lambda p: progress(f"  {p}")
    )
    recorded = (manifest.parity or {}).get("allowed_drift", False)
    if not recorded:
        exporter.refuse(parity)
    return Finding("parity", parity.passed, describe(parity))


def describe(parity: Parity) -> str:
    """One line on a check that was made."""
    worst = max(parity.max_abs.values(), default=0.0)
    text = f"{len(parity.points)} points against {parity.reference}, max |difference| {worst:.1e}"
    return text if parity.passed else f"{text}; drift was allowed: {parity.worst}"


# Measure ------------------------------------------------------------------------------------


@dataclass
class Shape:
    """Sizes of the dimensions that vary, for one row of a table."""

    dims: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(f"{n}={v}" for n, v in self.dims.items()) or "fixed shapes"


def bench(
    directory: PathLike,
    *,
    against: str | None = None,
    source: str | None = None,
    batch: Sequence[int] = (1, 8),
    length: Sequence[int] = (16, 128),
    threads: int | None = None,
    rounds: int = 9,
    trust_pickle: bool = False,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Time an artifact, and PyTorch on the same weights beside it, interleaved in one run.

    Args:
        directory: The artifact.
        against: "torch" to time PyTorch too; it needs the source.
        source: Where the source lies, where it is not where the manifest says.
        batch: Sizes of the first dimension that varies.
        length: Sizes of the others (past caches stay empty).
        threads: Of both contestants; None for what each takes by itself.
        rounds: Of which the median is kept; at least 9.

    Returns:
        The machine, the versions and the rows, medians in milliseconds.

    Raises:
        UsageError: The source cannot be found, or a size does not fit.
    """
    from .runtime import Session

    manifest = artifact.read_manifest(directory)
    artifact.check_files(directory, manifest, hashes=False)
    if against not in (None, "torch"):
        raise UsageError(f"cannot measure against {against!r}", hint="--against torch")
    if rounds < 9:
        raise UsageError(f"{rounds} rounds are too few for a median worth quoting", hint="9")
    session = Session(directory, threads=threads)
    reference = None
    if against:
        with _needs_export():
            from . import exporter
        progress("read the source")
        spec = source or str(manifest.source["spec"])
        built = exporter.resolve(spec, task=manifest.task, trust_pickle=trust_pickle)
        if built.module is None:
            raise UsageError("the source is an ONNX file: there is no PyTorch to compare with")
        reference = _reference(built)
    names = _symbols(session.inputs)
    shapes = [
        Shape({n: b if i == 0 else 0 if "past" in n else s for i, n in enumerate(names)})
        for b in batch
        for s in length
    ]
    unique = list({str(s): s for s in shapes}.values())
    return time_against(session, reference, unique, threads=threads, rounds=rounds)


def time_against(
    session: Session,
    reference: Reference | None,
    shapes: Sequence[Shape],
    *,
    threads: int | None = None,
    rounds: int = 9,
) -> dict[str, Any]:
    """Medians of a session and of its reference at each shape, interleaved."""
    from .runtime import random_feeds, time_runs

    def one(shape: Shape) -> dict[str, Any]:
        feeds = random_feeds(session.inputs, shape.dims)
        high = reference.highs if reference else None
        feeds = random_feeds(session.inputs, shape.dims, high=high)
        contestants: dict[str, Callable[[], object]] = {"onnxpress": lambda: session.run(feeds)}
        if reference:
            contestants[reference.name.split()[0]] = lambda: reference.run(feeds)
        timed = time_runs(contestants, rounds=rounds)
        medians = {name: round(t.median, 3) for name, t in timed.items()}
        row: dict[str, Any] = {**shape.dims, "ms": medians}
        if reference and "torch" in medians:
            row["speedup"] = round(medians["torch"] / medians["onnxpress"], 2)
        return row

    with _torch_threads(threads if reference else None):
        rows = [one(shape) for shape in shapes]
    import onnxruntime

    return {
        "machine": {"cpu": _cpu(), "cores": os.cpu_count()},
        "versions": {"onnxruntime": onnxruntime.__version__}
        | ({"reference": reference.name} if reference else {}),
        "threads": threads,
        "rounds": rounds,
        "rows": rows,
    }


def _default_shapes(session: Session, reference: Reference) -> list[Shape]:
    """One at the batch and length of a single request, one of a batch; the traced size else."""
    names = _symbols(session.inputs)
    if "sequence" in names:
        return [
            Shape({n: 0 if "past" in n else {"batch": b}.get(n, s) for n in names})
            for b, s in ((1, 16), (1, 128), (8, 128))
            if s <= reference.limits.get("sequence", s)
        ]
    sizes: dict[str, int] = {}
    for spec in session.inputs:
        for dim, n in zip(spec.shape, reference.examples[spec.name].shape, strict=True):
            if isinstance(dim, str):
                sizes.setdefault(dim, n)
    return [Shape({n: sizes[n] for n in names})]


def _symbols(inputs: Sequence[TensorSpec]) -> list[str]:
    dims = (d for spec in inputs for d in spec.shape if isinstance(d, str))
    return list(dict.fromkeys(d for d in dims if evaluate(d, {d: 1}) == 1 and d.isidentifier()))


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    from .exporter.parity import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [x.split(":", 1)[1].strip() for x in text.splitlines() if x.startswith("model name")]
    return names[0] if names else platform.machine()


__all__ = ["Finding", "Manifest", "asdict", "bench", "export", "press", "verify"]
