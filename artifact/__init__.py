"""The artifact: a directory that holds a model, what a task needs to use it, and the proof of both.

Written to a temporary sibling and renamed, so that nobody ever sees half of one. The format is
described for other readers and writers in docs/artifact.md; this package is its only owner.

    kinds.py        what kind of JSON each field of a manifest is
    dimensions.py   numbers, names and expressions over names, and their sizes

Reading a manifest and checking the files need the standard library alone: the runtime does both
without onnx in the process. Only `save_model` and `open_model` load onnx_ir.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, MissingPackage, OutputError
from . import kinds
from .dimensions import evaluate as evaluate
from .dimensions import is_symbol as is_symbol

if TYPE_CHECKING:
    import onnx_ir as ir

FORMAT = 1
MODEL, WEIGHTS, MANIFEST = "model.onnx", "model.onnx.data", "manifest.json"
MEASURED, REPORT = "measured.json", "report.html"  # they hold times: no two runs write the same
UNLISTED = {MANIFEST, MEASURED, REPORT}

# What ONNX Runtime takes at most (1.31 refuses IR 14 and opset 27), and what we write.
ORT_RANGE = ">=1.31,<1.33"
IR_VERSION = 11
MAX_IR_VERSION = 13
MAX_OPSET = 26

# Memory-mapped weights start on a page of the usual size; smaller tensors are packed densely.
ALIGNMENT = 4096
ALIGN_THRESHOLD = 65536
EXTERNAL_THRESHOLD = 1024  # bytes; smaller constants stay in the graph, where passes read them


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: its name, its numpy dtype name, and its shape.

    A dimension is a number, the name of one that varies (the same name is the same size
    everywhere), or an expression over such names (`past_sequence + sequence`).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says; every field is described in docs/artifact.md.

    Attributes:
        task: embed, classify, answer, generate, translate or tensors.
        source: `spec` as the user gave it, `kind`, `weights_sha256`.
        target: `provider`, `precision`, `opset`.
        inputs: The graph's inputs, in order.
        outputs: The graph's outputs, in order.
        settings: What the task needs (pooling, labels, end-of-text ids, ...).
        kv: Layout of the key-value cache of a generate artifact, or None.
        ops: Operator counts of the graph, `domain::Name` outside ai.onnx.
        passes: Each pass in order: `name`, `changed`, `ops` (count differences), `hits`, `notes`.
        fusions: Each kind of layer: `kind`, `fused`, `lifted`, `missed`; None where not recorded.
        parity: What was compared, and how far apart it was; None where there was no reference.
        precision: Of a graph that is not float32: how it was made, its drift, its layers; or None.
        placement: Which nodes the kernels of its target do not take, and why; None for the CPU.
        tools: Versions that made it.
        files: For each other file: `bytes` and `sha256`. Filled in by `Staging.publish`.
        sha256: Of the manifest's own text without this field. Filled in by `Staging.publish`.
    """

    task: str
    source: dict[str, Any]
    target: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    kv: dict[str, Any] | None = None
    ops: dict[str, int] = field(default_factory=dict)
    passes: list[dict[str, Any]] = field(default_factory=list)
    fusions: list[dict[str, Any]] | None = None
    parity: dict[str, Any] | None = None
    precision: dict[str, Any] | None = None
    placement: dict[str, Any] | None = None
    runtime: dict[str, Any] = field(default_factory=lambda: {"onnxruntime": ORT_RANGE})
    tools: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    sha256: str = ""
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of manifest.json: sorted keys, no clocks, no host names."""
        return _text(asdict(self))


def _text(raw: dict[str, Any]) -> str:
    return json.dumps(raw, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _own_sha256(raw: dict[str, Any]) -> str:
    rest = {name: value for name, value in raw.items() if name != "sha256"}
    return hashlib.sha256(_text(rest).encode()).hexdigest()


# Reading ------------------------------------------------------------------------------------


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check manifest.json, not the files that it lists.

    Raises:
        ArtifactError: There is no artifact here, or its manifest is damaged or newer than this
            version of onnxpress reads.
    """
    path = Path(directory) / MANIFEST
    again = "make the artifact again from its source"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        own = _own_sha256(raw) if isinstance(raw, dict) else ""
    except (FileNotFoundError, NotADirectoryError):
        kind = "it has no manifest.json" if Path(directory).is_dir() else "it is no directory"
        if not Path(directory).exists():
            kind = "there is no such directory"
        raise ArtifactError(
            f"this is no onnxpress artifact: {kind}",
            where=str(directory),
            hint="make one with `onnxpress press SOURCE -o DIR`",
        ) from None
    except (OSError, ValueError, RecursionError) as e:
        raise ArtifactError(f"manifest.json cannot be read: {e}", where=str(path)) from None
    version = raw.get("format") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise ArtifactError(
            f"the artifact is of format {version}; this onnxpress reads up to format {FORMAT}",
            where=str(path),
            hint="pip install --upgrade onnxpress",
        )
    if isinstance(raw, dict) and raw.get("sha256", own) != own:
        raise ArtifactError(
            "manifest.json was changed after it was published: its sha256 differs",
            where=str(path),
            hint=again,
        )
    if said := _complaint(raw):
        raise ArtifactError(f"manifest.json is damaged: {said}", where=str(path), hint=again)
    specs = {
        side: tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in raw[side])
        for side in ("inputs", "outputs")
    }
    return Manifest(**{**raw, **specs})


def _complaint(raw: Any) -> str | None:
    """What is wrong with the fields of a manifest, or None."""
    if said := kinds.complaint(raw, kinds.MANIFEST):
        return said
    if unknown := sorted(raw.keys() - {f.name for f in fields(Manifest)}):
        return f"this version knows no field {unknown[0]!r}"
    if raw["format"] != FORMAT:
        return f"there is no format {raw['format']}"
    return None if MODEL in raw["files"] else f"files does not list {MODEL}"


def check_files(directory: str | os.PathLike[str], manifest: Manifest, *, hashes: bool) -> None:
    """Check that every file the manifest lists is there and has its size, and its sha256 too.

    Raises:
        ArtifactError: A file is missing, cut or changed; `where` names it.
    """
    for name, want in sorted(manifest.files.items()):
        path = Path(directory) / name
        hint = "copy the artifact again, or make it again from its source"
        if Path(name).name != name or name == ".." or "\0" in name:
            raise ArtifactError(f"the manifest lists a file outside the artifact: {name!r}")
        if not path.is_file():
            raise ArtifactError("a file of the artifact is missing", where=str(path), hint=hint)
        if (size := path.stat().st_size) != want["bytes"]:
            raise ArtifactError(
                f"the file has {size} bytes, the manifest says {want['bytes']}",
                where=str(path),
                hint=hint,
            )
        if hashes and sha256(path) != want["sha256"]:
            raise ArtifactError(
                "the file is not the one that was published: its sha256 differs",
                where=str(path),
                hint=hint,
            )


def open_model(path: str | os.PathLike[str]) -> ir.Model:
    """The graph of an artifact directory or an .onnx file, its weights left on disk until read."""
    onnx_ir = _onnx_ir()
    path = Path(path) / MODEL if Path(path).is_dir() else Path(path)
    if path.is_file() and path.stat().st_size >= 1 << 31:  # it would be read, and called corrupt
        what, hint = "a protobuf above 2 GB cannot be read", "save it with external data"
        raise ArtifactError(what, where=str(path), hint=hint)
    try:
        model: ir.Model = onnx_ir.load(path)
        return model
    except Exception as e:  # protobuf and onnx_ir raise many kinds for a damaged file
        said: BaseException = e
        while said.__cause__ is not None:  # the innermost says what failed, the others where
            said = said.__cause__
        raise ArtifactError(f"the graph cannot be read: {said}", where=str(path)) from e


def sha256(*paths: str | os.PathLike[str]) -> str:
    """One sha256 over the contents of the files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


# Writing ------------------------------------------------------------------------------------


class Staging:
    """A directory beside the output, filled file by file and then published in one rename."""

    def __init__(self, path: Path, final: Path, *, force: bool = False) -> None:
        self.path, self.final, self.force = path, final, force
        self.published = False

    def write(self, name: str, content: str | bytes) -> None:
        """Write one file."""
        data = content.encode() if isinstance(content, str) else content
        (self.path / name).write_bytes(data)

    def files(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of each file that a manifest lists."""
        paths = sorted(p for p in self.path.iterdir() if p.name not in UNLISTED)
        return {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths}

    def publish(self, manifest: Manifest) -> Manifest:
        """Hash what is here, write the manifest, and rename the whole to its final name.

        Raises:
            OutputError: The place was taken while this was being made.
        """
        manifest = replace(manifest, files=self.files())
        manifest = replace(manifest, sha256=_own_sha256(asdict(manifest)))
        self.write(MANIFEST, manifest.to_json())
        read_manifest(self.path)  # what cannot be read is not published
        check_output(self.final, force=self.force)  # again: the work took its time
        old = None
        if self.force and self.final.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{self.final.name}.old-", dir=self.final.parent))
        try:
            if old:
                os.replace(self.final, old / "artifact")
            os.rename(self.path, self.final)  # onto nothing, or onto an empty directory
        except BaseException as e:  # Ctrl-C too: the old artifact is all there is
            if old and not self.final.exists():
                os.replace(old / "artifact", self.final)
            if isinstance(e, OSError) and e.errno in _TAKEN:
                raise OutputError("the output was taken meanwhile", where=str(self.final)) from None
            raise
        finally:
            if old:
                shutil.rmtree(old, ignore_errors=True)
        self.published = True
        return manifest


_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


@contextlib.contextmanager
def stage(final: str | os.PathLike[str], *, force: bool = False) -> Iterator[Staging]:
    """Open a `Staging` for the directory `final`; whatever ends the block, no half is left.

    Args:
        final: The artifact directory to be.
        force: Replace an artifact that is there. Never replaces anything that is not one.

    Raises:
        OutputError: The place is taken or cannot be written, or the disk filled up.
    """
    final = Path(os.path.abspath(final))
    check_output(final, force=force)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        path = final.with_name(f".{final.name}.{secrets.token_hex(4)}")
        path.mkdir()  # not mkdtemp's: the umask says who may read an artifact
    except OSError as e:
        raise OutputError(
            f"cannot write here: {e.strerror or e}",
            where=str(final.parent),
            hint="choose another directory with -o",
        ) from None
    staging = Staging(path, final, force=force)
    try:
        yield staging
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"the disk is full ({e.strerror}); nothing was published",
                where=str(final.parent),
                hint="free some space, or choose another directory with -o",
            ) from None
        raise
    finally:
        if not staging.published:
            shutil.rmtree(path, ignore_errors=True)


def check_output(final: str | os.PathLike[str], *, force: bool = False) -> None:
    """Refuse an output that is taken, before any work is done for it.

    Raises:
        OutputError: Something is there; with `force`, something that is no artifact.
    """
    final = Path(final)
    if not (final.exists() or final.is_symlink()):
        return
    if final.is_dir() and not final.is_symlink() and not any(final.iterdir()):
        return
    if not (final / MANIFEST).is_file():
        raise OutputError(
            "the output exists and is no onnxpress artifact",
            where=str(final),
            hint="choose another directory with -o; --force replaces artifacts only",
        )
    if not force:
        raise OutputError(
            "the output exists", where=str(final), hint="add --force to replace the artifact"
        )
    hint = "choose another directory with -o, or remove it yourself"
    try:
        ours = {*UNLISTED, *read_manifest(final).files}
    except ArtifactError as e:
        raise OutputError(
            f"the output exists and is no artifact that can be read: {e.what}",
            where=str(final),
            hint=hint,
        ) from None
    if foreign := sorted({p.name for p in final.iterdir()} - ours):
        raise OutputError(
            f"the output holds {foreign[0]}, which is not of the artifact",
            where=str(final),
            hint=hint,
        )


def save_model(model: ir.Model, directory: str | os.PathLike[str]) -> None:
    """Write model.onnx and, where there are weights, model.onnx.data, tensor by tensor.

    Weights go from where they lie to the file in turn: nothing is loaded twice, and a graph
    past protobuf's 2 GiB is written like any other.
    """
    ir = _onnx_ir()
    if model.ir_version is None or model.ir_version > MAX_IR_VERSION:
        model.ir_version = IR_VERSION
    ir.save(
        model,
        Path(directory) / MODEL,
        external_data=WEIGHTS,
        size_threshold_bytes=EXTERNAL_THRESHOLD,
        alignment=ALIGNMENT,
        align_threshold=ALIGN_THRESHOLD,
    )


def _onnx_ir() -> Any:
    try:
        import onnx_ir
    except ImportError:
        raise MissingPackage(
            "reading or writing a graph needs onnx_ir", hint="pip install 'onnxpress[export]'"
        ) from None
    return onnx_ir
