"""Raise decomposed attention to Attention, whoever exported it.

The operator: https://onnx.ai/onnx/operators/onnx__Attention.html (since opset 23). With Q, K, V of
rank 4, [batch, heads, length, size], it is softmax(scale * Q @ K^T + mask) @ V; fewer heads of K
and V than of Q are shared by groups, as in GQA and MQA.

What a mask is made of does not matter here: padding, causal, ALiBi and relative positions are all
a bias that is added. A mask that fills (masked_fill) becomes one: scores filled with -inf, or with
any number too low to be reached, get no weight, and a row that is filled throughout with a finite
number gets equal weights, which adding SOFT reproduces (x + SOFT is SOFT for every score x). Two
masks with numbers of different depth are refused: in a row that both mask, the higher one wins.
A row that is -inf throughout is NaN after Softmax, in PyTorch's guarded form 0; the kernel: 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ..dims import Dim, dim, same_dim
from ..edit import constant as new_constant
from ..edit import replace
from ..outcome import Outcome, describe
from ..read import is_scalar, last_axis, producer, rank, reader, readers, with_scalar
from .scores import LOW, Add, Fill, Scores, read_scores, stopped_at
from .walk import lift

SOFT = -3.3e38  # see lower/soften_attention_mask.py: the kernel takes lower ones for -inf
DEEP = -1e38  # to what is filled with this, nothing that is added makes a difference
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass
class _Found:
    """All that the operator needs."""

    scores: Scores
    q: ir.Value
    k: ir.Value | None  # [batch, heads, keys, size], where the graph has it
    k_transposed: ir.Value
    v: ir.Value
    result: ir.Value


class LiftAttention(ir.passes.InPlacePass):
    """Raise MatMul, scale, mask, Softmax, MatMul to Attention.

    ```
    kt = Transpose<perm=[0, 1, 3, 2]>(k)
    s = MatMul(q, kt)  t = Mul(s, 0.125)  u = Add(t, mask)     or Div; on q, k or both; before or
    p = Softmax<axis=-1>(u)                                    after the mask; Where(mask, -1e9, t)
    n = IsNaN(p)  g = Where(n, 0.0, p)                         where the exporter guards
    y = MatMul(g, v)
    ->
    y = Attention<scale=0.125>(q, k, v, mask)
    ```

    Rank 3, [batch or batch * heads, length, size], gets a dimension for one head and loses it
    again. Refused, with the reason: scores or probabilities that something else reads too, a scale
    that is no number, a fill that scores may reach, dtypes without a kernel.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every Softmax."""
        return lift(model, "Attention", since=23, anchors=("Softmax",), read=_read, write=_write)


def _read(softmax: ir.Node) -> _Found | str | None:
    scores, output = read_scores(softmax), _forward(softmax)
    if output is None or (isinstance(output, str) and scores is None):
        return None
    if scores is None:
        node = stopped_at(softmax)
        return None if node is None else f"{describe(node)} makes the scores, or changes them"
    if isinstance(output, str):
        return output
    matmul = output
    if isinstance(scores, str):
        return scores
    if not last_axis(softmax.outputs[0], [softmax.attributes.get_int("axis", -1)]):
        return f"Softmax is over axis {softmax.attributes.get_int('axis', -1)}, not the last"
    left, right = scores.matmul.inputs
    v, result = matmul.inputs[1], matmul.outputs[0]
    assert left is not None
    assert right is not None
    assert v is not None
    q, scale = _unscaled(left)
    k_transposed, k_scale = _unscaled(right)
    scores.scale *= scale * k_scale
    if not scores.scale > 0:
        return f"the scale is {scores.scale:g}"
    k = _untransposed(k_transposed)
    found = _Found(scores, q, k, k_transposed, v, result)
    return _refusal(found) or found


def _forward(softmax: ir.Node) -> ir.Node | str | None:
    """The MatMul with the values, through Casts and the guard against NaN."""
    value = softmax.outputs[0]
    guard = _guard(value)
    if guard is not None:
        value = guard
    elif len(readers(value)) > 1 and any(n.op_type == "MatMul" for n in readers(value)):
        names = sorted(n.op_type for n in readers(value))
        return f"the probabilities have {len(names)} readers: {', '.join(names)}"
    if (node := reader(value, "Cast")) is not None:
        value = node.outputs[0]
    matmuls = [n for n in readers(value) if n.op_type == "MatMul" and n.domain == ""]
    if not matmuls or matmuls[0].inputs[0] is not value:
        return None
    if value.is_graph_output() or softmax.outputs[0].is_graph_output():
        return "the probabilities are an output of the graph"
    if len(value.uses()) > 1:
        return f"the probabilities have {len(value.uses())} readers"
    return matmuls[0]


def _guard(value: ir.Value) -> ir.Value | None:
    """The output of Where(IsNaN(value), 0, value), where nothing else reads `value`."""
    found = {n.op_type: n for n in readers(value)}
    where, isnan = found.get("Where"), found.get("IsNaN")
    if len(readers(value)) != 2 or where is None or isnan is None:
        return None
    guarded = where.inputs[0] is isnan.outputs[0] and where.inputs[2] is value
    return where.outputs[0] if guarded and is_scalar(where.inputs[1], 0.0) else None


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """(tensor, number) with value = tensor * number."""
    scale = 1.0
    while (node := producer(value, "Mul", "Div")) is not None:
        found = with_scalar(node)
        if found is None or (node.op_type == "Div" and node.inputs[0] is not found[0]):
            break
        if found[1] == 0.0:
            break
        value = found[0]
        scale = scale * found[1] if node.op_type == "Mul" else scale / found[1]
    return value, scale


def _untransposed(value: ir.Value) -> ir.Value | None:
    """What `value` is the transpose of, in its last two dimensions; None where no node says so."""
    node = producer(value, "Transpose", "Reshape")
    if node is None:
        return None
    x = node.inputs[0]
    assert x is not None
    if node.op_type == "Transpose":
        n, perm = rank(value), list(node.attributes.get_ints("perm", []))
        return x if n is not None and perm == [*range(n - 2), n - 1, n - 2] else None
    # torch writes Reshape to rank 3, Transpose, Reshape back for every batch of matrices.
    inner = producer(x, "Transpose")
    first = producer(inner.inputs[0], "Reshape") if inner is not None else None
    if inner is None or first is None or list(inner.attributes.get_ints("perm", [])) != [0, 2, 1]:
        return None
    source = first.inputs[0]
    n = rank(source)
    if source is None or n is None or n != rank(value):
        return None
    kept = all(same_dim(dim(source, a), dim(first.outputs[0], a)) for a in (-1, -2))
    kept &= same_dim(dim(source, -1), dim(value, -2)) and same_dim(dim(source, -2), dim(value, -1))
    kept &= all(same_dim(dim(source, a), dim(value, a)) for a in range(n - 2))
    return source if kept else None


def _refusal(found: _Found) -> str | None:
    """The first condition of the operator that is not met."""
    q, k_transposed, v = found.q, found.k_transposed, found.v
    if q.dtype not in FLOATS:
        return f"queries of {q.dtype.name if q.dtype else 'unknown type'} have no kernel"
    ranks = [rank(x) for x in (q, k_transposed, v)]
    if ranks not in ([4, 4, 4], [3, 3, 3]):
        return f"Q, K and V have ranks {', '.join(map(str, ranks))}; 3 or 4 each is wanted"
    if rank(found.result) != ranks[0]:
        return f"the result has rank {rank(found.result)}, the queries have {ranks[0]}"
    # MatMul broadcasts over batch and heads; the operator does over heads of K and V alone. That V
    # has a row for each key needs no proof: MatMul takes nothing else.
    batches = [dim(x, 0) for x in (q, k_transposed, v)]
    if not _all_same(batches):
        sizes = ", ".join(map(str, batches))
        return f"Q, K and V are not known to have one batch: {sizes}"
    heads = [dim(x, 1) for x in (q, k_transposed, v)]
    if ranks[0] == 4 and not (_all_same(heads) or heads[1:] == [1, 1]):
        return f"Q, K and V have {', '.join(map(str, heads))} heads"
    if any(to not in FLOATS for to in found.scores.casts):
        return f"the scores are cast to {found.scores.casts[0].name}"
    if found.result.dtype not in (None, q.dtype):
        return f"the result is {found.result.dtype}, the queries are {q.dtype}"
    return _mask_refusal(found)


def _mask_refusal(found: _Found) -> str | None:
    fills = [t for t in found.scores.terms if isinstance(t, Fill)]
    adds = [t for t in found.scores.terms if isinstance(t, Add)]
    for term in found.scores.terms:
        value = term.value if isinstance(term, Add) else term.condition
        n = rank(value)
        if n is None or n > (rank(found.q) or 0):
            return f"the mask {value.name!r} has rank {n}, the scores have {rank(found.q)}"
        if isinstance(term, Add) and value.dtype not in (found.q.dtype, None):
            return f"the mask {value.name!r} is {value.dtype}, the queries are {found.q.dtype}"
        keys = dim(found.k_transposed, -1)
        if n and dim(value, -1) == 1 and keys != 1:
            return f"the last dimension of mask {value.name!r} is 1, not that of the keys: {keys}"
        wider = [a for a in range(-2, -n - 1, -1) if dim(found.q, a) == 1 != dim(value, a)]
        if wider:  # the sum has the mask's size there, the operator's result has that of Q
            return f"the mask {value.name!r} of shape {value.shape} widens Q of {found.q.shape}"
        if fills and found.q.dtype == ir.DataType.FLOAT16:
            return f"the mask {value.name!r} fills float16 scores, where adding overflows"
    depths = {f.number for f in fills}
    if depths and max(depths) > LOW:
        return f"after scaling, a mask fills with {max(depths):g}, which scores may reach"
    if len(depths) > 1:
        return f"masks fill with different numbers: {', '.join(f'{d:g}' for d in sorted(depths))}"
    if adds and fills and fills[0].number > DEEP:
        added, number = adds[0].value.name, fills[0].number
        return f"the mask {added!r} is added to scores that another fills with {number:g} only"
    return None


def _all_same(sizes: list[Dim]) -> bool:
    return all(same_dim(sizes[0], size) for size in sizes[1:])


def _write(softmax: ir.Node, found: _Found) -> None:
    graph = softmax.graph
    assert isinstance(graph, ir.Graph)
    at = found.result.producer()
    assert at is not None
    tape = _Tape(graph)
    k = found.k
    if k is None:
        k = tape.op("Transpose", *_swapped(found.k_transposed))
    operands = [found.q, k, found.v]
    mask = _mask(tape, found)
    heads = rank(found.q) == 4
    if not heads:
        axis = new_constant(graph, "head_axis", np.array([1], np.int64))
        operands = [tape.op("Unsqueeze", [x, axis]) for x in operands]
        if mask is not None and rank(mask) == 3:
            mask = tape.op("Unsqueeze", [mask, axis])
    attributes: dict[str, float | int] = {"scale": found.scores.scale}
    if found.scores.casts and ir.DataType.FLOAT in found.scores.casts:
        attributes["softmax_precision"] = int(ir.DataType.FLOAT)
    y = tape.op("Attention", [*operands, *([] if mask is None else [mask])], attributes)
    if not heads:
        y = tape.op("Squeeze", [y, new_constant(graph, "head_axis", np.array([1], np.int64))])
    replace(found.result, y, tape.nodes)


def _swapped(value: ir.Value) -> tuple[list[ir.Value], dict[str, list[int]]]:
    """Operand and perm of the Transpose that swaps the last two dimensions of `value`."""
    n = rank(value) or 0
    perm, node = list(range(n)), producer(value, "Transpose")
    if node is not None and (x := node.inputs[0]) is not None:  # one Transpose in place of two
        value, perm = x, list(node.attributes.get_ints("perm", perm[::-1]))
    return [value], {"perm": [*perm[:-2], perm[-1], perm[-2]]}


def _mask(tape: _Tape, found: _Found) -> ir.Value | None:
    """The terms as one bias: a fill overrides what was added before it."""
    mask: ir.Value | None = None
    dtype = found.q.dtype
    assert dtype is not None
    for term in found.scores.terms:
        if isinstance(term, Add):
            value = term.value
            if not math.isclose(term.factor, 1.0):
                value = tape.op("Mul", [value, tape.number(term.factor, dtype)])
            mask = value if mask is None else tape.op("Add", [mask, value])
        else:
            number = tape.number(-math.inf if math.isinf(term.number) else SOFT, dtype)
            below = tape.number(0.0, dtype) if mask is None else mask
            yes, no = (number, below) if term.when else (below, number)
            mask = tape.op("Where", [term.condition, yes, no])
    if mask is not None and mask.shape is None:
        values = [t.value if isinstance(t, Add) else t.condition for t in found.scores.terms]
        mask.shape = ir.Shape([None] * max(rank(v) or 0 for v in values))
        mask.type = ir.TensorType(dtype)
    return mask


class _Tape:
    """New nodes in order, and the constants that they read."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.nodes = graph, list[ir.Node]()

    def op(
        self,
        op_type: str,
        inputs: list[ir.Value],
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """The output of a new node."""
        node = ir.node(op_type, inputs, attributes=attributes)
        self.nodes.append(node)
        value = node.outputs[0]
        value.name = f"{inputs[0].name}_{op_type.lower()}"
        return value

    def number(self, number: float, dtype: ir.DataType) -> ir.Value:
        return new_constant(self.graph, "number", np.array(number, dtype.numpy()))
