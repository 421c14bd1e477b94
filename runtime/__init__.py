"""Runs artifacts: arrays or text in, arrays or text out. No torch and no onnx in the process.

task = onnxpress.runtime.load("out/")       # checks the files, opens the session
task.embed(["a text"])                      # or classify, answer, generate, translate
task.session.placement()                    # where every node runs
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from ..artifact import check_files, read_manifest
from ..errors import ArtifactError
from .generation import Generator
from .measure import Timing, random_feeds, time_runs
from .opening import Skipped
from .placement import PlacedNode, Placement
from .session import Session
from .tasks import Answerer, Classifier, Embedder
from .tokenization import TruncationWarning
from .translation import Translator

__all__ = [
    "Answerer",
    "Classifier",
    "Embedder",
    "Generator",
    "PlacedNode",
    "Placement",
    "Session",
    "Skipped",
    "Timing",
    "Translator",
    "TruncationWarning",
    "load",
    "random_feeds",
    "time_runs",
]

Task = Embedder | Classifier | Answerer | Generator | Translator

_TASKS: dict[str, Callable[..., Task]] = {
    "embed": Embedder,
    "classify": Classifier,
    "answer": Answerer,
    "generate": Generator,
    "translate": Translator,
}
_TRUNCATING = ("embed", "classify", "translate")


def load(
    path: str | os.PathLike[str],
    *,
    provider: str | Sequence[str] | None = None,
    allow_fallback: bool = False,
    threads: int | None = None,
    verify: bool = True,
    truncate: bool = True,
    **session_options: Any,
) -> Task | Session:
    """Open an artifact as what its manifest says it is: a task, or for "tensors" a `Session`.

    Args:
        path: The artifact directory.
        provider: None for the one that the artifact was made for. A name, or several in order of
            preference ("tensorrt,cuda,cpu"): the first that takes every node; see `Session`.
        allow_fallback: Spread the nodes over all of them, and over the CPU as the last.
        threads: Threads of one run on the CPU.
        verify: Check the sha256 of every file (about a second for a GB); sizes are always checked.
        truncate: Cut texts that are too long for the model and warn; False refuses them. Prompts
            and the contexts of questions are never cut.
        **session_options: The other options of `Session`.

    Raises:
        ArtifactError: It is no artifact, it is damaged, or newer than this onnxpress.
        MissingPackage: onnxruntime is not installed.
        ProviderError: No provider that was asked for is there and takes every node.
        UsageError: A provider's name or its options are wrong.
    """
    manifest = read_manifest(path)
    check_files(path, manifest, hashes=verify)
    if manifest.task != "tensors" and manifest.task not in _TASKS:
        raise ArtifactError(
            f"the task {manifest.task!r} is none that this onnxpress runs",
            where=str(path),
            hint="pip install --upgrade onnxpress, or open it with runtime.Session",
        )
    session = Session(
        path, provider=provider, allow_fallback=allow_fallback, threads=threads, **session_options
    )
    return task_of(session, manifest.task, truncate=truncate)


def task_of(session: Session, task: str, *, truncate: bool = True) -> Task | Session:
    """An open session with a manifest as the task of that name; "tensors" is the session."""
    if task == "tensors":
        return session
    if task in _TRUNCATING:
        return _TASKS[task](session, truncate=truncate)
    return _TASKS[task](session)
