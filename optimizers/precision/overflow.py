"""Find what would overflow, or vanish, in fp16 or bf16, from values that are seen in float32.

The road: `observe_peaks` runs the graph on calibration data, `overflows` names the nodes, and
`ConvertFloats(keep=[o.node for o in found])` leaves them in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...errors import InputError
from ..outcome import describe
from .float_plan import is_source, takes_any
from .float_ranges import FLOAT, ends_in_softmax, finite_range, half_of, unfit
from .float_rules import label

Feeds = Mapping[str, np.ndarray]
RunModel = Callable[[ir.Model, Sequence[Feeds]], Iterable[Mapping[str, np.ndarray]]]

CHUNK = 32  # values that are fetched in one run: their size is what memory has to hold
DEEP = -1e8  # on the way to a softmax, a number of this depth is a mask


@dataclass(frozen=True)
class Overflow:
    """A node that a 16-bit type is too narrow for.

    Attributes:
        node: Its name, as `ConvertFloats(keep=...)` takes it.
        op: Its op type.
        value: The value that is out of range: one that it makes, or one that it reads.
        max_abs: The greatest finite magnitude seen in the value, or made inside of the node.
        limit: What the magnitude is held against: above it too high, or so low that it is 0.
    """

    node: str
    op: str
    value: str
    max_abs: float
    limit: float

    @property
    def vanishes(self) -> bool:
        """Whether it is 0 in the type, not too high."""
        return self.max_abs < self.limit

    def __str__(self) -> str:
        says = "is rounded to 0 below" if self.vanishes else "exceeds"
        return (
            f"{self.op} {self.node!r}: {self.value!r} of {self.max_abs:.3g} {says} {self.limit:.3g}"
        )


def float_values(model: ir.Model) -> list[str]:
    """Names of the values of float32 that nodes compute, in graph order; none of a body.

    What is computed of constants and integers alone is among them; constants are not, as they
    can be read without a run.

    Raises:
        InputError: The type of a value is not known: infer_shapes has to run first.
    """
    for value in (v for node in model.graph for v in node.outputs):
        if value.type is None and (value.uses() or value.is_graph_output()):
            raise InputError(
                f"the type of {value.name!r} is not known", hint="run infer_shapes first"
            )
    return [
        str(value.name)
        for node in model.graph
        if node.op_type != "Constant"
        for value in node.outputs
        if value.name and value.dtype == FLOAT
    ]


def observe_peaks(
    model: ir.Model,
    run: RunModel,
    batches: Sequence[Feeds],
    *,
    chunk: int = CHUNK,
) -> dict[str, float]:
    """The greatest finite magnitude of each float32 value over all batches.

    Each batch is run once for each `chunk` of values, so that memory holds a chunk of one batch.
    -inf is a mask, and no peak; nor is, on the way to a softmax, anything below -1e8.

    Args:
        model: The graph in float32; it is left alone.
        run: Runs a graph on feeds: outputs by name, in float32.
        batches: Feeds, at least one.
        chunk: How many values are fetched at a time.

    Returns:
        Peaks by name, of inputs too; 0 for a value that is 0 throughout, or empty.

    Raises:
        InputError: There are no batches; or a value is NaN or +inf in float32 already, and
            nothing reads it that looks for just that.
    """
    if not batches:
        raise InputError(
            "there are no inputs on which to look for overflow", hint="give at least one"
        )
    values = {str(v.name): v for v in _watched(model)}
    masks = {name for name, value in values.items() if ends_in_softmax(value)}
    peaks: dict[str, float] = {}
    for name in (str(v.name) for v in model.graph.inputs if v.dtype == FLOAT):
        for number, feeds in enumerate(batches):
            if name in feeds:
                _see(peaks, values[name], np.asarray(feeds[name]), name in masks, number)
    names = float_values(model)
    for start in range(0, len(names), chunk):
        asked = names[start : start + chunk]
        tapped = _tapped(model, asked)
        for number, seen in enumerate(run(tapped, batches)):
            for name in asked:
                _see(peaks, values[name], seen[name], name in masks, number)
    return peaks


def overflows(
    model: ir.Model, seen: Mapping[str, float], precision: str, headroom: float = 2.0
) -> list[Overflow]:
    """Which nodes a 16-bit type is too narrow for, in graph order.

    Named are the node that makes a value out of range and all that read it (so that it is read
    in float32, until what they make of it is in range again); nodes that read such a constant;
    and nodes that make such a number inside. A value that is seen, but always so low that it
    would be 0, counts the same. Masks do not: ConvertFloats cuts them.

    Args:
        model: The graph in float32, with the names of `seen`.
        seen: Peaks by name, as `observe_peaks` gives them.
        precision: fp16 or bf16; the latter has the range of float32, and hardly any findings.
        headroom: How much further than the data seen the type has to reach.

    Raises:
        UsageError: There is no such precision.
        InputError: The headroom is below 1.
    """
    if not headroom >= 1.0:
        raise InputError(f"the headroom is {headroom}, and has to be 1 or more")
    half = half_of(precision)
    limit = half.highest / headroom
    found: dict[tuple[ir.Node, str], Overflow] = {}

    def add(node: ir.Node, value: str, peak: float, held: float) -> None:
        found.setdefault((node, value), Overflow(label(node), node.op_type, value, peak, held))

    for value in _watched(model):
        name, peak = str(value.name), seen.get(str(value.name), 0.0)
        if not (peak > limit or 0.0 < peak <= half.zero):
            continue
        held = limit if peak > limit else half.zero * (1 + 1e-9)
        for node in [value.producer(), *(use.node for use in value.uses())]:
            if node is not None and not (is_source(node) or takes_any(node)):
                add(node, name, peak, held)
    for node in model.graph:
        peak = _inside(node, seen)
        if node.outputs[0].dtype == FLOAT and peak > limit:
            add(node, str(node.outputs[0].name), peak, limit)
    for one in unfit(model, half):
        if one.role == "high":
            add(one.edge[0], str(one.value.name), one.peak, limit)
        elif one.role == "zero":
            add(one.edge[0], str(one.value.name), one.peak, half.zero * (1 + 1e-9))
    order = {node: place for place, node in enumerate(_nodes(model))}
    return [found[key] for key in sorted(found, key=lambda key: order[key[0]])]


def _inside(node: ir.Node, seen: Mapping[str, float]) -> float:
    """What a node makes that it does not give.

    Norms sum their squares in float32 (stash_type), and so do the targets in a MatMul.
    """
    peak = seen.get(str(node.outputs[0].name), 0.0)
    if node.domain == "" and node.op_type == "ReduceL2":
        return peak * peak  # the sum, before the root
    if node.domain == "" and node.op_type == "ReduceLogSum":
        return float(np.exp(min(peak, 700.0)))
    if node.domain == "com.microsoft" and node.op_type.startswith("Skip"):
        return sum(seen.get(str(v.name), 0.0) for v in node.inputs[:2] if v is not None)
    return 0.0


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    return iter(ir.traversal.RecursiveGraphIterator(model.graph))


def _watched(model: ir.Model) -> Iterator[ir.Value]:
    yield from (v for v in model.graph.inputs if v.dtype == FLOAT)
    names = set(float_values(model))
    for node in model.graph:
        yield from (v for v in node.outputs if v.name in names)


def _tapped(model: ir.Model, names: list[str]) -> ir.Model:
    """A copy that gives these values too; weights are shared with the original."""
    copy = model.clone()
    have = {v.name for v in copy.graph.outputs}
    made = {v.name: v for node in copy.graph for v in node.outputs}
    copy.graph.outputs.extend(made[name] for name in names if name not in have)
    return copy


def _see(
    peaks: dict[str, float], value: ir.Value, array: np.ndarray, mask: bool, batch: int
) -> None:
    name = str(value.name)
    wrong = np.isnan(array) | (array == np.inf)
    if wrong.any() and not _is_guarded(value):
        node = value.producer()
        what = "NaN" if np.isnan(array).any() else "inf"
        raise InputError(
            f"{name!r} is {what} in float32 already, on input {batch}",
            where="an input of the model" if node is None else describe(node),
            hint="no precision can mend that: look at the inputs and at the model",
        )
    if mask:
        array = array[array > DEEP]
    low, high = finite_range(array)
    peaks[name] = max(peaks.get(name, 0.0), high, -low)


def _is_guarded(value: ir.Value) -> bool:
    """Whether something looks for NaN or inf in it, as exporters guard a softmax."""
    return any(use.node.op_type in ("IsNaN", "IsInf") for use in value.uses())
