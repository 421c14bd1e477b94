"""Take back what skip_empty_masks wrote: one Attention again, which has a mask."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..edit import replace
from ..outcome import Outcome, describe
from .padding import read_branches


class MergeMaskBranches(ir.passes.InPlacePass):
    """Merge an Attention without a mask and one with it, where the mask hides nothing.

    ```
    all = Cast<uint8>(seen)  least = ReduceMin<keepdims=0>(all)  empty = Cast<bool>(least)
    y = If(empty) { Attention(q, k, v) } else { Attention(q, k, v, mask) }
    ->
    y = Attention(q, k, v, mask)                   with mask made of `seen`
    ```

    So a graph that was lowered for the CPU can be the base of another one: no other pass looks
    into branches. The condition has to be the very one of skip_empty_masks, on a value that the
    mask is made of; with any other, two Attentions that differ are two Attentions.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every If."""
        hits, notes = 0, []
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            found = read_branches(node)
            if found is None:
                continue
            if isinstance(found, str):
                notes.append(f"{describe(node)}: {found}")
                continue
            graph, masked = node.graph, found.masked
            assert graph is not None
            merged = ir.node(
                "Attention", masked.inputs, attributes=masked.attributes, name=node.name
            )
            merged.outputs[0].name = masked.outputs[0].name  # else numbered, at the cost of others
            replace(node.outputs[0], merged.outputs[0], [merged])
            for inner in (found.plain, masked):  # dead, but still readers of what they read
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)
            graph.remove(node, safe=True)
            hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)  # the condition
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))
