"""Compute what depends on no input, within a budget of bytes."""

from __future__ import annotations

import math

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from ..outcome import Outcome

BUDGET = 1 << 20  # bytes that one folded result may add to the model


class FoldConstants(ir.passes.InPlacePass):
    """Compute what depends on no input, unless the result would make the model grow.

    ```
    two = Constant<value_float=2.0>()  half = Reciprocal(two)  y = Mul(x, half)
    ->
    y = Mul(x, half)          with half = 0.5 as an initializer
    ```

    onnxscript's folding does the work; it also computes shape arithmetic from known shapes and
    drops Cast, Expand, Concat and Dropout that do nothing. A weight's Transpose becomes a view
    of the mapped file where the Transpose is its only reader. With a second reader (an embedding
    tied to the head) the Transpose stays: folding it would store the weight twice.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        super().__init__()
        self.budget = budget

    def call(self, model: ir.Model) -> Outcome:
        """Fold in one sweep; nodes are in topological order, so one is enough."""
        notes: list[str] = []

        def affordable(node: ir.Node) -> bool | None:
            if len(node.outputs) != 1 or node.op_type == "GatherElements":
                return (
                    False  # onnxscript folds neither (onnx evaluates the latter wrongly), and warns
                )
            # Asked before the node is computed: a refusal here costs no memory either.
            growth = sum(_bytes(v) for v in node.outputs)
            growth -= sum(_bytes(v) for v in node.inputs if v is not None and len(v.uses()) == 1)
            if growth <= self.budget:
                return None  # onnxscript's own rules decide
            notes.append(
                f"{node.op_type} {node.name!r}: folding it adds {growth:,} bytes, "
                f"over the budget of {self.budget:,}"
            )
            return False

        result = fold_constants(
            model,
            onnx_shape_inference=True,
            # Elements, not bytes: a second fence for results whose shape is not known beforehand.
            output_size_limit=self.budget // 8,
            should_fold=affordable,
        )
        return Outcome(model, result.modified, hits=int(result.modified), notes=tuple(notes))


def _bytes(value: ir.Value) -> int:
    if value.shape is None or value.dtype is None or value.dtype.is_string():
        return 0
    sizes = [d for d in value.shape if isinstance(d, int)]
    return (
        math.ceil(math.prod(sizes) * value.dtype.itemsize) if len(sizes) == len(value.shape) else 0
    )
