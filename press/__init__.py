"""The whole road: source -> capture -> optimize -> check against PyTorch -> measure -> artifact.

This is the only module that sees every room. What one room needs of another it is handed from
here: the exporter's check gets a function that runs ONNX Runtime, never the runtime itself.
Rooms that load torch are imported inside the functions, so that `import onnxpress` stays light.

    road.py       the road itself, which export, press and optimize take
    optimize.py   optimize: an .onnx file, or an artifact once more
    common.py     a source's reference, the export extra
    record.py     the manifest of what a road made
    trial.py      a graph that is about to be published: opened, and tried as its task
    proof.py      verify: files, signature, parity and drift again
    timing.py     bench: interleaved medians
    diff.py       diff: two graphs side by side

    wish.py       the precision that was asked for, and what is to be pruned
    change.py     from a float32 graph to one of another precision
    candidates.py what makes each precision
    lab.py        where candidates are built, opened and compared
    precision.py  the gate: drift, layers put back to float, speed
    data.py, records.py       examples; texts/ holds the default ones
    drift.py, evaluator.py    how far the answers of two graphs lie apart, task by task
    report/       report.html
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..artifact import Manifest
from .diff import Difference, diff
from .optimize import check_target, optimize
from .proof import Finding, verify
from .road import Order, road
from .timing import bench
from .wish import wish_of

if TYPE_CHECKING:
    from .road import Given

__all__ = ["Difference", "Finding", "bench", "diff", "export", "optimize", "press", "verify"]

PathLike = str | os.PathLike[str]
Progress = Callable[[str], None]
Shapes = Mapping[str, tuple[int, int, int]]


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
    precision: str = "fp32",
    calibration: PathLike | None = None,
    evaluation: PathLike | None = None,
    max_drift: float | None = None,
    calibrator: str | None = None,
    prune: str | None = None,
    half_io: bool = False,
    shapes: Shapes | None = None,
    require_fused: bool = False,
    force: bool = False,
    allow_drift: bool = False,
    allow_fallback: bool = False,
    trust_pickle: bool = False,
    measure: bool = True,
    progress: Progress = lambda _: None,
) -> Manifest:
    """Export a model, optimize it for a target, check and measure it, and publish it.

    A graph for another target than the CPU is checked on the CPU: its numbers in float32, its
    drift in a form that rounds as the target does. Where its kernels have no place for a node, the
    graph is refused, and the node is named.

    Args:
        target: What it is lowered for: cpu, openvino, cuda or tensorrt.
        precision: fp32, int8 (static), int8-dynamic, fp16, bf16, or auto: the fastest that passes
            the gate; each target has some of them. What drifts past the budget loses layers to
            float until it does not; what is not faster than fp32 on the CPU is refused.
        calibration: Examples to learn from: a .jsonl, .txt or .npz file, or a directory of .npz;
            None for a small set of ours that the task has.
        evaluation: Examples that the gate judges on; None holds some out.
        max_drift: What the mean drift may be at most; None for the task's own (docs/precision.md).
        calibrator: Of static int8: minmax (where None), percentile, entropy or mse.
        prune: What is pruned first: "heads:0.25,ffn:0.25", "weights:0.5" or "2:4".
        half_io: Whether inputs and outputs are of that type too, with `precision` fp16 or bf16.
        shapes: For tensorrt: the least, the usual and the largest size of each dimension that
            varies, which its engine is built for; the session may name others.
        allow_fallback: Publish even where the target has no kernel for a node: it would run on
            the CPU, with a copy each way.
        require_fused: Refuse to publish where a layer stays unfused.
        measure: Time it against PyTorch and keep the table in measured.json; where False, speed
            does not decide about the precision either.

    The other arguments, what is returned and what is raised are those of `export`; GateError too
    where `require_fused` finds a layer, or where no graph of the precision meets the budget.
    """
    check_target(target, shapes)
    order = Order(
        source,
        out,
        target=target,
        require_fused=require_fused,
        force=force,
        allow_drift=allow_drift,
        allow_fallback=allow_fallback,
        times=measure,
        measure=measure,
        wish=wish_of(precision, calibration, evaluation, max_drift, calibrator, prune, half_io),
        shapes=dict(shapes or {}),
        progress=progress,
    )
    return road(order, lambda: _resolved(source, task, trust_pickle))


def _resolved(spec: str, task: str | None, trust_pickle: bool) -> Given:
    from .. import exporter
    from .road import Given

    source = exporter.resolve(spec, task=task, trust_pickle=trust_pickle)
    return Given(source, file=spec if source.graph is not None else None)
