"""The loop that all lifting passes share: read from each anchor, write or say why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..outcome import Miss, Outcome, describe

Found = TypeVar("Found")

NEWEST = 24  # opsets after it define ops anew that we do not know: nothing is lifted there


def lift(
    model: ir.Model,
    kind: str,
    *,
    since: int,
    anchors: tuple[str, ...],
    read: Callable[[ir.Node], Found | str | None],
    write: Callable[[ir.Node, Found], None],
) -> Outcome:
    """Raise what `read` finds at the anchors to the op `kind`.

    Args:
        kind: The op that is written, as tables name it.
        since: The first opset that has it.
        anchors: Op types at which to begin; each node of them is read once, in graph order.
        read: Judges and changes nothing. None: the node is no such thing. A string: it nearly is;
            the string names the first condition that failed, and the value. Else what was found.
        write: Draws what was found: adds nodes, and rewires readers.
    """
    opset = model.opset_imports.get("", 0)
    if not since <= opset <= NEWEST:
        note = f"the opset is {opset}, and {kind} is lifted from opset {since} to {NEWEST}"
        return Outcome(model, False, notes=(note,))
    hits, misses = 0, []
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type not in anchors or node.domain not in ("", "ai.onnx"):
            continue
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue  # an earlier hit took it
        found = read(node)
        if isinstance(found, str):
            misses.append(Miss(kind, describe(node), found))
        elif found is not None:
            write(node, found)
            hits += 1
    if hits:
        # Dead code still reads: the next rule would take it for a second reader.
        common.RemoveUnusedNodesPass()(model)
        common.NameFixPass()(model)
    return Outcome(model, bool(hits), hits=hits, misses=tuple(misses))
