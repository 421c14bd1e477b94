"""Split an axis once, where a graph merges it, turns the tensor, and splits it again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit, read
from ..outcome import Outcome, describe
from .contents import ONE, Sizes
from .facts import Facts
from .simplify_shapes import reshape_target
from .sizes import product


class MergeReshapes(ir.passes.InPlacePass):
    """Split an axis once, where a graph merges it, turns the tensor, and splits it again.

    ```
    a = Reshape(x, [seq, batch*4, 16])              x [seq, batch, 64]
    b = Transpose<perm=[1, 0, 2]>(a)
    y = Reshape(b, [batch, 4, seq, 16])
    ->
    a = Reshape(x, [0, 0, 4, 16])
    y = Transpose<perm=[1, 2, 0, 3]>(a)
    ```

    nn.MultiheadAttention writes this for each of Q, K and V, and torch's decomposition of
    attention around the Transpose of K (where the first Reshape of the result is a no-op and
    goes). Two Reshapes with nothing between them become one. The last Reshape may only split
    what comes out of the Transpose, and the new one must have a constant target; the Transpose
    (or several) must have no other reader. Sizes are compared as polynomials of names.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Sweep until nothing merges: dead code and merged nodes hide chains from the first."""
        hits, notes = 0, list[str]()
        for _ in range(SWEEPS):
            found, notes = _sweep(model)
            hits += found
            if not found:
                break
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


SWEEPS = 8


def _sweep(model: ir.Model) -> tuple[int, list[str]]:
    """Visit nodes in graph order, learning sizes on the way."""
    facts, hits, notes = Facts(model), 0, []
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        facts.visit(node)
        found = _read(node, facts)
        if isinstance(found, str):
            notes.append(f"{describe(node)}: {found}")
        elif found is not None:
            _write(node, facts, *found)
            hits += 1
    return hits, notes


Found = tuple[ir.Value, list[int] | None, list[int]]


def _read(node: ir.Node, facts: Facts) -> Found | str | None:
    """(source, target of its Reshape if it needs one, perm); why not; None for other nodes."""
    if node.op_type != "Reshape" or node.domain not in ("", "ai.onnx"):
        return None
    if not (node.outputs[0].uses() or node.outputs[0].is_graph_output()):
        return None
    turns, last = [], node
    while (turn := read.producer(last.inputs[0], "Transpose")) is not None:
        if read.reader(turn.outputs[0]) is not last:
            return None
        turns.append(turn)
        last = turn
    first = read.producer(last.inputs[0], "Reshape")
    if first is None or (source := first.inputs[0]) is None or first.graph is not node.graph:
        return None
    x, c, wanted = facts.shape(source), facts.shape(node.outputs[0]), facts.content(node.inputs[1])
    if x is None or c is None or wanted is None:
        return None
    # Without a -1 in the last Reshape, an empty tensor of a shape that was not meant is an error.
    exact = all(entry.number != -1 for entry in wanted.entries)
    a = facts.reshaped(x, first, meant=True) if exact else facts.shape(first.outputs[0])
    if a is None:
        return None
    if not turns:
        target = reshape_target(x, c)
        return None if isinstance(target, str) else (source, target, list(range(len(c))))
    perm = list(range(len(a)))
    for turn in reversed(turns):
        given = turn.attributes.get_ints("perm", None) or tuple(reversed(range(len(a))))
        perm = [perm[axis] for axis in given]
    groups = _groups(tuple(a[p] for p in perm), c)
    if groups is None:
        return None  # it merges axes: the usual end of an attention
    parts: list[Sizes] = [()] * len(a)
    for axis, group in zip(perm, groups, strict=True):
        parts[axis] = group
    starts = np.cumsum([0, *map(len, parts)])
    turned = [int(starts[axis]) + i for axis in perm for i in range(len(parts[axis]))]
    split = tuple(size for part in parts for size in part)
    if split == x:
        return source, None, turned
    target = reshape_target(x, split)
    return target if isinstance(target, str) else (source, target, turned)


def _groups(whole: Sizes, parts: Sizes) -> list[Sizes] | None:
    """Which runs of `parts` multiply to which of `whole`; None where they do not."""
    groups: list[Sizes] = []
    at = 0
    for size in whole:
        start = at
        while (have := product(parts[start:at])) != size and at < len(parts):
            at += 1
        if have != size:
            return None
        groups.append(parts[start:at])
    if any(size != ONE for size in parts[at:]):
        return None
    if at < len(parts):
        groups[-1] += parts[at:]
    return groups


def _write(
    node: ir.Node, facts: Facts, source: ir.Value, target: list[int] | None, perm: list[int]
) -> None:
    graph, output, nodes = node.graph, node.outputs[0], []
    assert isinstance(graph, ir.Graph)
    result = source
    if target is not None:
        shape = edit.constant(graph, f"{output.name}_target", np.array(target, np.int64))
        nodes.append(ir.node("Reshape", [source, shape]))
        result = nodes[-1].outputs[0]
        result.name, result.type = f"{output.name}_split", output.type
    if perm != sorted(perm):
        nodes.append(ir.node("Transpose", [result], attributes={"perm": perm}))
        result = nodes[-1].outputs[0]
    if not nodes:
        nodes.append(ir.node("Identity", [source]))
        result = nodes[-1].outputs[0]
    edit.replace(output, result, nodes)
    for new in nodes:
        facts.visit(new)
