"""Write Attention as MatMul and Softmax, where a provider lacks the operator.

OpenVINO's ONNX frontend (2025.4.1 in onnxruntime-openvino 1.24.1, and 2026.4.1) refuses Attention
of opset 23. It reads the form written here as one ScaledDotProductAttention (its SDPAFusion wants
rank 4, keys transposed by a node of their own, the scale a scalar behind the first MatMul).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import Dim, dim
from ..edit import replace
from ..outcome import Outcome, describe
from ..read import constant, producer, rank
from .writer import Writer

MASK, PAST_KEY, PAST_VALUE, LENGTHS = 3, 4, 5, 6  # indices among the inputs of Attention
MOVES = ("Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Identity", "Slice")


@dataclass(frozen=True)
class Sizes:
    """What of an Attention's shapes has to be known, in numbers."""

    heads: int
    kv_heads: int
    head: int
    value_head: int


Shared = dict[tuple[object, ...], ir.Value]
"""What several layers read alike: masks as they are added, and which rows they leave a key."""


class DecomposeAttention(ir.passes.InPlacePass):
    """Write Attention (opset 23) as the nodes that it stands for.

    ```
    y = Attention<q_num_heads=h, kv_num_heads=h>(q, k, v, mask)       q, k, v: [batch, seq, h * d]
    ->
    q4 = Transpose<perm=[0,2,1,3]>(Reshape(q, [0, 0, h, d]))          k4 and v4 alike
    scores = Mul(MatMul(q4, Transpose<perm=[0,1,3,2]>(k4)), 1 / sqrt(d))
    p = Softmax<axis=-1>(Add(scores, mask))
    y = Reshape(Transpose<perm=[0,2,1,3]>(MatMul(p, v4)), [0, 0, h * d])
    ```

    Of rank 4, nothing is reshaped. A cache is joined by Concat, whose results are the outputs
    `present_key` and `present_value`. Where there are fewer heads of keys than of queries, a
    Gather repeats them. `softcap` bends the scores before the mask. A mask of bools becomes
    `Where(mask, 0, -inf)`; `is_causal` hides with -inf what lies after a query, counted from the
    first of the cache.

    The operator gives zeros for a row that is -inf throughout, and these nodes alone NaN. So where
    a mask is not known to be finite, the result is chosen by
    `Where(Greater(ReduceMax(mask), -inf), y4, 0)`: once for all layers that share the mask.

    Declined, with a note: head counts and sizes that are not numbers, the fourth output (scores),
    lengths of caches (input 7, opset 24), a precision of the Softmax of its own, types
    other than float and float16, masks that may be shorter than the keys (opset 24 pads them).
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit Attention nodes in order: the first of several layers carries what they share."""
        shared: Shared = {}
        opset, hits, notes = model.opset_imports.get("", 0), 0, []
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "Attention" or node.domain != "":
                continue
            sizes = _sizes(node)
            reason = sizes if isinstance(sizes, str) else _declined(node, opset)
            if reason is not None:
                notes.append(f"{describe(node)}: {reason}")
                continue
            assert isinstance(sizes, Sizes)
            _decompose(node, sizes, shared)
            hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _sizes(node: ir.Node) -> Sizes | str:
    """The numbers, or which of them is not known."""
    q, k, v = node.inputs[:3]
    if rank(q) == 3:
        heads = node.attributes.get_int("q_num_heads", 0)
        kv_heads = node.attributes.get_int("kv_num_heads", 0)
        widths = [_number(x, -1) for x in (q, k, v)]
        if not heads or not kv_heads or -1 in widths:
            return (
                f"its widths are {[dim(x, -1) for x in (q, k, v)]}, its heads {heads}, {kv_heads}"
            )
        return Sizes(heads, kv_heads, widths[0] // heads, widths[2] // kv_heads)
    if rank(q) == 4:
        numbers = _number(q, 1), _number(k, 1), _number(q, -1), _number(v, -1)
        if -1 in numbers:
            return f"its heads and their sizes are {numbers}, -1 where they vary"
        return Sizes(*numbers)
    return f"the rank of its queries is {rank(q)}"


def _number(value: ir.Value | None, axis: int) -> int:
    """The size of an axis; -1 where it is no number."""
    size = dim(value, axis)
    return size if isinstance(size, int) else -1


def _declined(node: ir.Node, opset: int) -> str | None:
    """Why it stays; None where it can be taken apart."""
    q, k = node.inputs[:2]
    given = dict(enumerate(node.inputs))
    if given.get(LENGTHS) is not None:
        return "it is given the lengths of its caches"
    if (given.get(PAST_KEY) is None) != (given.get(PAST_VALUE) is None):
        return "it is given one of the two caches"
    if any(v.uses() or v.is_graph_output() for v in node.outputs[3:]):
        return "its scores are read"
    if "softmax_precision" in node.attributes:
        return "its Softmax has a precision of its own"
    if q is None or q.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"it is of type {q.dtype if q is not None else None}"
    mask = given.get(MASK)
    if mask is None:
        return None
    if mask.dtype is None or rank(mask) is None:
        return f"type and rank of its mask {mask.name!r} are not known"
    if opset > 23:
        keys = dim(k, 1 if rank(q) == 3 else 2)
        if given.get(PAST_KEY) is not None or not _same(dim(mask, -1), keys):
            return f"its mask {mask.name!r} may be shorter than the keys"
    return None


def _same(a: Dim, b: Dim) -> bool:
    return a is not None and b is not None and str(a) == str(b) and str(a) != "None"


def _decompose(node: ir.Node, sizes: Sizes, shared: Shared) -> None:
    """Put the nodes in the place of an Attention."""
    result = node.outputs[0]
    w = Writer(node, str(result.name))
    given = dict(enumerate(node.inputs))
    q, k, v = (x for x in node.inputs[:3] if x is not None)
    flat = rank(q) == 3
    q4 = _heads(w, q, sizes.heads, sizes.head) if flat else q
    k4 = _heads(w, k, sizes.kv_heads, sizes.head) if flat else k
    v4 = _heads(w, v, sizes.kv_heads, sizes.value_head) if flat else v
    past_key, past_value = given.get(PAST_KEY), given.get(PAST_VALUE)
    if past_key is not None and past_value is not None:
        k4, v4 = w.op("Concat", past_key, k4, axis=2), w.op("Concat", past_value, v4, axis=2)
    present = [k4, v4]
    if sizes.heads != sizes.kv_heads:
        each = np.repeat(np.arange(sizes.kv_heads), sizes.heads // sizes.kv_heads)
        k4, v4 = (w.op("Gather", x, w.array(each), axis=1) for x in (k4, v4))
    scores = w.op("MatMul", q4, w.op("Transpose", k4, perm=[0, 1, 3, 2]))
    scale = node.attributes.get_float("scale", 0.0) or 1.0 / float(np.sqrt(sizes.head))
    if scale != 1.0:
        scores = w.op("Mul", scores, w.number(scale, q))
    if cap := node.attributes.get_float("softcap", 0.0):
        bent = w.op("Tanh", w.op("Div", scores, w.number(cap, q)))
        scores = w.op("Mul", bent, w.number(cap, q))
    bias, alive = _bias(w, node, q4, k4, shared)
    if bias is not None:
        scores = w.op("Add", scores, bias)
    y = w.op("MatMul", w.op("Softmax", scores, axis=-1), v4)
    if alive is not None:
        y = w.op("Where", alive, y, w.number(0.0, q), dtype=q.dtype)
    if flat:
        y = w.op("Transpose", y, perm=[0, 2, 1, 3])
        y = w.op("Reshape", y, w.ints(0, 0, sizes.heads * sizes.value_head))
    replace(result, y, w.nodes)
    for old, new in zip(node.outputs[1:3], present, strict=False):
        if not (old.uses() or old.is_graph_output()):
            continue
        if not new.is_graph_output() and new.producer() in w.nodes:
            new.name, old.name = old.name, f"{old.name}_replaced"
            new.type, new.shape = old.type or new.type, old.shape
            old.replace_all_uses_with(new, replace_graph_outputs=True)
        else:  # the keys themselves, an input of the graph perhaps
            copy = ir.node("Identity", [new])
            replace(old, copy.outputs[0], [copy])


def _heads(w: Writer, x: ir.Value, heads: int, size: int) -> ir.Value:
    """[batch, seq, heads * size] as [batch, heads, seq, size]."""
    return w.op("Transpose", w.op("Reshape", x, w.ints(0, 0, heads, size)), perm=[0, 2, 1, 3])


# Masks ----------------------------------------------------------------------------------------


def _bias(
    w: Writer, node: ir.Node, q4: ir.Value, k4: ir.Value, shared: Shared
) -> tuple[ir.Value | None, ir.Value | None]:
    """What is added to the scores, and which rows it leaves a key; None where there is none."""
    mask = node.inputs[MASK] if len(node.inputs) > MASK else None
    causal = _causal(w, node, q4, k4, shared) if node.attributes.get_int("is_causal", 0) else None
    if mask is None and causal is None:
        return None, None
    low, zero = w.number(-np.inf, q4), w.number(0.0, q4)
    key = (id(w.graph), mask, causal, "bias")
    if key not in shared:
        if mask is None:
            made = w.op("Where", causal, zero, low, dtype=q4.dtype)
        elif mask.dtype == ir.DataType.BOOL:
            seen = mask if causal is None else w.op("And", mask, causal)
            made = w.op("Where", seen, zero, low, dtype=q4.dtype)
        else:
            made = mask if causal is None else w.op("Where", causal, mask, low, dtype=q4.dtype)
        shared[key] = made
    bias = shared[key]
    if mask is None or (causal is None and _finite(mask)):
        return bias, None
    alive = (*key, "alive")
    if alive not in shared:
        most = w.op("ReduceMax", bias, w.ints(-1), keepdims=1)
        shared[alive] = w.op("Greater", most, low, dtype=ir.DataType.BOOL)
    return bias, shared[alive]


def _causal(w: Writer, node: ir.Node, q4: ir.Value, k4: ir.Value, shared: Shared) -> ir.Value:
    """Which keys a query may see, [queries, keys] of bools: those up to its own place."""
    past = node.inputs[PAST_KEY] if len(node.inputs) > PAST_KEY else None
    three = rank(node.inputs[0]) == 3
    sizes = [dim(node.inputs[i], 1 if three else 2) for i in (0, 1)]
    sizes += [0 if past is None else dim(past, 2)]
    names = tuple(n.value if isinstance(n, ir.SymbolicDim) else n for n in sizes)
    key = (id(w.graph), "causal", *(names if None not in names else (q4, k4)))
    if key not in shared:
        zero, one = w.array(np.array(0, np.int64)), w.array(np.array(1, np.int64))

        def count(value: ir.Value) -> ir.Value:
            size = w.op("Shape", value, start=2, end=3, dtype=ir.DataType.INT64)
            return w.op("Squeeze", size)

        rows = w.op("Range", zero, count(q4), one)
        if past is not None:
            rows = w.op("Add", rows, count(past))
        columns = w.op("Range", zero, count(k4), one)
        shared[key] = w.op(
            "LessOrEqual", columns, w.op("Unsqueeze", rows, w.ints(1)), dtype=ir.DataType.BOOL
        )
    return shared[key]


def _finite(mask: ir.Value, depth: int = 16) -> bool:
    """Whether every value of a mask of floats is known to be finite."""
    array = constant(mask)
    if array is not None:
        return bool(np.isfinite(array.astype(np.float64)).all())
    node = producer(mask)
    if node is None or not depth:
        return False
    if node.op_type == "Where":
        return all(v is not None and _finite(v, depth - 1) for v in node.inputs[1:])
    first = node.inputs[0] if node.inputs else None
    if node.op_type == "Cast":
        return first is not None and first.dtype == ir.DataType.BOOL
    return node.op_type in MOVES and first is not None and _finite(first, depth - 1)
