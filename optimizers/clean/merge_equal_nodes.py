"""Compute once what is computed twice."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..outcome import Outcome

# Two of these with the same inputs are two draws, not one. Dropout is random in training mode.
RANDOM = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"}
    | {"RandomUniformLike"}
)
_MARK = "onnxpress_draw"


class MergeEqualNodes(ir.passes.InPlacePass):
    """Keep one of several nodes that compute the same from the same.

    ```
    a = Shape(x)  b = Shape(x)  c = Concat(a, b)
    ->
    a = Shape(x)  c = Concat(a, a)
    ```

    onnx_ir does the work. Nodes that draw at random, and those of domains other than ai.onnx and
    com.microsoft, whose meaning is not known here, are kept apart.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Mark what must stay, merge, and take the marks off."""
        apart = [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if is_opaque(n)]
        for index, node in enumerate(apart):
            node.attributes[_MARK] = ir.AttrInt64(_MARK, index)
        modified = common.CommonSubexpressionEliminationPass()(model).modified
        for node in apart:
            node.attributes.pop(_MARK)
        return Outcome(model, modified, hits=int(modified))


def is_opaque(node: ir.Node) -> bool:
    """Whether a node may give something else each time, as far as is known here."""
    if node.domain in ("", "ai.onnx"):
        return node.op_type in RANDOM
    return node.domain != "com.microsoft"
