"""Project queries, keys and values inside one attention node, for targets whose kernel does.

Contract: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftattention
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit
from ..clean.weight_views import is_weight, view_of
from ..dims import dim, same_dim
from ..outcome import Outcome, describe
from ..read import constant, ints, producer, rank, scalar

DEEP = -1e38  # a mask of this depth is a padding mask, and not a bias
FILTER = -3.3e38  # see soften_attention_mask.py


@dataclass(frozen=True)
class _Projection:
    x: ir.Value
    weight: ir.Value  # [inputs, outputs]
    bias: ir.Value | None


class PackAttention(ir.passes.InPlacePass):
    """Write com.microsoft.Attention for self-attention with constant weights.

    ```
    q = Add(MatMul(x, wq), bq)  k = MatMul(x, wk)  v = Add(MatMul(x, wv), bv)
    mask = Where(padding, 0, lowest)                       padding: [batch, 1, 1, keys], of bools
    y = Attention<q_num_heads=12, kv_num_heads=12>(q, k, v, mask)
    ->
    w = [wq | wk | wv]  b = [bq | 0 | bv]
    m = ReduceSum<keepdims=0>(Cast<int32>(padding), 1)     [batch]: how many keys there are
    y = com.microsoft.Attention<num_heads=12>(x, w, b, m)
    ```

    With lengths the CUDA kernel is flash attention (cuDNN's on sm_90); with a mask of [batch, keys]
    it writes out all scores, which Attention of ai.onnx does not. So a mask goes where its padding
    is on the `right`, and at least one key of each row is none; elsewhere it keeps its node.

    Declined: other masks than of padding (the kernel adds them, in forms that differ between its
    providers), weights that something else reads.

    Args:
        right: Whether padding is known to be on the right, and no row to be all padding.
    """

    def __init__(self, *, right: bool = False) -> None:
        super().__init__()
        self.right = right

    def call(self, model: ir.Model) -> Outcome:
        """Visit every Attention of rank 3."""
        hits, notes = 0, []
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "Attention" or node.domain != "":
                continue
            reason = _pack(node, right=self.right)
            if reason is None:
                hits += 1
            else:
                notes.append(f"{describe(node)}: {reason}")
        if hits:
            model.opset_imports.setdefault("com.microsoft", 1)
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _pack(node: ir.Node, *, right: bool) -> str | None:
    """Replace `node`, or say why not."""
    graph = node.graph
    heads = node.attributes.get_int("q_num_heads", 0)
    if not isinstance(graph, ir.Graph) or heads != node.attributes.get_int("kv_num_heads", 0):
        return "keys and values have heads of their own"
    if not heads or any(v is not None for v in node.inputs[4:]) or len(node.outputs) > 1:
        return "rank 4, or a cache"
    if node.attributes.get_float("softcap", 0.0) or "softmax_precision" in node.attributes:
        return "softcap, or a precision of its own"
    parts = [_projection(v) for v in node.inputs[:3]]
    found = [p for p in parts if p is not None]
    if len(found) < 3 or len({p.x for p in found}) > 1:
        return "queries, keys and values are not projections of one value"
    if len({(str(p.weight.shape), p.weight.dtype) for p in found}) > 1:
        return "the projections differ in size"
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    padding = None if mask is None else _padding(mask)
    if mask is not None and padding is None:
        return f"the mask {mask.name!r} is not one of padding"
    if padding is not None and _source(padding) is None:
        return f"the mask {padding.name!r} is not what is not 0 in one input"
    if padding is not None and not right:
        return f"the mask {mask.name!r} may pad anywhere" if mask is not None else None
    if padding is not None and any(dim(padding, a) == 1 != dim(found[0].x, a) for a in (0, 1)):
        return f"the padding has shape {padding.shape}, the values have {found[0].x.shape}"
    nodes: list[ir.Node] = []
    inputs: list[ir.Value | None] = [found[0].x, *_packed(graph, found)]
    if padding is not None:
        nodes += _lengths(graph, padding)
        inputs.append(nodes[-1].outputs[0])
    size = dim(found[0].weight, 1)
    assert isinstance(size, int)
    scale = node.attributes.get_float("scale", 1.0 / float(np.sqrt(size // heads)))
    attributes: dict[str, float | int] = {"num_heads": heads, "scale": scale}
    if node.attributes.get_int("is_causal", 0):
        attributes["unidirectional"] = 1
    if padding is not None:
        attributes["mask_filter_value"] = FILTER
    nodes.append(ir.node("Attention", inputs, attributes=attributes, domain="com.microsoft"))
    edit.replace(node.outputs[0], nodes[-1].outputs[0], nodes)
    return None


def _lengths(graph: ir.Graph, padding: ir.Value) -> list[ir.Node]:
    """int32 (batch): how many keys of each row are seen; equal nodes are merged later."""
    cast = ir.node("Cast", [padding], attributes={"to": int(ir.DataType.INT32)})
    axis = edit.constant(graph, f"{padding.name}_axis", np.array([1], np.int64))
    total = ir.node("ReduceSum", [cast.outputs[0], axis], attributes={"keepdims": 0})
    for node, name in ((cast, "int32"), (total, "lengths")):
        node.outputs[0].name = f"{padding.name}_{name}"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT32)
    return [cast, total]


def padded_right(model: ir.Model) -> tuple[str, ...]:
    """The inputs of which the graph reads how many of a row are not 0, and not which."""
    found: dict[str, None] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain != "com.microsoft" or node.op_type != "Attention" or len(node.inputs) < 4:
            continue
        total = producer(node.inputs[3], "ReduceSum")
        source = None if total is None else _source(total.inputs[0])
        if source is not None:
            found[str(source.name)] = None
    return tuple(found)


def _source(padding: ir.Value | None) -> ir.Value | None:
    """The input of the graph of which a value says what is not 0; None where it says more."""
    value = padding
    while value is not None and not value.is_graph_input():
        node = producer(value, "Cast", "Identity")
        value = None if node is None else node.inputs[0]
    return value


def _projection(value: ir.Value | None) -> _Projection | None:
    bias = None
    add = producer(value, "Add")
    if add is not None:
        for a, b in (add.inputs, reversed(add.inputs)):
            if constant(b) is not None and rank(b) == 1:
                value, bias = a, b
                break
    matmul = producer(value, "MatMul")
    if matmul is None:
        return None
    x, weight = matmul.inputs
    if x is None or weight is None or not is_weight(weight) or rank(weight) != 2:
        return None
    if len(weight.uses()) > 1 or rank(x) != 3:
        return None
    if bias is not None and dim(bias, 0) != dim(weight, 1):
        return None  # it broadcasts, or makes rows of one
    return _Projection(x, weight, bias)


def _packed(graph: ir.Graph, parts: list[_Projection]) -> list[ir.Value]:
    """The weights side by side, read when they are written to disk, and the biases."""
    weights = [p.weight.const_value for p in parts if p.weight.const_value is not None]
    dtype, (rows, size) = weights[0].dtype, weights[0].shape.numpy()
    name = f"{parts[0].weight.name}_qkv"

    def side_by_side(_: np.ndarray) -> np.ndarray:
        return np.concatenate([w.numpy() for w in weights], axis=1)

    weight = view_of(parts[0].weight, side_by_side, [rows, 3 * size], name)
    none = np.zeros(size, dtype.numpy())
    biases = [constant(p.bias) for p in parts]
    bias = np.concatenate([none if b is None else b for b in biases])
    return [weight, edit.constant(graph, f"{name}_bias", bias)]


def _padding(mask: ir.Value) -> ir.Value | None:
    """[batch, keys], True where a key is to be seen, that a mask of padding was made of."""
    value: ir.Value | None = mask
    views: list[str] = []
    while (node := producer(value, "Expand", "Unsqueeze", "Where")) is not None:
        if node.op_type == "Where":
            seen, yes, no = node.inputs
            depth = scalar(no)
            if scalar(yes) != 0.0 or depth is None or views.count("Where"):
                return None
            if not np.finfo(np.float32).min <= depth <= DEEP:
                return None
            value = seen
        elif node.op_type == "Unsqueeze":
            axes = ints(node, "axes", 1)
            if axes is None or sorted(a % 4 for a in axes) != [1, 2] or rank(node.inputs[0]) != 2:
                return None
            value = node.inputs[0]
        else:  # over queries: the last dimension stays
            if not same_dim(dim(node.inputs[0], -1), dim(value, -1)):
                return None
            value = node.inputs[0]
        views.append(node.op_type)
    known = value is not None and value.dtype == ir.DataType.BOOL and rank(value) == 2
    return value if known and "Unsqueeze" in views else None
