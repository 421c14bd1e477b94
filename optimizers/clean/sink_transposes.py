"""Let the layers of a model work on its own layout, instead of turning each way for each of them.

Ops that work on the last axis alone (a MatMul with a weight, its bias, an activation, a norm, a
residual sum) do not care in which order the other axes are. They form regions, and the Transposes
stand where values enter or leave one. What this counts is the nodes at those borders, for every
order of the leading axes, with the views that stand there already (factors.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import read
from ..outcome import Outcome
from .factors import Layout
from .facts import Facts
from .merge_views import chain_at, is_view, merge_views, viewed, writable
from .regions import Region, Regions, data_of
from .simplify_shapes import OLDEST

LONGEST = 16  # views in a row that are looked at


class SinkTransposes(ir.passes.InPlacePass):
    """Let the layers of a model work on its own layout, instead of turning each way for each.

    ```
    t = Transpose<perm=[1, 0, 2]>(x)                x [batch, seq, 32], t [seq, batch, 32]
    a = MatMul(t, w)  b = Add(a, bias)  c = Relu(b)
    y = Transpose<perm=[1, 0, 2]>(c)
    ->
    a = MatMul(x, w)  b = Add(a, bias)  y = Relu(b)
    ```

    Transposes that keep the last axis move up or down through ops that work on that axis alone:
    MatMul with a weight, arithmetic with a bias or with a tensor of the same rank, activations,
    norms and Softmax over the last axis, Split of it. All of such a region takes another order of
    its leading axes where that leaves fewer nodes at its borders, with the views that stand there
    counted in: the Transpose before the heads of attention are split is one with the Transpose
    behind. Heads that Attention can split and join itself, given [batch, length, hidden], count
    for nothing: a model on another layout is turned once where it begins and once where it ends.
    Any other op (Gather, Concat, a MatMul of two activations) ends a region.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Find the regions of each graph; turn those that gain by it; merge what then meets."""
        if (opset := model.opset_imports.get("", 0)) < OLDEST:
            note = f"the opset is {opset}, and Transposes are moved from opset {OLDEST}"
            return Outcome(model, False, notes=(note,))
        hits = 0
        while turned := _sweep(model):  # each takes nodes away, so that this comes to an end
            hits += turned
            merge_views(model)
        if hits:
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits)


def _sweep(model: ir.Model) -> int:
    facts, regions = Facts(model), Regions()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        facts.visit(node)
        data = data_of(node, facts)
        if data is not None and all(v.graph is node.graph for v in data):
            regions.join(node, data)
    turned, moved = 0, set[ir.Node]()
    for region in regions.all():
        turned += _turn(region, facts, moved)
    return turned


# ---- what an order costs ---------------------------------------------------------------------

Perm = tuple[int, ...]


@dataclass
class _Border:
    """What stands at one value of the border.

    Attributes:
        value: The value of the region.
        readers: Who reads it outside; none for one that enters.
        path: The views up to `value` if it enters, or from it, that serve nothing else.
        layout: What they do; None where there are none, or other readers share the value.
    """

    value: ir.Value
    readers: list[ir.Node]
    path: list[ir.Node]
    layout: Layout | None

    def turned(self, perm: Perm) -> Layout | None:
        """The views when the region takes its axes in the order `perm`."""
        if self.layout is None:
            return None
        return _behind(self.layout, perm) if self.readers else self.layout.transposed(perm)

    def attention(self) -> ir.Node | None:
        """The Attention of rank 4 that the views split heads for, or join the heads of."""
        if not self.path:
            return None
        if self.readers:
            heads = self.path[-1].outputs[0]
            node = read.reader(heads, "Attention")
            if node is None or not any(v is heads for v in node.inputs[:3]):
                return None
        else:
            node = read.producer(self.path[0].inputs[0], "Attention")
        if node is None or "q_num_heads" in node.attributes:
            return None
        return node if len(node.outputs) == 1 and len(node.inputs) <= 4 else None

    def splits_heads(self, perm: Perm) -> bool:
        """Whether the views are then what Attention of rank 3 does itself."""
        if (into := self.turned(perm)) is None:
            return False
        whole, parts = (into.source, into.dims) if self.readers else (into.dims, into.source)
        if len(whole) != 3 or len(parts) != 4 or not all(parts):
            return False
        return whole == (parts[0], parts[2], parts[1] + parts[3])

    def cost(self, perm: Perm, facts: Facts) -> int:
        """Nodes at this border when the region takes its axes in the order `perm`."""
        turned = perm != tuple(range(len(perm)))
        as_is = len(self.path) + turned
        if (into := self.turned(perm)) is None:
            return as_is
        last = self.path[-1] if self.readers else None
        return min([as_is, *(len(plan) for plan, _ in writable(into, last, facts))])


def _behind(layout: Layout, perm: Perm) -> Layout:
    """`layout`, of a source whose axes now come in the order `perm`."""
    order = [i for axis in perm for i in layout.source[axis]]
    place = {i: k for k, i in enumerate(order)}
    return Layout(
        tuple(layout.sizes[i] for i in order),
        tuple(tuple(place[i] for i in layout.source[axis]) for axis in perm),
        tuple(tuple(place[i] for i in dim) for dim in layout.dims),
    )


def _turn(region: Region, facts: Facts, moved: set[ir.Node]) -> bool:
    """Give a region the order of axes that leaves the fewest nodes at its borders.

    `moved` holds the views at borders of regions that were turned in this sweep: what they would
    cost a neighbor is not known any more.
    """
    graphs = {node.graph for node in region.nodes}
    ranks = {len(facts.shape(v) or ()) for v in region.values}
    if len(graphs) != 1 or len(ranks) != 1:
        return False
    graph, rank = graphs.pop(), ranks.pop()
    if not isinstance(graph, ir.Graph):
        return False
    if any(v.is_graph_output() and not any(v is o for o in graph.outputs) for v in region.inside):
        return False  # a subgraph hands it out
    borders = _borders(region, facts)
    views = {node for border in borders for node in border.path}
    orders = [(*order, rank - 1) for order in permutations(range(rank - 1))]
    costs = {order: _cost(borders, order, facts) for order in orders}
    best = min(orders, key=costs.__getitem__)
    if costs[best] >= costs[orders[0]] or views & moved:
        return False
    moved |= views
    _write(graph, region, borders, best)
    return True


def _cost(borders: list[_Border], order: Perm, facts: Facts) -> int:
    """The nodes at all borders; none for the heads of an Attention that can do them itself."""
    heads = defaultdict[ir.Node, list[_Border]](list)
    for border in borders:
        if (attention := border.attention()) is not None and border.splits_heads(order):
            heads[attention].append(border)
    # Q, K, V and Y, or none: MergeAttentionHeads takes all four.
    free = {id(b) for found in heads.values() if len(found) == 4 for b in found}
    return sum(b.cost(order, facts) for b in borders if id(b) not in free)


def _borders(region: Region, facts: Facts) -> list[_Border]:
    found = []
    for value in region.entering:
        path, layout = list[ir.Node](), None
        if not region.outside(value) and not value.is_graph_output():
            path, layout = _before(value, region, facts)
        found.append(_Border(value, [], path, layout))
    for value in region.inside:
        rest = []
        for node in region.outside(value):
            path, layout = _after(value, node, region, facts)
            if layout is None:
                rest.append(node)
            else:
                found.append(_Border(value, [node], path, layout))
        if rest or value.is_graph_output():
            found.append(_Border(value, rest, [], None))
    return found


Path = tuple[list[ir.Node], Layout | None]


def _before(value: ir.Value, region: Region, facts: Facts) -> Path:
    """The views that make `value` and that nothing else reads, as far back as they go."""
    path, x = list[ir.Node](), value
    while (node := x.producer()) is not None and is_view(node) and len(path) < LONGEST:
        if node.inputs[0] is None or node.inputs[0].graph is not value.graph:
            break
        path.insert(0, node)
        x = node.inputs[0]
        if len(read.readers(x)) > 1 or x.is_graph_output():
            break
    if x in region.values:
        return [], None  # both its ends would turn
    while path and (layout := _through(path[0].inputs[0], path, facts)) is None:
        path = path[1:]  # sizes are not known that far back
    return (path, layout) if path else ([], None)


def _after(value: ir.Value, node: ir.Node, region: Region, facts: Facts) -> Path:
    """The views behind `value`, from `node` to the first value that something else reads."""
    path, x = list[ir.Node](), value
    while is_view(node) and node.graph is value.graph and node.inputs[0] is x:
        path.append(node)
        x = node.outputs[0]
        following = read.readers(x)
        if len(following) != 1 or x.is_graph_output() or len(path) == LONGEST:
            break
        node = following[0]
    if x in region.values:
        return [], None
    while path and (layout := _through(value, path, facts)) is None:
        path = path[:-1]
    return (path, layout) if path else ([], None)


def _through(source: ir.Value | None, path: list[ir.Node], facts: Facts) -> Layout | None:
    chain = None if source is None else chain_at(source, facts)
    layout = None if chain is None else chain.layout
    for node in path:
        layout = None if layout is None else viewed(layout, node, facts)
    return layout


# ---- turning ---------------------------------------------------------------------------------


def _write(graph: ir.Graph, region: Region, borders: list[_Border], perm: Perm) -> None:
    """Put a Transpose at each border; merge_views makes one of it and what stands there."""
    back = [perm.index(axis) for axis in range(len(perm))]
    for border in borders:
        value = border.value
        if value.producer() in region.nodes:
            _leave(graph, border, back)
        else:
            inside = [node for node in read.readers(value) if node in region.nodes]
            _insert(graph, value, perm, inside)
    for node in region.nodes:
        for value in node.outputs:  # those that nobody reads are in no region: onnx finds theirs
            known = value.shape if value in region.values else None
            value.shape = None if known is None else ir.Shape([known[axis] for axis in perm])


def _leave(graph: ir.Graph, border: _Border, back: list[int]) -> None:
    value = border.value
    result = _insert(graph, value, back, border.readers)
    result.shape = value.shape
    if value.is_graph_output() and border.layout is None:
        name = value.name
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = result
        value.name, result.name = f"{name}_turned", name


def _insert(
    graph: ir.Graph, value: ir.Value, perm: Iterable[int], readers: list[ir.Node]
) -> ir.Value:
    """A Transpose of `value`, right behind it, for these readers."""
    perm = list(perm)
    node = ir.node("Transpose", [value], attributes={"perm": perm})
    result = node.outputs[0]
    result.name, result.type = f"{value.name}_turned", value.type
    if value.shape is not None:
        result.shape = ir.Shape([value.shape[axis] for axis in perm])
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    for reader in readers:
        for index, x in enumerate(reader.inputs):
            if x is value:
                reader.replace_input_with(index, result)
    return result
