"""Remove the guard against NaN behind a Softmax of which no row can be masked throughout."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import read
from ..outcome import Outcome, describe

Range = tuple[float, float]

MOVES = ("Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Identity", "Slice")


class RemoveNanGuards(ir.passes.InPlacePass):
    """Remove the guard against NaN behind a Softmax of which no row can be masked throughout.

    ```
    p = Softmax(MatMul(q, k))  nan = IsNaN(p)  y = Where(nan, 0, p)
    ->
    y = Softmax(MatMul(q, k))
    ```

    torch writes the guard for rows that a mask of -inf covers: their Softmax is 0/0. It goes
    where no such row can be: without a mask; with a mask that is at least the lowest float
    everywhere (in float16 at least -30000: a score below 0 would take the lowest to -inf); with
    a constant mask of which every row keeps an entry; with Trilu<upper=1>(mask, k) for k above 0,
    which keeps the first. Elsewhere it stays, with a note: ai.onnx.Attention has such a row give
    0, so that the rule that writes Attention can take the guard along. The scores themselves, a
    MatMul or the product in a Gemm, are taken to be finite; what Gemm adds to it is a mask.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit each Where once."""
        hits, notes = 0, []
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            softmax = _guarded(node)
            if softmax is None:
                continue
            reason = _may_be_masked(softmax)
            if reason is not None:
                notes.append(f"{describe(node)}: {reason}")
                continue
            old, new = node.outputs[0], softmax.outputs[0]
            if old.is_graph_output():
                notes.append(f"{describe(node)}: it is an output of the model")
                continue
            old.replace_all_uses_with(new)
            hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _guarded(node: ir.Node) -> ir.Node | None:
    """The Softmax p of Where(IsNaN(p), 0, p)."""
    if node.op_type != "Where" or node.domain not in ("", "ai.onnx"):
        return None
    condition, zero, p = node.inputs
    nan, softmax = read.producer(condition, "IsNaN"), read.producer(p, "Softmax")
    if nan is None or softmax is None or nan.inputs[0] is not p or read.factor_of(zero, p) != 0:
        return None
    return softmax if read.last_axis(p, [softmax.attributes.get_int("axis", -1)]) else None


def _may_be_masked(softmax: ir.Node) -> str | None:
    """Why a row may be -inf throughout; None where it cannot be."""
    dtype = softmax.outputs[0].dtype
    if dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16):
        return f"the type is {dtype}"
    floor = -30000.0 if dtype == ir.DataType.FLOAT16 else float(np.finfo(dtype.numpy()).min)
    scores, low, scale, by_row = softmax.inputs[0], 0.0, 1.0, 0
    while (node := read.producer(scores)) is not None:
        match node.op_type:
            case "MatMul" | "Gemm":
                if len(node.inputs) > 2 and (added := node.inputs[2]) is not None:
                    found = _range(added)
                    if found is None or not all(map(math.isfinite, found)):
                        return f"{added.name!r}, which {describe(node)} adds, may be infinite"
                    low -= abs(node.attributes.get_float("beta", 1.0)) * max(map(abs, found))
                return None if low * scale >= floor else f"masks come to {low * scale:g}"
            case "Mul" | "Div" if (pair := _scaled(node)) and 0 < pair[1] < math.inf:
                scores, factor = pair[0], pair[1] if node.op_type == "Mul" else 1 / pair[1]
                scale *= max(1.0, factor)
            case "Add":
                masks = [(v, f) for v in node.inputs if v is not None and (f := _lowest(v))]
                if not masks:
                    return f"neither operand of {describe(node)} is a mask of known values"
                mask, (least, everywhere) = masks[0]
                by_row += not everywhere
                if not math.isfinite(least) or by_row > 1:
                    return f"rows of the mask {mask.name!r} may be -inf throughout"
                low, scores = low + min(least, 0.0), read.other(node, mask)
            case "Where":
                _, a, b = node.inputs
                filled = [(r, o) for v, o in ((a, b), (b, a)) if (r := _range(v)) is not None]
                if len(filled) != 1:
                    return f"{describe(node)} fills in no known number"
                (least, most), scores = filled[0]
                if not math.isfinite(least) or not math.isfinite(most):
                    return f"{describe(node)} fills in {least:g}"
                low += min(least, 0.0)
            case _:
                return f"the scores come from {describe(node)}, not from a MatMul"
    return f"the scores {scores.name if scores else ''!r} are an input"


def _scaled(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(tensor, number) of a product, or of a quotient of the tensor by the number; or None."""
    pair = read.with_scalar(node)
    divides = node.op_type == "Div" and pair is not None and node.inputs[0] is not pair[0]
    return None if divides else pair


def _lowest(mask: ir.Value) -> tuple[float, bool] | None:
    """What no entry of a mask is below, and True; or what the greatest of no row is, and False."""
    found = _range(mask)
    if found is not None and (math.isfinite(found[0]) or found[1] == math.inf):
        return (found[0] if found[1] < math.inf else -math.inf), True
    array = read.constant(mask)
    if array is not None and array.ndim and array.dtype.kind == "f" and array.size:
        return float(array.max(axis=-1).min()), False
    if (trilu := read.producer(mask, "Trilu")) is not None:
        above = trilu.attributes.get_int("upper", 1) == 1
        k = read.scalar(trilu.inputs[1]) if len(trilu.inputs) > 1 else 0
        source = _range(trilu.inputs[0])
        if above and k is not None and k > 0 and source is not None and source[1] < math.inf:
            return 0.0, False
    return None if found is None else (found[0], True)


def _range(value: ir.Value | None, depth: int = 16) -> Range | None:
    """(least, greatest) of a tensor of masks: constants, choices between them, and bools."""
    array = read.constant(value)
    filled = read.producer(value, "ConstantOfShape")
    if array is None and filled is not None:
        tensor = filled.attributes.get_tensor("value", None)
        array = np.zeros(1) if tensor is None else tensor.numpy()
    if array is not None:
        plain = array.size and array.dtype.kind in "fiub" and not np.isnan(array).any()
        return (float(array.min()), float(array.max())) if plain else None
    node = read.producer(value)
    if node is None or not depth:
        return None
    if node.op_type in MOVES:
        return _range(node.inputs[0], depth - 1)
    if node.op_type == "Cast":
        x = node.inputs[0]
        return (0.0, 1.0) if x is not None and x.dtype == ir.DataType.BOOL else None
    if node.op_type == "Where":
        a, b = (_range(v, depth - 1) for v in node.inputs[1:])
        return None if a is None or b is None else (min(a[0], b[0]), max(a[1], b[1]))
    if node.op_type in ("Add", "Sub", "Mul"):
        a, b = (_range(v, depth - 1) for v in node.inputs)
        if a is None or b is None or not all(map(math.isfinite, (*a, *b))):
            return None
        corners = [_apply(node.op_type, x, y) for x in a for y in b]
        return (min(corners), max(corners))
    return None


def _apply(op: str, x: float, y: float) -> float:
    return x + y if op == "Add" else x - y if op == "Sub" else x * y
