"""Split a packed projection where it is made, instead of turning it to pick its parts."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit, read
from ..outcome import Outcome
from .facts import Facts
from .simplify_shapes import OLDEST, reshape_target


class SplitPacked(ir.passes.InPlacePass):
    """Split a packed projection where it is made, instead of turning it to pick its parts.

    ```
    r = Reshape(x, [0, 0, 3, 4, 16])                x [batch, seq, 192]
    t = Transpose<perm=[2, 0, 3, 1, 4]>(r)
    q = Gather<axis=0>(t, 0)  k = Gather<axis=0>(t, 1)  v = Gather<axis=0>(t, 2)
    ->
    a, b, c = Split<axis=2>(x, [64, 64, 64])
    q = Transpose<perm=[0, 2, 1, 3]>(Reshape(a, [0, 0, 4, 16]))             k and v alike
    ```

    Squeeze and Unsqueeze between the two do not matter; nn.MultiheadAttention has both. The
    packed axis must be the first of those that the Reshape makes from the last axis of x, so that
    each part is a run of it.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit nodes in graph order, learning sizes on the way."""
        if (opset := model.opset_imports.get("", 0)) < OLDEST:
            note = f"the opset is {opset}, and packed projections are split from opset {OLDEST}"
            return Outcome(model, False, notes=(note,))
        facts, hits = Facts(model), 0
        splits: dict[tuple[int, ir.Value, int], ir.Node] = {}
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            facts.visit(node)
            found = _read(node, facts)
            if found is not None:
                _write(node, splits, *found)
                hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits)


Found = tuple[ir.Value, int, int, int, list[int] | None, list[int]]


def _read(node: ir.Node, facts: Facts) -> Found | None:
    """(source, number of parts, size of one, index, target of its Reshape, perm); or None."""
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx"):
        return None
    if not (node.outputs[0].uses() or node.outputs[0].is_graph_output()):
        return None
    index = read.constant(node.inputs[1])
    if index is None or index.ndim or read.constant(node.inputs[0]) is not None:
        return None
    path: list[ir.Node] = []
    made = read.producer(node.inputs[0], "Reshape", "Transpose", "Squeeze", "Unsqueeze")
    while made is not None and made.op_type != "Reshape":
        path.append(made)
        made = read.producer(made.inputs[0], "Reshape", "Transpose", "Squeeze", "Unsqueeze")
    source = None if made is None else made.inputs[0]
    if made is None or source is None or made.graph is not node.graph:
        return None
    x, r = facts.shape(source), facts.shape(made.outputs[0])
    axes = None if r is None else _follow(len(r), reversed(path))
    if x is None or r is None or axes is None or len(r) < len(x) + 1:
        return None
    packed = len(x) - 1
    at = node.attributes.get_int("axis", 0) % len(axes)
    if r[:packed] != x[:packed] or axes[at] != packed or None in axes[:at] + axes[at + 1 :]:
        return None
    parts, whole = r[packed].number, x[packed].number
    if not parts or whole is None or whole % parts or not -parts <= int(index) < parts:
        return None
    shape = r[:packed] + r[packed + 1 :]
    have = (*x[:packed], type(x[0]).of(whole // parts))
    target = None if have == shape else reshape_target(have, shape)
    left = [a for i, a in enumerate(axes) if i != at and a is not None]
    if isinstance(target, str) or len(left) != len(shape):
        return None
    perm = [a - (a > packed) for a in left]
    return source, parts, whole // parts, int(index) % parts, target, perm


def _follow(rank: int, path: object) -> list[int | None] | None:
    """Where each axis of a Reshape of this rank is after `path`; None for axes inserted there."""
    axes: list[int | None] = list(range(rank))
    for node in path:  # type: ignore[attr-defined]
        if node.op_type == "Transpose":
            perm = node.attributes.get_ints("perm", None) or reversed(range(len(axes)))
            axes = [axes[p] for p in perm]
            continue
        given = read.ints(node, "axes", 1) if len(node.inputs) > 1 or node.attributes else None
        if given is None:
            return None
        if node.op_type == "Unsqueeze":
            n = len(axes) + len(given)
            at, rest = {a % n for a in given}, iter(axes)
            axes = [None if i in at else next(rest) for i in range(n)]
        else:
            at = {a % len(axes) for a in given}
            axes = [a for i, a in enumerate(axes) if i not in at]
    return axes


def _write(
    node: ir.Node,
    splits: dict[tuple[int, ir.Value, int], ir.Node],
    source: ir.Value,
    parts: int,
    size: int,
    index: int,
    target: list[int] | None,
    perm: list[int],
) -> None:
    graph, output, nodes = node.graph, node.outputs[0], []
    assert isinstance(graph, ir.Graph)
    key = id(graph), source, parts  # one branch of an If cannot read what the other one makes
    if key not in splits:
        sizes = edit.constant(graph, f"{source.name}_sizes", np.array([size] * parts, np.int64))
        axis = len(source.shape) - 1 if source.shape is not None else -1
        split = ir.node("Split", [source, sizes], attributes={"axis": axis}, num_outputs=parts)
        for i, part in enumerate(split.outputs):
            part.name, part.type = f"{source.name}_part{i}", source.type
            part.shape = None if source.shape is None else ir.Shape([*source.shape[:-1], size])
        graph.insert_before(node, split)
        splits[key] = split
    result = splits[key].outputs[index]
    if target is not None:
        shape = edit.constant(graph, f"{output.name}_target", np.array(target, np.int64))
        nodes.append(ir.node("Reshape", [result, shape]))
        result = nodes[-1].outputs[0]
        result.name, result.type = f"{output.name}_split", output.type
    if perm != sorted(perm):
        nodes.append(ir.node("Transpose", [result], attributes={"perm": perm}))
        result = nodes[-1].outputs[0]
    if not nodes:
        nodes.append(ir.node("Identity", [result]))  # RemoveNoOps renames better than we could
        result = nodes[-1].outputs[0]
    edit.replace(output, result, nodes)
