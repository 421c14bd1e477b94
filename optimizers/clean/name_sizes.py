"""Give values the sizes that names of dimensions prove, beyond what onnx infers."""

from __future__ import annotations

import onnx_ir as ir

from ..outcome import Outcome
from .contents import Sizes
from .facts import Facts
from .simplify_shapes import OLDEST
from .sizes import Size


class NameSizes(ir.passes.InPlacePass):
    """Give values the sizes that names of dimensions prove, beyond what onnx infers.

    ```
    y = Reshape(x, [-1, 16])                    with x [batch, seq, 64] and y [unk__0, 16]
    ->
    y = Reshape(x, [-1, 16])                    with y [4*batch*seq, 16]
    ```

    onnx gives a new name to every size that it would have to compute; passes that compare shapes
    by name then see two sizes where there is one. No node changes. Outputs of the model keep what
    they declare.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Walk the graph once; each value whose sizes become known counts as a hit."""
        if (opset := model.opset_imports.get("", 0)) < OLDEST:
            note = f"the opset is {opset}, and sizes are named from opset {OLDEST}"
            return Outcome(model, False, notes=(note,))
        facts, hits = Facts(model), 0
        # A product written as text must not meet an input's size that is called the same.
        taken = {
            str(d) for v in model.graph.inputs for d in v.shape or () if not isinstance(d, int)
        }
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            facts.visit(node)
            for output in node.outputs:
                hits += _name(output, facts.shape(output), taken)
        return Outcome(model, bool(hits), hits=hits)


def _name(value: ir.Value, sizes: Sizes | None, taken: set[str]) -> bool:
    if sizes is None or value.is_graph_output():
        return False
    have = list(value.shape) if value.shape is not None else [None] * len(sizes)
    found = [
        old if isinstance(old, int) else _said(new, old, taken)
        for old, new in zip(have, sizes, strict=True)
    ]
    if value.shape is not None and found == have:
        return False
    value.shape = ir.Shape(found)
    return True


def _said(size: Size, old: ir.SymbolicDim | None, taken: set[str]) -> int | ir.SymbolicDim | None:
    if size.number is not None:
        return size.number
    if not size.is_public or (size.name is None and str(size) in taken):
        return old
    return ir.SymbolicDim(str(size))
