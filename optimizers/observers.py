"""Ways to watch the passes at work. An observer sees every step and changes none.

ONNXPRESS_DEBUG=1       each pass and its time, on stderr
ONNXPRESS_DEBUG=2       also the ops that came and went
ONNXPRESS_DEBUG=3       also what was declined, and why
ONNXPRESS_DUMP=DIR      the graph as numbered text after each pass that changed it
ONNXPRESS_VERIFY=1      the ONNX checker after each pass that changed the graph
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..errors import UsageError
from .pipeline import Observer, Step


def from_environment(environ: Mapping[str, str] = os.environ) -> list[Observer]:
    """The observers that the ONNXPRESS_* variables ask for; none by default."""
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


def log(level: int = 1) -> Observer:
    """Write a line per pass to stderr, and more at levels 2 and 3."""

    def observe(step: Step, _pass: ir.passes.PassBase, _model: ir.Model) -> None:
        mark = "*" if step.changed else " "
        line = f"{step.index:3} {mark} {step.name:36} {step.seconds * 1e3:8.1f} ms"
        if level >= 2 and step.ops:
            line += "  " + " ".join(f"{op}{n:+d}" for op, n in step.ops.items())
        print(line, file=sys.stderr)
        for note in step.notes if level >= 3 else ():
            print(f"        {note}", file=sys.stderr)

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
        common.CheckerPass()(model)
    except Exception as e:
        e.add_note(f"found after pass {step.index}, {step.name}")
        raise
