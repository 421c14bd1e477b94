"""Write a packed projection as one MatMul for each of its parts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit, read
from ..outcome import Outcome, describe
from .weight_views import is_weight, view_of


class SplitProjections(ir.passes.InPlacePass):
    """Write a packed projection as one MatMul for each of its parts.

    ```
    a = MatMul(x, w)  b = Add(a, bias)              w [64, 192]
    q, k, v = Split<axis=2>(b, [64, 64, 64])        or three Slices of the last axis
    ->
    c = MatMul(x, w_0)  q = Add(c, bias_0)          w_0 [64, 64], a view of the file
    d = MatMul(x, w_64)  k = Add(d, bias_64)
    e = MatMul(x, w_128)  v = Add(e, bias_128)
    ```

    GPT-2 and nn.MultiheadAttention pack Q, K and V. Apart they are as fast on CPU, spare the copy
    that Split makes, and each can be read, quantized and fused as the projection that it is. The
    packed weight must have no other reader, so that the file does not grow; parts must not
    overlap, and nothing else may read what is packed.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every Split, and every Slice that takes part of a projection."""
        hits, notes = 0, list[str]()
        made: dict[tuple[ir.Value, int, int], ir.Value] = {}
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type not in ("Split", "Slice") or node.graph is None:
                continue
            found = _read(node)
            if isinstance(found, str):
                notes.append(f"{describe(node)}: {found}")
            elif found is not None:
                _write(found, made)
                hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


@dataclass
class _Found:
    """A packed projection, and where its parts are."""

    matmul: ir.Node
    bias: ir.Value | None
    parts: list[tuple[ir.Value, int, int]]  # (value, first column, column behind the last)


def _read(node: ir.Node) -> _Found | str | None:
    """What `node` takes its part of; why that cannot be split; None for other nodes."""
    packed = node.inputs[0]
    made = read.producer(packed, "Add", "MatMul")
    if made is None or packed is None or not any(map(_is_read, node.outputs)):
        return None
    bias, matmul = None, made
    if made.op_type == "Add":
        product, bias = made.inputs
        if read.producer(product, "MatMul") is None:
            product, bias = bias, product
        inner = read.producer(product, "MatMul")
        if inner is None or not is_weight(bias) or read.rank(bias) != 1:
            return None
        matmul = inner
    weight = matmul.inputs[1]
    if weight is None or not is_weight(weight) or read.rank(weight) != 2 or weight.shape is None:
        return None
    width = weight.shape[1]
    if not isinstance(width, int) or (bias is not None and bias.shape != ir.Shape([width])):
        return None
    if weight.dtype is None or weight.dtype.itemsize < 1:
        return None
    takers = read.readers(packed)
    parts = _parts(takers, packed, width)
    if parts is None:
        return None
    if packed.is_graph_output() or matmul.outputs[0].is_graph_output():
        return "the packed projection is an output of the graph"
    if made is not matmul and read.readers(matmul.outputs[0]) != [made]:
        return "another node reads the packed projection without its bias"
    if read.readers(weight) != [matmul]:
        return f"the weight {weight.name!r} has {len(read.readers(weight))} readers"
    if any(n.graph is not matmul.graph for n in (*takers, made)):
        return "a part is taken in a subgraph"
    return _Found(matmul, bias, parts)


def _parts(
    takers: list[ir.Node], packed: ir.Value, width: int
) -> list[tuple[ir.Value, int, int]] | None:
    """The columns that each of `takers` takes; None for overlaps and for other readers."""
    parts = list[tuple[ir.Value, int, int]]()
    rank = read.rank(packed)
    for node in takers:
        if rank is None or node.inputs[0] is not packed or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Split":
            if node.attributes.get_int("axis", 0) not in (-1, rank - 1):
                return None
            start = 0
            for output in node.outputs:
                size = None if output.shape is None else output.shape[-1]
                if not isinstance(size, int):
                    return None
                parts.append((output, start, start + size))
                start += size
            if start != width:
                return None
        elif node.op_type == "Slice" and (columns := _columns(node, rank, width)) is not None:
            parts.append((node.outputs[0], *columns))
        else:
            return None
    found = sorted((a, b) for _, a, b in parts)
    apart = all(first[1] <= second[0] for first, second in pairwise(found))
    return parts if apart else None


def _columns(node: ir.Node, rank: int, width: int) -> tuple[int, int] | None:
    """The columns that a Slice takes, where it takes a run of them, and of that axis alone."""
    starts, ends = read.ints(node, "starts", 1), read.ints(node, "ends", 2)
    axes = read.ints(node, "axes", 3)
    steps = [1] if len(node.inputs) < 5 or node.inputs[4] is None else read.ints(node, "steps", 4)
    if starts is None or ends is None or steps != [1] or len(starts) != 1 or axes is None:
        return None
    if axes[0] not in (-1, rank - 1):
        return None
    columns = range(width)[starts[0] : ends[0]]
    return (columns.start, columns.stop) if len(columns) else None


def _write(found: _Found, made: dict[tuple[ir.Value, int, int], ir.Value]) -> None:
    x, weight = found.matmul.inputs
    assert x is not None
    assert weight is not None
    for output, start, end in found.parts:
        if not _is_read(output):
            continue
        columns = _columns_of(weight, start, end, made)
        nodes = [ir.node("MatMul", [x, columns])]
        value = nodes[0].outputs[0]
        value.name, value.type, value.shape = f"{output.name}_product", output.type, output.shape
        if found.bias is not None:
            nodes.append(ir.node("Add", [value, _columns_of(found.bias, start, end, made)]))
            value = nodes[1].outputs[0]
            value.name = f"{output.name}_sum"
        edit.replace(output, value, nodes)


def _columns_of(
    weight: ir.Value, start: int, end: int, made: dict[tuple[ir.Value, int, int], ir.Value]
) -> ir.Value:
    """A view of some columns: layers that share a bias share its parts."""
    key = weight, start, end
    if key not in made:
        assert weight.shape is not None
        shape = [*(int(d) for d in weight.shape.numpy()[:-1]), end - start]

        def view(array: np.ndarray) -> np.ndarray:
            return array[..., start:end]

        made[key] = view_of(weight, view, shape, f"{weight.name}_{start}")
    return made[key]
