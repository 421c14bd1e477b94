"""Move the bias of values behind the attention, into a bias that is there anyway."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import dim
from ..edit import constant as new_constant
from ..outcome import Outcome, describe
from ..read import constant, producer, rank, reader, scalar

_MASK = 3
_BUDGET = 1 << 24  # elements of the projection, which has to be read


class FoldValueBias(ir.passes.InPlacePass):
    """Fold the constant that is added to all values of an Attention into the next bias.

    ```
    v = Add(m, b)
    a = Attention<q_num_heads=12, kv_num_heads=12>(q, k, v, mask)
    p = MatMul(a, w)  y = Add(p, c)                b, w and c constants
    ->
    a = Attention<q_num_heads=12, kv_num_heads=12>(q, k, m, mask)
    p = MatMul(a, w)  y = Add(p, b @ w + c)
    ```

    The weights that a query gives to the values have the sum 1, so that the bias passes through
    as it is. Declined where a mask may hold -inf or is of bools: a row that is masked throughout
    has weights of the sum 0. Only where b @ w is small change: the projection is read for it.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every Attention of rank 3."""
        hits, notes = 0, []
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type != "Attention" or node.domain != "":
                continue
            found = _fold(node)
            if isinstance(found, str):
                notes.append(f"{describe(node)}: {found}")
            hits += found is True
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _fold(node: ir.Node) -> bool | str:
    """Whether it was folded; a string where the mask alone forbids it."""
    if len(node.outputs) > 1 or any(v is not None for v in node.inputs[4:]):
        return False
    heads = node.attributes.get_int("q_num_heads", 0)
    if not heads or heads != node.attributes.get_int("kv_num_heads", 0):
        return False  # a head of values that several queries share has its bias several times
    value, bias = _biased(node.inputs[2])
    matmul = reader(node.outputs[0], "MatMul")
    add = None if matmul is None else reader(matmul.outputs[0], "Add")
    if value is None or bias is None or matmul is None or add is None:
        return False
    weight = matmul.inputs[1]
    if matmul.inputs[0] is not node.outputs[0] or weight is None or weight.const_value is None:
        return False
    if rank(weight) != 2 or weight.const_value.size > _BUDGET or weight.is_graph_input():
        return False
    _, after = _biased(add.outputs[0])
    if after is None or weight.dtype != ir.DataType.FLOAT or bias.dtype != weight.dtype:
        return False
    mask = node.inputs[_MASK] if len(node.inputs) > _MASK else None
    if mask is not None and not _finite(mask):
        return f"the bias of values stays: the mask {mask.name!r} may leave a row no weight at all"
    b, w, c = (x.const_value.numpy() for x in (bias, weight, after) if x.const_value is not None)
    total = b.astype(np.float64) @ w.astype(np.float64) + c
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    folded = new_constant(graph, f"{after.name}_with_values", total.astype(np.float32))
    add.replace_input_with(list(add.inputs).index(after), folded)
    node.replace_input_with(2, value)
    return True


def _biased(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """(x, bias) where `value` is x plus a constant of one dimension, the last of x."""
    add = producer(value, "Add")
    for x, bias in (add.inputs, reversed(add.inputs)) if add is not None else ():
        array = constant(bias)
        if x is not None and array is not None and array.ndim == 1 and rank(x) == 3:
            return (x, bias) if dim(x, 2) == array.size else (None, None)
    return None, None


def _finite(mask: ir.Value) -> bool:
    """Whether a mask is known to hold no -inf: made of finite constants, and not by arithmetic."""
    if mask.dtype != ir.DataType.FLOAT:
        return False
    if (array := constant(mask)) is not None:
        return bool(np.isfinite(array).all())
    node = producer(mask, "Where", "Expand", "Unsqueeze", "Reshape")
    if node is None:
        return False
    if node.op_type != "Where":
        return node.inputs[0] is not None and _finite(node.inputs[0])
    return all(
        x is not None and (math.isfinite(n) if (n := scalar(x)) is not None else _finite(x))
        for x in node.inputs[1:]
    )
