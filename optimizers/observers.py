"""Ways to watch the passes at work. An observer sees every step and changes none.

ONNXPRESS_DEBUG=1       each pass and its time, on stderr
ONNXPRESS_DEBUG=2       also the ops that came and went
ONNXPRESS_DEBUG=3       also what was declined, and why
ONNXPRESS_DUMP=DIR      the graph as numbered text after each pass that changed it
ONNXPRESS_VERIFY=1      after each pass that changed the graph the ONNX checker, and a run of the
                        graph against a run of the last one before that ran
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..errors import OnnxpressError, UsageError
from .pipeline import Observer, Step

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Run = Callable[[ir.Model, Sequence[Feeds]], Sequence[Mapping[str, Array]]]
"""Runs a model as it is, without optimizing it, and leaves it as it is: outputs for each feeds."""

LARGEST = 1 << 30  # bytes of weights; a larger model is not written and run after every pass
# What a pass may move a value, relative to itself and to the ordinary size of its output's values.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}


def from_environment(environ: Mapping[str, str] = os.environ) -> list[Observer]:
    """The observers that the ONNXPRESS_* variables ask for; none by default.

    The one that runs the graph needs more than the variables: see `runs_from_environment`.
    """
    observers: list[Observer] = []
    level = environ.get("ONNXPRESS_DEBUG", "") or "0"
    if level not in ("0", "1", "2", "3"):
        raise UsageError(f"ONNXPRESS_DEBUG is {level!r}", hint="use 1, 2 or 3, or unset it")
    if level != "0":
        observers.append(log(int(level)))
    if directory := environ.get("ONNXPRESS_DUMP"):
        observers.append(dump(directory))
    if environ.get("ONNXPRESS_VERIFY", "0") not in ("", "0"):
        observers.append(verify)  # last: the dump of a bad graph is there to be read
    return observers


def runs_from_environment(
    model: ir.Model,
    run: Run,
    feeds: Callable[[], Sequence[Feeds]],
    environ: Mapping[str, str] = os.environ,
) -> list[Observer]:
    """The observer that runs the graph, where ONNXPRESS_VERIFY asks for it.

    Args:
        model: The graph as it is before the first pass.
        run: See `Run`.
        feeds: Makes what it is run on; asked only where it is.
        environ: The variables.
    """
    if environ.get("ONNXPRESS_VERIFY", "0") in ("", "0"):
        return []
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    if size > LARGEST:
        _say(f"ONNXPRESS_VERIFY: {size:,} bytes of weights are too many to run after every pass")
        return []
    given = feeds()
    if not given:
        _say("ONNXPRESS_VERIFY: no feeds could be made; the passes are checked without a run")
        return []
    return [compare(model, run, given, say=environ.get("ONNXPRESS_DEBUG", "") not in ("", "0"))]


def log(level: int = 1) -> Observer:
    """Write a line per pass to stderr, and more at levels 2 and 3."""

    def observe(step: Step, _pass: ir.passes.PassBase, _model: ir.Model) -> None:
        mark = "*" if step.changed else " "
        line = f"{step.index:3} {mark} {step.name:36} {step.seconds * 1e3:8.1f} ms"
        if level >= 2 and step.ops:
            line += "  " + " ".join(f"{op}{n:+d}" for op, n in step.ops.items())
        _say(line)
        for note in (*step.notes, *map(str, step.misses)) if level >= 3 else ():
            _say(f"        {note}")

    return observe


def dump(directory: str | os.PathLike[str]) -> Observer:
    """Write the graph as text, without its weights, after each pass that changed it."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)

    def observe(step: Step, _pass: ir.passes.PassBase, model: ir.Model) -> None:
        if step.changed:
            text = ir.to_onnx_text(model, exclude_initializers=True)
            path = folder / f"{step.index:02d}_{step.name}.txt"
            path.write_text(text + "\n", encoding="utf-8")

    return observe


def verify(step: Step, _pass: ir.passes.PassBase, model: ir.Model) -> None:
    """Run the ONNX checker after a pass that changed the graph; its error names the pass."""
    if not step.changed:
        return
    try:
        common.CheckerPass()(_without_files(model))
    except Exception as e:
        e.add_note(f"found after pass {step.index}, {step.name}")
        raise


def _without_files(model: ir.Model) -> ir.Model:
    """A copy whose weights on disk are inputs: the checker looks for their files, and elsewhere."""
    copy = model.clone()
    for graph in copy.graphs():
        for value in list(graph.initializers.values()):
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if graph is not copy.graph:  # a subgraph has no inputs of its own choice
                value.const_value = ir.tensor(tensor.numpy(), name=value.name)
                continue
            graph.initializers.pop(str(value.name))
            value.const_value = None
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
            if not value.is_graph_input():
                graph.inputs.append(value)
    return copy


def compare(model: ir.Model, run: Run, feeds: Sequence[Feeds], *, say: bool = False) -> Observer:
    """Run the graph after each pass that changed it, and hold it against the last that ran.

    Not every graph has to run: some exports need mending, a kernel may want a mask in the form
    that a later pass gives it, and one provider has no kernels for ops of another. What follows
    such a graph is held against the one before it; with `say` a line on stderr tells of it.

    Args:
        model: The graph as it is now, before the first pass.
        run: See `Run`.
        feeds: What to run it on.
        say: Tell on stderr what did not run.

    Raises:
        onnx_ir.passes.PostconditionError: From the observer: a pass changed what the graph
            computes. It names the pass, the output and the difference.
    """

    def attempt(model: ir.Model) -> Sequence[Mapping[str, Array]] | None:
        try:
            return run(model, feeds)
        except OnnxpressError as e:
            if say:
                _say(f"        not compared until it runs: {e.what[:160]}")
            return None

    last = attempt(model)
    since: list[str] = []

    def observe(step: Step, _pass: ir.passes.PassBase, model: ir.Model) -> None:
        nonlocal last
        if not step.changed:
            return
        since.append(f"pass {step.index}, {step.name}")
        after = attempt(model)
        if after is None:
            return
        pairs = () if last is None else zip(last, after, strict=True)
        for old, new in pairs:
            if said := _difference(old, new):
                raise ir.passes.PostconditionError(
                    f"{' or '.join(since)}, changed what the model computes: {said}"
                )
        last = after
        since.clear()

    return observe


def _difference(before: Mapping[str, Array], after: Mapping[str, Array]) -> str | None:
    """The first output that is not what it was, and by how much; None where all are."""
    for name, old in before.items():
        new = np.asarray(after[name])
        if old.shape != new.shape or old.dtype != new.dtype:
            return (
                f"output {name} is {new.dtype}{list(new.shape)}, "
                f"it was {old.dtype}{list(old.shape)}"
            )
        tolerance = TOLERANCE.get(old.dtype.name)
        if tolerance is None:
            if (old != new).any():
                return f"output {name} differs in {int((old != new).sum())} of {old.size} values"
            continue
        a, b = old.astype(np.float64), new.astype(np.float64)
        finite = np.isfinite(a)
        if (a[np.isinf(a)] != b[np.isinf(a)]).any():  # what was NaN may be anything
            return f"output {name} is not infinite where it was"
        if not finite.any():
            continue
        a, b = a[finite], b[finite]
        sizes = np.abs(a[a != 0])
        limits = tolerance * (np.abs(a) + (float(np.median(sizes)) if sizes.size else 0.0) + 0.01)
        apart = np.where(np.isfinite(b), np.abs(a - b), np.inf)
        worst = int(np.argmax(apart / limits))
        if apart[worst] > limits[worst]:
            return (
                f"output {name} differs by {apart[worst]:.3g} (allowed {limits[worst]:.3g}): "
                f"{b[worst]:.6g}, it was {a[worst]:.6g}"
            )
    return None


def _say(line: str) -> None:
    print(line, file=sys.stderr)
