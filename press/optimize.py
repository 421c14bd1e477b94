"""optimize: the passes alone, on a graph that is there already."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import artifact
from ..artifact import Manifest
from ..errors import OutputError, SourceError, UsageError
from .road import Given, Order, road
from .wish import wish_of

if TYPE_CHECKING:
    import onnx_ir as ir

TARGETS = ("cpu", "openvino", "cuda", "tensorrt")


def optimize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    target: str = "cpu",
    until: str | None = None,
    skip: Sequence[str] = (),
    require_fused: bool = False,
    with_onnxsim: bool = False,
    precision: str = "fp32",
    calibration: str | os.PathLike[str] | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    max_drift: float | None = None,
    calibrator: str | None = None,
    prune: str | None = None,
    half_io: bool = False,
    shapes: Mapping[str, tuple[int, int, int]] | None = None,
    measure: bool = True,
    force: bool = False,
    allow_drift: bool = False,
    allow_fallback: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Optimize an ONNX file or an artifact for a target, check it against itself, publish it.

    An artifact keeps its task, its settings, its tokenizer and the record of its source. What is
    lowered for cuda and tensorrt is checked on the CPU too; where it holds an op that the CPU has
    no kernel for, a note of the manifest names the op, and `parity` is None.

    Args:
        source: An .onnx file, or the directory of an artifact.
        out: The artifact directory to write; never `source` itself.
        target: cpu, openvino, cuda or tensorrt.
        until: Stop after the first pass of this name.
        skip: Names of passes to leave out.
        require_fused: Refuse to publish where a layer stays unfused.
        with_onnxsim: Let onnxsim simplify the graph too.
        precision, calibration, evaluation, max_drift, calibrator, prune,
            half_io, shapes: As in `press`.
        measure: Whether a change of precision has to be faster too; for cpu alone.
        force: Replace an artifact that is at `out`.
        allow_fallback: Publish even where the target has no kernel for a node.
        allow_drift: Publish even where the check fails, and record it.
        progress: Told each step as it begins.

    Returns:
        The manifest of the published artifact.

    Raises:
        GateError: The graph does not compute what it computed before, or layers stay unfused
            where `require_fused`; the error lists them.
        ArtifactError: The artifact is damaged.
        UsageError: The source cannot be read, no pass has that name, or `out` cannot be written.
    """
    spec, path = os.fspath(source), Path(source)
    check_target(target, shapes)
    _check_source(path)
    _check_apart(path, Path(out))
    wish = wish_of(precision, calibration, evaluation, max_drift, calibrator, prune, half_io)
    order = Order(
        spec,
        out,
        target=target,
        until=until,
        skip=tuple(skip),
        with_onnxsim=with_onnxsim,
        require_fused=require_fused,
        force=force,
        allow_drift=allow_drift,
        allow_fallback=allow_fallback,
        times=True,
        measure=measure and bool(wish),
        wish=wish,
        shapes=dict(shapes or {}),
        progress=progress,
    )
    return road(order, lambda: _artifact(path) if path.is_dir() else _file(spec))


def check_target(target: str, shapes: Mapping[str, tuple[int, int, int]] | None) -> None:
    """Refuse a target that there is not, and shapes for one that takes any.

    Raises:
        UsageError: It is so.
    """
    if target not in TARGETS:
        raise UsageError(f"there is no target {target!r}", hint="one of " + ", ".join(TARGETS))
    if shapes and target != "tensorrt":
        raise UsageError(
            f"shapes have no use with the target {target}: it takes any",
            hint="--shapes is for --target tensorrt, whose engines are built for a range",
        )


def _check_source(path: Path) -> None:
    takes = "optimize takes an .onnx file or an artifact; `onnxpress press` takes other sources"
    if not path.exists():
        raise SourceError("there is no such file or directory", where=str(path), hint=takes)
    if path.is_dir() and not (path / artifact.MANIFEST).is_file():
        raise SourceError(
            "the directory is no artifact: it has no manifest.json", where=str(path), hint=takes
        )
    if path.is_file() and path.suffix != ".onnx":
        raise SourceError("the name of the file does not end in .onnx", where=str(path), hint=takes)


def _check_apart(source: Path, out: Path) -> None:
    # Also with --force: it would replace what is being read.
    given = source.resolve()
    if out.resolve() in (given, given.parent if given.name == artifact.MODEL else given):
        raise OutputError(
            "the output is the input",
            where=str(out),
            hint="choose another directory with -o; remove the old one afterwards",
        )


def _file(spec: str) -> Given:
    from .. import exporter

    return Given(exporter.resolve(spec), file=spec)


def _artifact(path: Path) -> Given:
    from ..exporter import Source

    before = artifact.read_manifest(path)
    artifact.check_files(path, before, hashes=True)
    model = artifact.open_model(path)
    weights = _weight_files(model)
    files = {
        name: (path / name).read_bytes()
        for name in sorted(before.files)
        if name not in {artifact.MODEL, *weights}
    }
    provider = before.target.get("provider", "any")
    note = f"optimized again: it was lowered for {provider}, in an artifact {before.sha256[:12]}"
    source = Source(
        spec=str(before.source["spec"]),
        kind=str(before.source["kind"]),
        task=before.task,
        module=None,
        settings=before.settings,
        kv=before.kv,
        files=files,
        weights_sha256=str(before.source["weights_sha256"]),
        graph=model,
        notes=[*before.source.get("notes", []), note],
    )
    return Given(source, file=path, before=before)


def _weight_files(model: ir.Model) -> set[str]:
    import onnx_ir as ir

    return {artifact.WEIGHTS} | {
        str(value.const_value.location)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
