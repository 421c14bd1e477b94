"""What the two passes that prune share: which units stay, and what makes up for those that go."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from ...errors import UsageError
from ..edit import constant as make_constant
from ..lift.walk import NEWEST
from ..outcome import SCOPE, Outcome, describe
from ..read import reader
from .channels import Cut, Units, array_of, put, remove

Scope = Literal["layer", "global"]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Site:
    """A place in a graph from which units can go.

    Attributes:
        name: The activation whose statistics say which; the input of `out`, (..., channels).
        what: What a unit is, in the plural: heads, groups of heads, columns.
        units: How many there are.
        cut: All that changes when some go.
        out: The MatMul that uses the channels up.
    """

    name: str
    what: str
    units: int
    cut: Cut
    out: ir.Node


Read = Callable[[ir.Node], Site | str | None]
"""A site at a node; None if it is no such thing; a string if it nearly is, and why it is not."""


@dataclass(frozen=True)
class Score:
    """What calibration says of one site.

    Attributes:
        units: How much is lost with each unit, (units,).
        mean: Mean of each channel, (channels,); zeros where nothing is to make up for it.
    """

    units: Numbers
    mean: Numbers


def sites(model: ir.Model, read: Read) -> tuple[list[tuple[ir.Node, Site]], list[str]]:
    """Sites of the main graph in order, with their anchors, and why others are none."""
    found, notes = [], []
    for node in model.graph:
        site = read(node)
        if isinstance(site, str):
            notes.append(f"{describe(node)}: {site}")
        elif site is not None:
            found.append((node, site))
    return found, notes


def check_fraction(fraction: float) -> float:
    """`fraction`, where it is one of what there is.

    Raises:
        UsageError: It is below 0, or 1 and above.
    """
    if not 0 <= fraction < 1:
        raise UsageError(
            f"{fraction} is no fraction that can be pruned",
            hint="a number from 0 to below 1; 0.25 takes a quarter away",
        )
    return fraction


def prune(
    model: ir.Model,
    read: Read,
    scores: Mapping[str, Score],
    fraction: float,
    *,
    scope: Scope,
    multiple: int = 1,
) -> Outcome:
    """Remove the units of least score, at every site that has scores for as many as it has.

    The mean of what goes is added to the bias after `out`; where there is none, a bias is added.
    """
    opset = model.opset_imports.get("", 0)
    if opset > NEWEST:
        note = f"the opset is {opset}, and what its ops mean is known to opset {NEWEST}"
        return Outcome(model, False, notes=(note,))
    found, notes = sites(model, read)
    ready = []
    for node, site in found:
        if why := _unfit(site, scores.get(site.name)):
            notes.append(f"{describe(node)}: {why}")
        else:
            ready.append((node, site))
    ranked = [scores[site.name].units for _, site in ready]
    hits = 0
    for (node, site), kept in zip(
        ready, choose(ranked, fraction, scope=scope, multiple=multiple), strict=True
    ):
        if len(kept) == site.units:
            if fraction:
                notes.append(f"{describe(node)}: all {site.units} {site.what} stay")
            continue
        again = read(node)  # an earlier site may have put a bias between this one's nodes
        assert isinstance(again, Site)
        _compensate(again, kept, scores[site.name].mean)
        remove(again.cut, kept)
        hits += 1
    if hits:
        common.RemoveUnusedNodesPass()(model)
        common.NameFixPass()(model)
    return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def choose(
    scores: Sequence[Numbers], fraction: float, *, scope: Scope = "layer", multiple: int = 1
) -> list[Units]:
    """Which units stay, ascending, for each layer; never fewer than asked for, and at least one.

    Args:
        scores: What each unit of each layer is worth.
        fraction: How many of them may go.
        scope: `layer` takes the same fraction of each layer: equal layers stay equal, so that one
            choice of kernels and one measurement hold for all of them, and no layer is thinned out
            because its numbers happen to be smaller. `global` ranks the units of all layers by how
            far they are from their layer's mean, in standard deviations (as FLAP does).
        multiple: What stays is a multiple of this, in layers that have as many.
    """
    if scope == "layer":
        gone = [math.floor(len(s) * fraction + 1e-9) for s in scores]
    else:
        spread = [(s - s.mean()) / (s.std() or 1.0) for s in scores]
        owner = np.repeat(np.arange(len(scores)), [len(s) for s in scores])
        order = np.argsort(np.concatenate([*spread, np.zeros(0)]), kind="stable")
        worst = owner[order[: math.floor(len(owner) * fraction + 1e-9)]]
        gone = [int((worst == layer).sum()) for layer in range(len(scores))]
    kept = []
    for s, out in zip(scores, gone, strict=True):
        stay = max(len(s) - out, 1)
        if len(s) >= multiple:
            stay = min(len(s), math.ceil(stay / multiple) * multiple)
        kept.append(np.sort(np.argsort(-s, kind="stable")[:stay]))
    return kept


def _unfit(site: Site, score: Score | None) -> str | None:
    if score is None:
        return f"there are no scores for {site.name!r}"
    size = site.cut.slices[site.out, 1].size
    if len(score.units) != site.units or score.mean.shape != (size,):
        return (
            f"the scores are of {len(score.units)} {site.what} and {score.mean.size} channels, and "
            f"there are {site.units} and {size}: it was pruned already, or they are another graph's"
        )
    if not (np.isfinite(score.units).all() and np.isfinite(score.mean).all()):
        return f"the scores for {site.name!r} are not finite"
    return None


def _compensate(site: Site, kept: Units, mean: Numbers) -> None:
    """Add to the bias after `out` what the units that go give on average."""
    span = site.cut.slices[site.out, 1]
    gone = span.channels(np.setdiff1d(np.arange(span.units), kept))
    weight = array_of(site.out.inputs[1])
    lost = mean[gone] @ weight[gone].astype(np.float64)
    if not lost.any():
        return
    product = site.out.outputs[0]
    graph, add = site.out.graph, reader(product, "Add")
    assert isinstance(graph, ir.Graph)
    index = _bias_index(add, product, len(lost)) if add else None
    if add is not None and index is not None:
        bias = array_of(add.inputs[index])
        put(add, index, (bias.astype(np.float64) + lost).astype(bias.dtype))
        return
    made = make_constant(graph, f"{product.name}_bias", lost.astype(weight.dtype))
    total = ir.Value(name=product.name, shape=product.shape, type=product.type)
    product.replace_all_uses_with(total, replace_graph_outputs=True)
    product.name = f"{product.name}_product"
    add = ir.Node("", "Add", [product, made], outputs=[total], name=f"{site.out.name}_bias")
    if scope := site.out.metadata_props.get(SCOPE):
        add.metadata_props[SCOPE] = scope
    graph.insert_after(site.out, [add])


def _bias_index(add: ir.Node, product: ir.Value, size: int) -> int | None:
    """Which input of `add` is a bias, (size,), constant."""
    index = 1 if add.inputs[0] is product else 0
    bias = add.inputs[index]
    if bias is None or bias.is_graph_input() or ir.convenience.get_const_tensor(bias) is None:
        return None
    shape = [] if bias.shape is None else list(bias.shape)
    return index if shape == [size] else None
