"""What a graph consists of, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir


def count_ops(model: ir.Model) -> dict[str, int]:
    """Number of nodes for each op: `Add` in ai.onnx, `domain::Op` elsewhere, in sorted order.

    Nodes in subgraphs count too, as in `tally`; the bodies of functions do not.
    """
    return dict(sorted(tally(model.graph, lambda node: [_op(node)]).items()))


def tally(graph: ir.Graph, kinds: Callable[[ir.Node], Iterable[str]]) -> Counter[str]:
    """How many nodes of each kind there are, where a node may be of several kinds.

    Of the branches of an If one runs, so of each kind the branch with most of them counts: a layer
    that is there in two forms is one layer. Bodies of a Loop or a Scan count once.
    """
    counts: Counter[str] = Counter()
    for node in graph:
        counts.update(kinds(node))
        inside: Counter[str] = Counter()
        for attribute in node.attributes.values():
            for body in _bodies(attribute):
                found = tally(body, kinds)
                inside = inside | found if node.op_type == "If" else inside + found
        counts += inside
    return counts


def _op(node: ir.Node) -> str:
    ours = node.domain in ("", "ai.onnx")
    return node.op_type if ours else f"{node.domain}::{node.op_type}"


def _bodies(attribute: ir.Attr) -> Sequence[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else []


def count_changes(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What came (above 0) and what went (below 0); an op whose count stayed is left out."""
    changes = {op: after.get(op, 0) - before.get(op, 0) for op in sorted({*before, *after})}
    return {op: n for op, n in changes.items() if n}
