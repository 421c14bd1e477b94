"""Engines on disk, each set in a directory of its own that says what it was built for.

    <cache>/<key>/key.json      what the key stands for, and the sha256 of every file beside it
    <cache>/<key>/*.engine      TensorRT's engines
    <cache>/<key>/model_ctx.onnx    a graph of one EPContext node that names the engine
    <cache>/<key>.lock          held while somebody builds
    <cache>/timing-<machine>/   measured kernels, which make the next engine cheaper to build

An engine fits one model, one set of options, one ONNX Runtime, one TensorRT and one GPU. ONNX
Runtime loads another one without a word, so all of these are in the key; and nothing is opened
that was not written whole: engines are built in a directory beside, sealed, and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifact import WEIGHTS, Manifest, sha256
from ..errors import OutputError, ProviderError

KEY, CONTEXT_MODEL, TIMING = "key.json", "model_ctx.onnx", "timing"
FORMAT = 1
AGAIN = "onnxpress warmup DIR"


def cache_directory(cache: str | os.PathLike[str] | None = None) -> Path:
    """Where engines are kept: the argument, $ONNXPRESS_CACHE, or onnxpress in the user's cache."""
    if cache is not None:
        return Path(cache)
    if own := os.environ.get("ONNXPRESS_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "onnxpress"


def model_sha256(model: Path, manifest: Manifest | None) -> str:
    """The sha256 of a graph and its weights.

    The graph is always read. Of an artifact the weights, which may be gigabytes, are taken from
    the manifest: whoever changes them in place must write the manifest again.
    """
    if manifest is not None:
        weights = manifest.files.get(WEIGHTS, {}).get("sha256", "")
        return hashlib.sha256(f"{sha256(model)} {weights}".encode()).hexdigest()
    if not model.stat().st_size:
        return sha256(model)  # nothing to map; ONNX Runtime says what is wrong with it
    return sha256(model, *_external_files(model))


def _external_files(model: Path) -> list[Path]:
    # StringStringEntryProto: key (field 1) "location", then value (field 2), its length in varint
    found = set()
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for match in re.finditer(rb"\n\x08location\x12([\x80-\xff]*[\x00-\x7f])", data):
            size = sum((byte & 0x7F) << 7 * n for n, byte in enumerate(match.group(1)))
            found.add(data[match.end() : match.end() + size].decode("utf-8", "replace"))
    return [path for name in sorted(found) if (path := model.parent / name).is_file()]


@dataclass(frozen=True)
class Sealed:
    """Engines that were checked and may be opened.

    Attributes:
        folder: Their directory.
        files: Size and sha256 of each file.
    """

    folder: Path
    files: Mapping[str, Mapping[str, Any]]

    @property
    def model(self) -> Path | None:
        """The EPContext model, which opens without parsing the graph again.

        None where the graph is of several engines, which such a model cannot hold: then the graph
        itself is opened, and each engine is found by its name.
        """
        alone = CONTEXT_MODEL in self.files and self.engines == 1
        return self.folder / CONTEXT_MODEL if alone else None

    @property
    def engines(self) -> int:
        """The number of engines."""
        return sum(name.endswith(".engine") for name in self.files)


@dataclass(frozen=True)
class Entry:
    """One set of engines: what it is for, and so where it lies.

    Attributes:
        cache: The cache's directory.
        model: `model_sha256` of the graph and its weights.
        options: The provider options that the engines depend on.
        machine: ONNX Runtime, TensorRT, GPU, compute capability and driver.
    """

    cache: Path
    model: str
    options: Mapping[str, str]
    machine: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name of its directory."""
        return _key(self._record())

    @property
    def folder(self) -> Path:
        """Its directory."""
        return self.cache / self.key

    def _record(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "options": dict(self.options),
            "machine": dict(self.machine),
        }

    # Opening ----------------------------------------------------------------------------------

    def check(self) -> Sealed | None:
        """The engines, every file of them checked; None where none were built.

        Each opening reads all of them for their sha256, which takes seconds for gigabytes: one that
        was changed may crash the process that loads it.

        Raises:
            ProviderError: The engines are for another GPU, driver, TensorRT or ONNX Runtime, a
                file is missing, cut short or changed, or one lies there that is not of them.
        """
        if not os.path.lexists(self.folder):
            self._refuse_other_machines()
            return None
        raw = _read(self.folder)
        if raw.get("machine") != dict(self.machine):  # copied here under this name
            raise self._foreign(self.folder, raw)
        if {n: raw.get(n) for n in self._record()} != self._record():
            raise _broken(self.folder, "its key.json is for another model or other options")
        files = _files(self.folder, raw)
        for name, want in files.items():
            path = self.folder / name
            if not path.is_file():
                raise _broken(path, "a file of the engine cache is missing")
            if (size := path.stat().st_size) != want["bytes"]:
                cut = "cut short" if size < want["bytes"] else "too long"
                said = f"it has {size} bytes, and {want['bytes']} were written"
                raise _broken(path, f"a file of the engine cache is {cut}: {said}")
            if sha256(path) != want["sha256"]:
                raise _broken(path, "a file of the engine cache was changed: its sha256 differs")
        if extra := sorted({p.name for p in self.folder.iterdir()} - {KEY, *files}):
            raise _broken(self.folder / extra[0], "the engine cache holds a file that is not of it")
        return Sealed(self.folder, files)

    def _refuse_other_machines(self) -> None:
        """Name engines of this model and these options that another machine or version built."""
        for path in sorted(self.cache.glob(f"*/{KEY}")) if self.cache.is_dir() else []:
            with contextlib.suppress(ProviderError):  # another's damage is another's matter
                raw = _read(path.parent)
                if all(raw.get(n) == self._record()[n] for n in ("format", "model", "options")):
                    found = self._foreign(path.parent, raw)
                    break
        else:
            return
        raise found

    def _foreign(self, folder: Path, raw: Mapping[str, Any]) -> ProviderError:
        machine = raw.get("machine")
        then = machine if isinstance(machine, dict) else {}
        differ = [
            f"{name} {then.get(name) or 'unknown'} (here: {self.machine.get(name) or 'unknown'})"
            for name in sorted({*then, *self.machine})
            if then.get(name) != self.machine.get(name)
        ]
        return ProviderError(
            f"the cached engines of this model were built for {', '.join(differ)}",
            where=str(folder),
            hint=f"build them here: `{AGAIN}` (the others stay), or delete {folder}",
        )

    # Building ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def build(self, *, rebuild: bool = True) -> Iterator[Path | None]:
        """A directory to build engines in; sealed and renamed to `folder` when the block ends.

        One process builds at a time, others wait; where two do at once all the same (a file
        system without locks), the last one's engines stay. What a block that raises has written
        is removed. Engines that were here before are replaced.

        Args:
            rebuild: Build engines again that are whole. Without, whoever has waited for another
                to build them gets None: there is nothing left to do.

        Raises:
            OutputError: The cache cannot be written, or a file that is not of the cache lies
                where the engines go.
        """
        with contextlib.ExitStack() as stack:
            with _writing(self.cache):
                self.cache.mkdir(parents=True, exist_ok=True)
                alone = stack.enter_context(_locked(self.cache / f"{self.key}.lock"))
                if not rebuild and self._whole():
                    yield None
                    return
                if alone:  # else what lies there may be another's, who is building now
                    for left in self.cache.glob(f".{self.key}.*"):  # of a build that was killed
                        shutil.rmtree(left, ignore_errors=True)
                building = self.cache / f".{self.key}.{secrets.token_hex(4)}"
                stack.callback(shutil.rmtree, building, ignore_errors=True)
                building.mkdir()
                self._timing(building, fetch=True)
            yield building
            with _writing(self.cache):
                self._timing(building, fetch=False)
                self._seal(building)

    def _whole(self) -> bool:
        with contextlib.suppress(ProviderError):
            return self.check() is not None
        return False

    def _timing(self, building: Path, *, fetch: bool) -> None:
        # Worked on as a copy: ONNX Runtime writes it in place, and other builds may be reading.
        own = building / TIMING
        text = json.dumps(dict(self.machine), sort_keys=True)
        shared = self.cache / f"{TIMING}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        source, target = (shared, own) if fetch else (own, shared)
        target.mkdir(exist_ok=True)
        for path in source.glob("[!.]*"):
            part = target / f".{path.name}.{secrets.token_hex(4)}"
            shutil.copyfile(path, part)
            os.replace(part, target / path.name)
        if not fetch:
            shutil.rmtree(own)

    def _seal(self, building: Path) -> None:
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(building.iterdir())
        }
        text = json.dumps({**self._record(), "files": files}, indent=2, sort_keys=True)
        (building / KEY).write_text(text + "\n", encoding="utf-8")
        if os.path.lexists(self.folder):
            self._remove_old()
        os.rename(building, self.folder)

    def _remove_old(self) -> None:
        """Make room, and delete nothing but what a build wrote there."""
        try:
            ours = {KEY, *_files(self.folder, _read(self.folder))}
        except ProviderError:  # a key.json that cannot be read does not say what is ours
            ours = {KEY, CONTEXT_MODEL}
        here = {p.name for p in self.folder.iterdir()} if self.folder.is_dir() else {KEY}
        extra = sorted(n for n in here - ours if not n.endswith((".engine", ".profile")))
        if self.folder.is_symlink() or not self.folder.is_dir() or extra:
            raise OutputError(
                f"this is no engine cache: it holds {extra[0]!r}" if extra else "no engine cache",
                where=str(self.folder),
                hint="move it away, or choose another cache with --cache DIR",
            )
        shutil.rmtree(self.folder)


def _key(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:32]


def _read(folder: Path) -> dict[str, Any]:
    try:
        raw = json.loads((folder / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        why = "it is missing" if isinstance(e, FileNotFoundError | NotADirectoryError) else e
        raise _broken(folder / KEY, f"the key.json of cached engines cannot be read: {why}") from e
    if not isinstance(raw, dict):
        raise _broken(folder / KEY, "the key.json of cached engines is damaged")
    return raw


def _files(folder: Path, raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    files = raw.get("files")
    fine = isinstance(files, dict) and all(
        Path(name).name == name
        and name not in ("", "..")
        and isinstance(want, dict)
        and type(want.get("bytes")) is int
        and isinstance(want.get("sha256"), str)
        for name, want in files.items()
    )
    if not fine or not isinstance(files, dict):
        raise _broken(folder / KEY, "the key.json of cached engines is damaged: its files")
    return files


def _broken(where: Path, what: str) -> ProviderError:
    folder = where if where.is_dir() else where.parent
    return ProviderError(
        what, where=str(where), hint=f"delete {folder}, or build it again with `{AGAIN}`"
    )


@contextlib.contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise OutputError(
            f"the engine cache cannot be written: {e.strerror or e}",
            where=str(e.filename or cache),
            hint="choose another place with --cache DIR or $ONNXPRESS_CACHE",
        ) from e


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold a lock that ends with the process; False where there is none, and the rename guards."""
    alone = False
    with path.open("a") as file:
        if sys.platform != "win32":
            import fcntl

            with contextlib.suppress(OSError):  # some network file systems have none
                fcntl.flock(file, fcntl.LOCK_EX)
                alone = True
        yield alone
