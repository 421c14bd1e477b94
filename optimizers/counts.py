"""What a graph consists of, in numbers."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir


def count_ops(model: ir.Model) -> dict[str, int]:
    """Number of nodes for each op: `Add` in ai.onnx, `domain::Op` elsewhere, in sorted order.

    Nodes in subgraphs (If, Loop, Scan) count too; the bodies of functions do not.
    """
    counts = Counter(
        node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
    )
    return dict(sorted(counts.items()))


def count_changes(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What came (above 0) and what went (below 0); an op whose count stayed is left out."""
    changes = {op: after.get(op, 0) - before.get(op, 0) for op in sorted({*before, *after})}
    return {op: n for op, n in changes.items() if n}
