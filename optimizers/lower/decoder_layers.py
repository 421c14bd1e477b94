"""The layers of a decoder that keep a cache, and what each of them would have to be.

See FuseGroupQueryAttention, which asks here and draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ..dims import dim
from ..outcome import Miss, describe
from ..read import producer, rank
from .decoder_masks import Inputs, heads_of, repeats_heads, window_of
from .formulas import Unreadable

KIND = "GroupQueryAttention"
VIEWS = ("Expand", "Identity", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze")
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
LENGTHS, TOTAL = "seqlens_k", "total_sequence_length"


@dataclass(frozen=True)
class Cache:
    """One half of a layer's cache: what came before, what is new, and both of them.

    Attributes:
        past: Input of the graph, [batch, kv_heads, past, head_dim].
        new: [batch, kv_heads, sequence, head_dim], or [batch, sequence, kv_heads * head_dim].
        present: Output of the graph.
        joins: The Concat, or the Attention that has the cache among its inputs.
    """

    past: ir.Value
    new: ir.Value
    present: ir.Value
    joins: ir.Node


@dataclass(frozen=True)
class Layer:
    """One attention over a cache.

    Attributes:
        node: Attention of ai.onnx.
        key: The cache of its keys.
        value: The cache of its values.
        heads: Of its queries.
        window: How many keys back a query sees; -1 for all.
    """

    node: ir.Node
    key: Cache
    value: Cache
    heads: int
    window: int


def is_past(value: ir.Value) -> bool:
    """Whether an input is the cache of a layer: it is joined with what is new, or says so."""
    if rank(value) != 4:
        return False
    found = list(dict.fromkeys(node for node, _ in value.uses()))
    if any(node.domain == "com.microsoft" for node in found):
        return False
    return "past" in str(value.name) or any(_joins(node, value) for node in found)


def _joins(node: ir.Node, past: ir.Value) -> bool:
    if node.domain != "" or not node.outputs[0].is_graph_output():
        return False
    axis = node.attributes.get_int("axis", 0)
    return node.op_type == "Concat" and axis in (2, -2) and node.inputs[0] is past


def inputs_of(graph: ir.Graph, pasts: list[ir.Value]) -> Inputs:
    """The inputs of a decoder by their names.

    Raises:
        Unreadable: They are not what a decoder has, or its caches are of fixed length.
    """
    named = {v.name: v for v in graph.inputs}
    ids, mask, positions = (named.get(name) for name in (IDS, MASK, POSITIONS))
    if ids is None or rank(ids) != 2 or any(rank(v) not in (None, 2) for v in (mask, positions)):
        raise Unreadable(f"{IDS}, {MASK} and {POSITIONS} are not inputs of rank 2")
    if named.keys() & {LENGTHS, TOTAL}:
        raise Unreadable(f"there are inputs named {LENGTHS} or {TOTAL} already")
    shapes = {str(ir.Shape([*(p.shape or ())[1:2], *(p.shape or ())[3:]])) for p in pasts}
    sizes = [dim(pasts[0], 1), dim(pasts[0], 3)]
    if len(shapes) > 1 or not all(isinstance(s, int) for s in sizes):
        raise Unreadable(f"the caches differ, or have no fixed heads: {', '.join(sorted(shapes))}")
    if fixed := [p for p in pasts if isinstance(dim(p, 2), int)]:
        raise Unreadable(f"the cache {fixed[0].name!r} has always {dim(fixed[0], 2)} tokens")
    return Inputs(ids, mask, positions, tuple(pasts))


def layers_of(graph: ir.Graph, inputs: Inputs) -> tuple[list[Layer], list[Miss]]:
    """The layers that can be rewritten, and what keeps each of the others from it."""
    caches = {c.present: c for past in inputs.caches for c in _caches(past)}
    left, layers, misses = set(inputs.caches), [], []
    windows: dict[tuple[object, ...], int] = {}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        if node.op_type != "Attention" or node.domain != "":
            continue
        found = _halves(node, caches)
        if found is None:
            continue  # of another kind: over an encoder's states
        left -= {c.past for c in found}
        try:
            layers.append(_layer(node, *found, inputs, windows))
        except Unreadable as e:
            misses.append(Miss(KIND, describe(node), str(e)))
    misses += [_lost(past) for past in inputs.caches if past in left]
    return layers, misses


def _caches(past: ir.Value) -> Iterator[Cache]:
    for node, index in past.uses():
        if _joins(node, past) and len(node.inputs) == 2 and node.inputs[1] is not None:
            yield Cache(past, node.inputs[1], node.outputs[0], node)
        elif node.op_type == "Attention" and node.domain == "" and index in (4, 5):
            new = node.inputs[index - 3]
            made = node.outputs[index - 3 : index - 2]
            if new is not None and made and made[0].is_graph_output():
                yield Cache(past, new, made[0], node)


def _halves(node: ir.Node, caches: dict[ir.Value, Cache]) -> tuple[Cache, Cache] | None:
    """The caches that an Attention reads its keys and its values from."""
    if len(node.inputs) > 5 and node.inputs[4] is not None:
        found = [caches.get(v) for v in node.outputs[1:3]]
    else:
        found = [caches.get(v) for v in map(_source, node.inputs[1:3]) if v is not None]
    key, value = found if len(found) == 2 else (None, None)
    return None if key is None or value is None else (key, value)


def _source(value: ir.Value | None) -> ir.Value | None:
    """What a value is a view of."""
    while (node := producer(value, *VIEWS)) is not None:
        value = node.inputs[0]
    return value


def _lost(past: ir.Value) -> Miss:
    """A cache that no Attention was found for."""
    nodes = [node for node, _ in past.uses()]
    join = next((n for n in nodes if _joins(n, past)), None)
    if join is None:
        what = describe(nodes[0]) if nodes else f"input {past.name!r}"
        return Miss(KIND, what, f"{past.name!r} is not joined along the keys into an output")
    readers = [n for n, _ in join.outputs[0].uses()]
    what = describe(readers[0]) if readers else describe(join)
    return Miss(KIND, what, f"what reads {join.outputs[0].name!r} was not lifted to Attention")


def _layer(
    node: ir.Node,
    key: Cache,
    value: Cache,
    inputs: Inputs,
    windows: dict[tuple[object, ...], int],
) -> Layer:
    kv_heads, size = heads_of(key.past)
    if size % 8:
        raise Unreadable(f"a head has {size} numbers; the kernel takes multiples of 8")
    if len(node.inputs) > 6 and node.inputs[6] is not None:
        raise Unreadable("it counts its keys itself")
    first_unused = 3 if key.joins is node else 1
    if any(v.uses() or v.is_graph_output() for v in node.outputs[first_unused:]):
        raise Unreadable("its scores are used")
    if node.graph is not inputs.ids.graph:
        raise Unreadable("it is in a subgraph")
    heads = _heads(node, 0, "q_num_heads")
    if heads % kv_heads:
        raise Unreadable(f"{heads} heads do not share {kv_heads}")
    for index, half, what in ((1, key, "keys"), (2, value, "values")):
        given = node.inputs[index]
        assert given is not None
        count = _heads(node, index, "kv_num_heads")
        if half.joins is node:
            if count != kv_heads:
                raise Unreadable(f"its {what} have {count} heads, and those before {kv_heads}")
            continue
        if not repeats_heads(given, half.present, inputs, count):
            raise Unreadable(f"the {what} {given.name!r} are not the heads of {half.present.name}")
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    like = (mask, node.attributes.get_int("is_causal", 0), key.joins is node)
    if like not in windows:
        windows[like] = window_of(node, inputs)
    return Layer(node, key, value, heads, windows[like])


def _heads(node: ir.Node, index: int, name: str) -> int:
    value = node.inputs[index]
    found = node.attributes.get_int(name, 0) or (dim(value, 1) if rank(value) == 4 else None)
    if not isinstance(found, int) or not found:
        raise Unreadable("its number of heads is not known")
    return found


def other_reader(graph: ir.Graph, layers: list[Layer], inputs: Inputs) -> Miss | None:
    """A node that stays, and that depends on the mask or on the length of the cache."""
    by_node = {layer.node: layer for layer in layers}
    presents = {half.present for layer in layers for half in (layer.key, layer.value)}
    gone = dict.fromkeys([*inputs.caches, *presents], "the length of the cache")
    if inputs.mask is not None:
        gone[inputs.mask] = "the mask"
    todo = [v for v in graph.outputs if v not in presents]
    seen: set[ir.Node] = set()
    while todo:
        value = todo.pop()
        node = value.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        layer = by_node.get(node)
        if layer is not None:
            wanted: list[ir.Value | None] = [node.inputs[0], layer.key.new, layer.value.new]
        else:
            wanted = [*node.inputs, *_captured(node)]
        for v in wanted:
            if v in gone and not (asks_batch(node) and v not in presents):
                return Miss(KIND, describe(node), f"it depends on {gone[v]}, by {v.name!r}")
            if v is not None:
                todo.append(v)
    return None


def asks_batch(node: ir.Node) -> bool:
    """Whether a node asks for the first size of a value, and no other."""
    first, last = node.attributes.get_int("start", 0), node.attributes.get_int("end", -1)
    return node.op_type == "Shape" and node.domain == "" and (first, last) == (0, 1)


def _captured(node: ir.Node) -> list[ir.Value | None]:
    """What the bodies of a node read; what they make themselves leads nowhere else."""
    bodies = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    inside = (n for body in bodies for n in ir.traversal.RecursiveGraphIterator(body))
    return [*(v for n in inside for v in n.inputs), *(v for b in bodies for v in b.outputs)]
