"""Compute what depends on no input, within a budget of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript.optimizer import fold_constants

from ..dims import dim
from ..outcome import Outcome, describe
from ..read import constant, rank
from .merge_equal_nodes import is_opaque

BUDGET = 1 << 20  # bytes that one folded result may add to the model
OLDEST = 13  # onnxscript writes Constant, Split, Squeeze and Unsqueeze as opset 13 has them
HIDDEN = "onnxpress.hidden"  # a domain that no model imports, and that onnxscript passes by


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

    onnxscript also makes Split of SplitToSequence, wherever it can tell the number of parts. It
    is kept from those that it gets wrong or stumbles over, and from graphs below opset 13.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        super().__init__()
        self.budget = budget

    def call(self, model: ir.Model) -> Outcome:
        """Fold in one sweep; nodes are in topological order, so one is enough."""
        opset = model.opset_imports.get("", 0)
        if opset < OLDEST:
            note = f"left alone: the graph is of opset {opset}, and folding writes opset {OLDEST}"
            return Outcome(model, False, notes=(note,))
        notes, before = _hide(model, opset), _edges(model)

        def affordable(node: ir.Node) -> bool | None:
            if len(node.outputs) != 1 or node.op_type == "GatherElements":
                return False  # onnxscript folds neither, and warns; onnx has the latter wrong
            if is_opaque(node):
                return False  # one draw is not a constant
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

        try:
            result = fold_constants(
                model,
                onnx_shape_inference=True,
                # Elements, not bytes: a second fence for results of a shape not known beforehand.
                output_size_limit=self.budget // 8,
                should_fold=affordable,
            )
            modified = result.modified
        except RuntimeError as e:
            if not str(e).startswith("Error during constant folding for node"):
                raise
            # It goes node by node, and judges each before it changes anything: what was folded so
            # far is whole. Only the names are not: they are made unique at the end.
            common.NameFixPass()(model)
            notes.append(f"stopped half-way: {e}: {e.__cause__}")
            modified = _edges(model) != before
        finally:
            for node in ir.traversal.RecursiveGraphIterator(model.graph):
                if node.domain == HIDDEN:
                    node.domain = ""
        return Outcome(model, modified, hits=int(modified), notes=tuple(notes))


def _hide(model: ir.Model, opset: int) -> list[str]:
    """Move what onnxscript must not see out of its sight; a note for each."""
    notes = []
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain or node.op_type != "SplitToSequence":
            continue
        if said := _unsafe_split(node, opset):
            notes.append(f"{describe(node)}: {said}")
            node.domain = HIDDEN
    return notes


def _edges(model: ir.Model) -> list[tuple[ir.Node, Sequence[ir.Value | None]]]:
    return [(node, node.inputs) for node in ir.traversal.RecursiveGraphIterator(model.graph)]


def _unsafe_split(node: ir.Node, opset: int) -> str | None:
    """Why SplitToSequence must not become a Split, or None."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return None  # parts of one: onnxscript leaves it alone itself
    if node.attributes.get_int("keepdims", 1) == 0:
        return "keepdims is 0, which ONNX ignores where sizes are given, and folding does not"
    sizes = constant(node.inputs[1])
    if (rank(node.inputs[1]) if sizes is None else sizes.ndim) == 1:
        count = dim(node.inputs[1], 0) if sizes is None else sizes.size
        return None if isinstance(count, int) and count else f"it has {count} parts"
    if sizes is None:
        return "the size of its parts is not known"
    if dim(node.inputs[0], node.attributes.get_int("axis", 0)) == 0:
        return "it has no parts, and no Split has none"
    if opset < 18:
        return f"equal parts are written as opset 18 has them, the graph is of opset {opset}"
    return None


def _bytes(value: ir.Value) -> int:
    if value.shape is None or value.dtype is None or value.dtype.is_string():
        return 0
    sizes = [d for d in value.shape if isinstance(d, int)]
    return (
        math.ceil(math.prod(sizes) * value.dtype.itemsize) if len(sizes) == len(value.shape) else 0
    )
