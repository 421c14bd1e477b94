"""Remove the half of a mask that is always true."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import dim, same_shape
from ..edit import constant as new_constant
from ..edit import replace
from ..outcome import Outcome, too_old
from ..read import constant, producer, rank
from .iota import Iota, is_zero, length_of, read_iota

MASK = 3  # index of attn_mask among the inputs of Attention


class RemoveTrueMasks(ir.passes.InPlacePass):
    """Remove And with what is true throughout; an Expand keeps the shape where it is needed.

    ```
    rows = Range(0, length, 1)  r = Unsqueeze(rows, [0, 1, 3])
    t = GreaterOrEqual(r, 0)                         [1, 1, length, 1]: no index is below 0
    y = And(t, mask)                                 with mask [batch, 1, 1, length]
    ->
    y = Expand(mask, [length, 1])
    ```

    transformers writes it for every mask that is not causal. A mask of Attention that is a constant
    and true throughout, however it is stretched, goes altogether: kernels are faster without one.
    (At opset 24 a mask that is shorter than the keys is padded with what hides them: it stays.)
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every And, and every Attention."""
        if (old := too_old(model, 15, "masks are read")) is not None:
            return old
        hits = 0
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.domain != "":
                continue
            if node.op_type == "Attention" and len(node.inputs) > MASK:
                if model.opset_imports[""] < 24 and _is_true(node.inputs[MASK]):
                    node.replace_input_with(MASK, None)
                    hits += 1
                continue
            if node.op_type != "And":
                continue
            for truth, mask in (node.inputs, reversed(node.inputs)):
                if mask is not None and truth is not None and _remove(node, truth, mask):
                    hits += 1
                    break
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits)


def _is_true(mask: ir.Value | None, depth: int = 8) -> bool:
    """Whether a mask is a constant of bools that are all true, however it is stretched."""
    node = producer(mask, "Expand", "Identity", "Reshape", "Transpose", "Unsqueeze")
    if node is not None and depth:
        return _is_true(node.inputs[0], depth - 1)
    array = constant(mask)
    return array is not None and array.dtype == np.bool_ and bool(array.all())


def _remove(node: ir.Node, truth: ir.Value, mask: ir.Value) -> bool:
    result, graph = node.outputs[0], node.graph
    assert graph is not None
    array = constant(truth)
    iota = _never_negative(truth)
    if iota is None and (array is None or not array.all()):
        return False
    one = array is not None and array.size == 1 and array.ndim <= (rank(mask) or 0)
    fills = iota is not None and iota.fills(dim(mask, iota.axis))
    if one or same_shape(mask, result) or (fills and (rank(truth) or 0) <= (rank(mask) or 0)):
        if result.is_graph_output():
            return False
        result.replace_all_uses_with(mask)
        return True
    if iota is None or not isinstance(graph, ir.Graph) or (rank(truth) or 0) > (rank(mask) or 0):
        return False
    nodes: list[ir.Node] = []
    length = length_of(iota, graph, nodes)
    if trailing := -1 - iota.axis:
        ones = new_constant(graph, "ones", np.ones(trailing, np.int64))
        nodes.append(ir.node("Concat", [length, ones], attributes={"axis": 0}))
        length = nodes[-1].outputs[0]
        length.name = f"{mask.name}_shape"
    nodes.append(ir.node("Expand", [mask, length]))
    replace(result, nodes[-1].outputs[0], nodes)
    return True


def _never_negative(value: ir.Value) -> Iota | None:
    """The index that `value` compares with 0 and finds to be no lower."""
    node = producer(value, "GreaterOrEqual", "LessOrEqual")
    if node is None:
        return None
    index, zero = node.inputs if node.op_type == "GreaterOrEqual" else reversed(node.inputs)
    if not is_zero(zero) or rank(zero) not in (0, 1):
        return None
    iota = read_iota(index)
    # An Expand under way would have repeated it along other axes too: only plain shapes pass.
    while producer(index, "Unsqueeze", "Cast") is not None and index is not None:
        index = index.producer().inputs[0]  # type: ignore[union-attr]
    return iota if producer(index, "Range") is not None else None
