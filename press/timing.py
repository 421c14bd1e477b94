"""Timing an artifact, and PyTorch on the same weights beside it, interleaved in one run."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import artifact
from ..errors import UsageError
from .common import is_data, needs_export, reference_of, symbols

if TYPE_CHECKING:
    from ..exporter import Reference
    from ..runtime import Session


@dataclass
class Shape:
    """Sizes of the dimensions that vary, for one row of a table."""

    dims: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(f"{n}={v}" for n, v in self.dims.items()) or "fixed shapes"


def bench(
    directory: str | os.PathLike[str],
    *,
    against: str | None = None,
    source: str | None = None,
    batch: Sequence[int] = (1, 8),
    length: Sequence[int] = (16, 128),
    threads: int | None = None,
    rounds: int = 9,
    trust_pickle: bool = False,
    progress: Callable[[str], None] = lambda _: None,
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
    from ..runtime import Session

    manifest = artifact.read_manifest(directory)
    artifact.check_files(directory, manifest, hashes=False)
    if against not in (None, "torch"):
        raise UsageError(f"cannot measure against {against!r}", hint="--against torch")
    if rounds < 9:
        raise UsageError(f"{rounds} rounds are too few for a median worth quoting", hint="9")
    session = Session(directory, threads=threads)
    reference = None
    if against:
        with needs_export():
            from .. import exporter
        progress("read the source")
        spec = source or str(manifest.source["spec"])
        if not source and not is_data(spec):
            raise UsageError(
                f"the source {spec} is code or a hub's, and an artifact may come from anyone",
                hint=f"name it yourself: --source {spec}",
            )
        built = exporter.resolve(spec, task=manifest.task, trust_pickle=trust_pickle)
        if built.module is None:
            raise UsageError("the source is an ONNX file: there is no PyTorch to compare with")
        reference = reference_of(built, spec)
    names = symbols(session.inputs)
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
    beside: Mapping[str, Session] | None = None,
    threads: int | None = None,
    rounds: int = 9,
) -> dict[str, Any]:
    """Medians of a session, of others `beside` it and of its reference, interleaved."""
    from ..runtime import time_runs

    def one(shape: Shape) -> dict[str, Any]:
        feeds = _feeds(session, reference, shape)
        contestants = _runs({"onnxpress": session, **(beside or {})}, feeds)
        if reference:
            torch = reference.name.startswith("torch")
            contestants["torch" if torch else "before"] = reference.prepare(feeds)
        timed = time_runs(contestants, rounds=rounds, min_seconds=0.2)
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


def time_sessions(
    sessions: Mapping[str, Session], reference: Reference, shapes: Sequence[Shape]
) -> list[dict[str, Any]]:
    """Medians of sessions of one signature at each shape, interleaved: sizes, and `ms` by name."""
    from ..runtime import time_runs

    rows = []
    for shape in shapes:
        feeds = _feeds(next(iter(sessions.values())), reference, shape)
        timed = time_runs(_runs(sessions, feeds), min_seconds=0.1)
        rows.append({**shape.dims, "ms": {n: round(t.median, 3) for n, t in timed.items()}})
    return rows


def _runs(
    sessions: Mapping[str, Session], feeds: dict[str, Any]
) -> dict[str, Callable[[], object]]:
    return {name: partial(session.run, feeds) for name, session in sessions.items()}


def _feeds(session: Session, reference: Reference | None, shape: Shape) -> dict[str, Any]:
    """Feeds of a shape; where there is a reference, of values that it takes.

    Raises:
        UsageError: The reference does not take the shape.
    """
    if reference is None:
        from ..runtime import random_feeds

        return random_feeds(session.inputs, shape.dims)
    from ..exporter.points import Point, Points

    points = Points(reference, session.inputs, seed=0)
    try:
        feeds = points.feeds(Point(tuple(shape.dims.items())))
        reference.run(feeds)
    except Exception as e:  # whatever it raises: it does not take this shape
        raise UsageError(f"{reference.name} does not run at {shape}: {e}") from e
    return feeds


def default_shapes(session: Session, reference: Reference) -> list[Shape]:
    """Those of a single request and of a batch that the reference takes; the traced one else."""
    names = symbols(session.inputs)
    taken = []
    if "sequence" in names:
        for b, s in ((1, 16), (1, 128), (8, 128)):
            shape = Shape({n: 0 if "past" in n else {"batch": b}.get(n, s) for n in names})
            try:
                _feeds(session, reference, shape)
            except UsageError:
                continue
            taken.append(shape)
    if taken:
        return taken
    sizes: dict[str, int] = {}
    for spec in session.inputs:
        for dim, n in zip(spec.shape, reference.examples[spec.name].shape, strict=True):
            if isinstance(dim, str):
                sizes.setdefault(dim, n)
    return [Shape({n: sizes[n] for n in names})]


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    import torch

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
