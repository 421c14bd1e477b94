"""The caches that RotaryEmbedding reads, made from what a decomposed rotation multiplies by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from .. import edit
from ..dims import Dim, dim
from ..read import ints, producer, rank, with_scalar
from .columns import Follow

MOVERS = ("Add", "Sub", "Mul", "Neg", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Flatten",
          "Slice", "Split", "Gather", "Expand", "Tile", "Identity")  # fmt: skip

Made = dict[tuple[object, ...], ir.Value]  # what was made for one layer, and serves the next


@dataclass(frozen=True)
class Cache:
    """`half` columns of `value`, from the first, each `step`-th: what a cache of the op holds."""

    value: ir.Value
    half: int
    step: int


def take_half(cache: Cache, heads: int, at: ir.Node, made: Made, follow: Follow) -> ir.Value:
    """The cache as [batch or 1, seq, half], made before `at` unless something before has it."""
    graph = at.graph
    assert isinstance(graph, ir.Graph)
    value, n = cache.value, rank(cache.value)
    assert n is not None
    key = (id(graph), value, cache.half, cache.step, heads)
    if key in made:
        return made[key]
    wrap = producer(value, "Unsqueeze")
    if n == 4 and wrap is not None and ints(wrap, "axes", 1) in ([heads], [heads - 4]):
        assert wrap.inputs[0] is not None
        value = wrap.inputs[0]
    elif n == 4 or heads == 2:
        value = _reshaped("Squeeze", value, heads - 4 + n, at)
    if rank(value) == 2:
        value = _reshaped("Unsqueeze", value, 0, at)
    if dim(value, -1) != cache.half:
        value = _narrow(value, cache, at, follow)
    made[key] = value
    return value


def _reshaped(kind: str, value: ir.Value, axis: int, at: ir.Node) -> ir.Value:
    """`value` without `axis`, or with a new one."""
    assert isinstance(at.graph, ir.Graph)
    assert value.shape is not None
    sizes = list(value.shape)
    sizes[axis : axis + (kind == "Squeeze")] = [] if kind == "Squeeze" else [1]
    axes = edit.constant(at.graph, "rotary_axis", np.array([axis]))
    return _before(at, ir.node(kind, [value, axes]), value, sizes, "rows")


def _narrow(value: ir.Value, cache: Cache, at: ir.Node, follow: Follow) -> ir.Value:
    """Half of the columns: from where they were repeated, and computed anew; or by a Slice."""
    chain: list[ir.Node] = []
    below: ir.Value | None = value
    while below is not None and len(chain) < 8:
        source = _unrepeated(below, cache, follow)
        if source is not None:
            for node in reversed(chain):
                inputs = [source if v is below else v for v in node.inputs]
                below = node.outputs[0]
                again = ir.node(node.op_type, inputs, attributes=dict(node.attributes))
                source = _before(at, again, below, _sizes(below, cache.half), "half")
            return source
        maker = producer(below, "Cos", "Sin", "Cast", "Mul", "Div")
        if maker is None:
            break
        pair = with_scalar(maker) if len(maker.inputs) == 2 else None
        if len(maker.inputs) == 2 and (pair is None or rank(pair[0]) != rank(value)):
            break
        chain.append(maker)
        below = maker.inputs[0] if pair is None else pair[0]
    assert isinstance(at.graph, ir.Graph)
    numbers = (0, cache.half * cache.step, -1, cache.step)
    bounds = [edit.constant(at.graph, "rotary_bound", np.array([i])) for i in numbers]
    return _before(at, ir.node("Slice", [value, *bounds]), value, _sizes(value, cache.half), "half")


def _unrepeated(value: ir.Value, cache: Cache, follow: Follow) -> ir.Value | None:
    """What the columns of the cache were before `value` had them twice; None if not in sight."""
    columns = follow.of(value)
    if columns is None:
        return None
    want, n = columns[: cache.half * cache.step : cache.step], rank(value)
    for _ in range(6):
        node = producer(value, *MOVERS)
        if node is None or node.inputs[0] is None:
            return None
        source = node.inputs[0]
        have = follow.of(source)
        if rank(source) == n and have is not None and np.array_equal(have, want):
            return source
        value = source
    return None


def _sizes(value: ir.Value, half: int) -> list[Dim]:
    assert value.shape is not None
    return [*list(value.shape)[:-1], half]


def _before(
    at: ir.Node, node: ir.Node, like: ir.Value, sizes: Sequence[Dim], what: str
) -> ir.Value:
    """What `node` makes, put before `at`; of the type of `like`, and named after it."""
    assert at.graph is not None
    at.graph.insert_before(at, node)
    made = node.outputs[0]
    made.name, made.type = f"{like.name}_{what}", like.type
    made.shape = ir.Shape(sizes)
    return made


def over_batch(cache: ir.Value, x: ir.Value, at: ir.Node, made: Made) -> ir.Value:
    """`cache` with a row for each of the batch of `x`, made before `at` unless `made` has it."""
    batch, graph, n = dim(x, 0), at.graph, rank(cache)
    if dim(cache, 0) != 1 or batch == 1 or n is None:
        return cache
    assert isinstance(graph, ir.Graph)
    # Unnamed sizes are only known to be equal where they belong to one tensor.
    named = batch.value if isinstance(batch, ir.SymbolicDim) else batch
    length = x if named is None else named
    key = (id(graph), cache, length)
    if key in made:
        return made[key]
    target = (id(graph), "batch", n, length)
    if target not in made and isinstance(batch, int):
        made[target] = edit.constant(graph, "rotary_batch", np.array([batch] + [1] * (n - 1)))
    elif target not in made:
        shape = ir.node("Shape", [x], attributes={"start": 0, "end": 1})
        shape.outputs[0].name = f"{x.name}_batch"
        ones = edit.constant(graph, "rotary_ones", np.ones(n - 1, np.int64))
        concat = ir.node("Concat", [shape.outputs[0], ones], attributes={"axis": 0})
        concat.outputs[0].name = f"{x.name}_batch_shape"
        graph.insert_before(at, [shape, concat])
        made[target] = concat.outputs[0]
    assert cache.shape is not None
    sizes = [batch, *list(cache.shape)[1:]]
    made[key] = _before(at, ir.node("Expand", [cache, made[target]]), cache, sizes, "batch")
    return made[key]
