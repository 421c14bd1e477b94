"""Attention without its mask, where the batch at hand has no padding.

Measured on ONNX Runtime 1.32 CPU, MiniLM: Attention without a mask takes 20% less time at 128
tokens and 26% less at 512; an If takes 0 to 2 us, and its branches hold no weights.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..clean.padding import MASK, Branches, hides_nothing, read_branches, sources
from ..dims import dim, same_dim
from ..edit import replace
from ..outcome import SCOPE, Outcome, describe
from ..read import constant, rank


class SkipEmptyMasks(ir.passes.InPlacePass):
    """Let Attention leave out a mask that hides nothing, as found out once for all layers.

    ```
    mask = Expand(Where(seen, 0, -inf), rows)      seen: [batch, 1, 1, keys], of bools
    y = Attention(q, k, v, mask)
    ->
    n = Cast<uint8>(seen)  least = ReduceMin<keepdims=0>(n)  empty = Cast<bool>(least)
    y = If(empty) { Attention(q, k, v) } else { Attention(q, k, v, mask) }
    ```

    All attributes stay, is_causal among them: it hides what it hides with and without a mask. The
    If has the name of the node, and Q, K, V and the mask come from the graph around it.

    Declined: a mask that differs by query or by head (causal, a bias: it always hides something,
    or nothing is known of it), a constant, 16-bit masks that are no choice of numbers, caches,
    outputs other than the first, subgraphs. From opset 24 on a mask that is shorter than the keys
    hides the rest, so there its length has to be known to be theirs.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit Attention nodes in order: the first of several layers carries the condition."""
        graph, taken = model.graph, _names(model)
        conditions: dict[ir.Value, ir.Value] = {}
        hits, notes = 0, []
        ours: set[ir.Node] = set()
        for node in list(ir.traversal.RecursiveGraphIterator(graph)):
            branches = read_branches(node)
            if isinstance(branches, Branches):
                ours.add(branches.masked)
            if not _has_mask(node) or node in ours:
                continue
            if node.graph is not graph:
                notes.append(f"{describe(node)}: it is in a subgraph")
                continue
            source = _padding(node, model.opset_imports.get("", 0))
            if isinstance(source, str):
                notes.append(f"{describe(node)}: {source}")
                continue
            if source not in conditions:
                conditions[source], nodes = hides_nothing(source, graph)
                graph.insert_before(node, nodes)
            _branch(node, conditions[source], taken)
            hits += 1
        if hits:
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _has_mask(node: ir.Node) -> bool:
    is_attention = node.op_type == "Attention" and node.domain == ""
    return is_attention and len(node.inputs) > MASK and node.inputs[MASK] is not None


def _padding(node: ir.Node, opset: int) -> ir.Value | str:
    """The least value that says which keys are padding; or why the mask is none of padding."""
    mask = node.inputs[MASK]
    assert mask is not None
    if any(v is not None for v in node.inputs[MASK + 1 :]):
        return "it has a cache"
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "its second output is used"
    rows = sources(mask, aligned=True)[-1]
    if rows.shape is None:
        return f"the rank of the mask {rows.name!r} is not known"
    for axis, what in ((-2, "query"), (-3, "head")):
        size = dim(rows, axis)
        if (rank(rows) or 0) >= -axis and size != 1:
            return f"the mask {rows.name!r} of shape {rows.shape} may differ by {what}"
    keys = dim(node.inputs[1], 1 if "q_num_heads" in node.attributes else 2)
    if opset > 23 and not same_dim(dim(mask, -1), keys):
        return f"the mask {mask.name!r} may be shorter than the keys: {dim(mask, -1)} of {keys}"
    source = sources(mask)[-1]
    if constant(source) is not None or source.is_initializer():
        return f"the mask {source.name!r} is a constant"
    if source.dtype not in (ir.DataType.BOOL, ir.DataType.FLOAT):
        return f"the mask {source.name!r} is of {source.dtype}"
    return source


def _branch(node: ir.Node, condition: ir.Value, taken: set[str]) -> None:
    """Put the If in the place of an Attention."""
    result, graph = node.outputs[0], node.graph
    assert graph is not None
    query = node.inputs[0]
    bodies = {}
    for branch, inputs, word in (
        ("then_branch", node.inputs[:MASK], "unmasked"),
        ("else_branch", node.inputs[: MASK + 1], "masked"),
    ):
        name = f"{node.name}_{word}" if node.name else None
        inner = ir.node("Attention", inputs, attributes=node.attributes, name=name)
        made = inner.outputs[0]
        made.name = _unique(f"{result.name}_{word}", taken)
        made.type = result.type or (query.type if query is not None else None)
        made.shape = result.shape
        if scope := node.metadata_props.get(SCOPE):
            inner.metadata_props[SCOPE] = scope
        bodies[branch] = ir.Graph([], [made], nodes=[inner], name=made.name)
    chosen = ir.node("If", [condition], attributes=bodies, name=node.name)
    chosen.outputs[0].type = bodies["then_branch"].outputs[0].type
    replace(result, chosen.outputs[0], [chosen])
    graph.remove(node, safe=True)


def _names(model: ir.Model) -> set[str]:
    """All names of values: one in a branch may be none of the graph around it, before or after."""
    found = {str(v.name) for g in model.graphs() for v in (*g.inputs, *g.initializers.values())}
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return found | {str(v.name) for node in nodes for v in node.outputs}


def _unique(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
