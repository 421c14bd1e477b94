"""The whole road: source -> capture -> optimize -> check against PyTorch -> measure -> artifact.

This is the only module that sees every room. What one room needs of another it is handed from
here: the exporter's check gets a function that runs ONNX Runtime, never the runtime itself.
Rooms that load torch are imported inside the functions, so that `import onnxpress` stays light.

    road.py       the road itself, which export, press and optimize take
    optimize.py   optimize: an .onnx file, or an artifact once more
    common.py     a source's reference, the export extra
    proof.py      verify: files, signature and parity again
    timing.py     bench: interleaved medians
    diff.py       diff: two graphs side by side
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..artifact import Manifest
from ..errors import UsageError
from .diff import Difference, diff
from .optimize import optimize
from .proof import Finding, verify
from .road import Order, road
from .timing import bench

if TYPE_CHECKING:
    from .road import Given

__all__ = ["Difference", "Finding", "bench", "diff", "export", "optimize", "press", "verify"]

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
    order = Order(source, out, force=force, allow_drift=allow_drift, progress=progress)
    return road(order, lambda: _resolved(source, task, trust_pickle))


def press(
    source: str,
    out: PathLike,
    *,
    target: str = "cpu",
    task: str | None = None,
    require_fused: bool = False,
    force: bool = False,
    allow_drift: bool = False,
    trust_pickle: bool = False,
    measure: bool = True,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Export a model, optimize it for a target, check and measure it, and publish it.

    Args:
        target: What it is lowered for: cpu.
        require_fused: Refuse to publish where a layer stays unfused.
        measure: Time it against PyTorch and keep the table in measured.json.

    The other arguments, what is returned and what is raised are those of `export`; GateError too
    where `require_fused` finds a layer.
    """
    if target != "cpu":
        raise UsageError(
            f"the target {target!r} cannot be pressed for yet",
            hint="this version presses for: cpu; `onnxpress optimize` lowers for others too",
        )
    order = Order(
        source,
        out,
        target=target,
        require_fused=require_fused,
        force=force,
        allow_drift=allow_drift,
        times=measure,
        measure=measure,
        progress=progress,
    )
    return road(order, lambda: _resolved(source, task, trust_pickle))


def _resolved(spec: str, task: str | None, trust_pickle: bool) -> Given:
    from .. import exporter
    from .road import Given

    source = exporter.resolve(spec, task=task, trust_pickle=trust_pickle)
    return Given(source, file=spec if source.graph is not None else None)
