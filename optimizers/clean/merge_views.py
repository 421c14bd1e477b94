"""Write a chain of Reshape, Transpose, Squeeze and Unsqueeze in the fewest nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit, read
from ..outcome import Outcome
from .contents import Sizes
from .factors import Layout, Plan
from .facts import Facts
from .simplify_shapes import OLDEST, reshape_target
from .sizes import product

Targets = list[list[int] | ir.Value]  # of the Reshapes of a plan: constants, or what is computed

Constants = dict[tuple[int, tuple[int, ...]], ir.Value]  # those made so far, by graph

VIEWS = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")


class MergeViews(ir.passes.InPlacePass):
    """Write a chain of Reshape, Transpose, Squeeze and Unsqueeze in the fewest nodes.

    ```
    a = Reshape(x, [seq, batch*4, 8])               x [seq, batch, 32]
    b = Transpose<perm=[1, 0, 2]>(a)
    y = Reshape(b, [batch, 4, seq, 8])
    ->
    a = Reshape(x, [0, 0, 4, 8])
    y = Transpose<perm=[1, 2, 0, 3]>(a)
    ```

    A chain is one permutation of the factors of sizes (factors.py), so Reshape, Transpose,
    Reshape say all of it, and mostly fewer do. Targets become constants of numbers, 0 and one
    -1; a chain whose target has to be computed stays, unless it ends in that very target. What
    other nodes read on the way stays for them, and is then no gain to go around: the number of
    nodes and of computed targets never grows. Sizes are compared as polynomials of names.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit nodes in graph order: chains grow on the way, and are written where they end."""
        if (opset := model.opset_imports.get("", 0)) < OLDEST:
            note = f"the opset is {opset}, and views are merged from opset {OLDEST}"
            return Outcome(model, False, notes=(note,))
        hits = merge_views(model)
        return Outcome(model, bool(hits), hits=hits)


def merge_views(model: ir.Model) -> int:
    """What MergeViews does, for passes that leave chains behind; how many it shortened."""
    hits = 0
    while found := _sweep(model):  # what one chain no longer reads may shorten another
        hits += found
    return hits


def _sweep(model: ir.Model) -> int:
    sweep = _Sweep(Facts(model))
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.graph is not None:  # else it was part of a chain that is gone
            sweep.visit(node)
    if sweep.hits:
        common.RemoveUnusedNodesPass()(model)
        common.NameFixPass()(model)
    return sweep.hits


def viewed(layout: Layout, node: ir.Node, facts: Facts) -> Layout | None:
    """`layout` after the view that `node` takes; None where that is not known."""
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", None)
        return layout.transposed(perm or tuple(reversed(range(len(layout.dims)))))
    x = layout.shape
    if node.op_type == "Flatten":
        axis = node.attributes.get_int("axis", 1)
        axis += len(x) if axis < 0 else 0  # from -rank to rank: the rank itself is an axis too
        return layout.reshaped((product(x[:axis]), product(x[axis:])))
    if node.op_type == "Squeeze" and len(node.inputs) < 2:
        return None  # which axes it drops may depend on the run
    target = facts.shape(node.outputs[0])
    return None if target is None else layout.reshaped(target)


@dataclass(frozen=True)
class Chain:
    """A value as a view of another one.

    Attributes:
        source: The value that the chain starts at.
        layout: How the factors of its sizes are arranged now.
        nodes: The number of nodes between the two.
        computed: How many of them are Reshapes whose target is computed.
    """

    source: ir.Value
    layout: Layout
    nodes: int = 0
    computed: int = 0

    def grown(self, node: ir.Node, facts: Facts) -> Chain | None:
        """The chain with `node` at its end; None where the sizes do not say what it does."""
        layout = viewed(self.layout, node, facts)
        if layout is None:
            return None
        computed = node.op_type == "Reshape" and read.constant(node.inputs[1]) is None
        return Chain(self.source, layout, self.nodes + 1, self.computed + computed)


def chain_at(value: ir.Value, facts: Facts) -> Chain | None:
    """The chain that starts at `value`; None where its rank is not known or a size is 0."""
    shape = facts.shape(value)
    layout = None if shape is None else Layout.of(shape)
    return None if layout is None else Chain(value, layout)


def is_view(node: ir.Node) -> bool:
    """Whether `node` only arranges the factors of its input anew."""
    return node.op_type in VIEWS and node.domain in ("", "ai.onnx") and bool(node.inputs)


class _Sweep:
    """One walk over a model.

    Attributes:
        hits: Chains that were shortened.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.hits = facts, 0
        self._whole: dict[ir.Value, Chain | None] = {}  # from as far back as sizes are known
        self._own: dict[ir.Value, Chain | None] = {}  # the part of it that nothing else reads
        self._constants: Constants = {}

    def visit(self, node: ir.Node) -> None:
        """Learn what `node` makes, and shorten the chain that ends there, if one does."""
        self.facts.visit(node)
        if not is_view(node) or (x := node.inputs[0]) is None:
            return
        output = node.outputs[0]
        inside = x.graph is node.graph
        before = self._whole.get(x) if inside else None
        if (whole := self._grown(before, node)) is None:
            self._settle(x)  # the chain goes no further than to what this node reads
            whole = self._grown(None, node)
        if whole is None:
            return
        alone = inside and read.readers(x) == [node] and not x.is_graph_output()
        own = self._grown(self._own.get(x) if alone else None, node)
        self._whole[output], self._own[output] = whole, own or self._grown(None, node)
        follow = read.reader(output, *VIEWS)
        if follow is None or follow.graph is not node.graph:
            self._settle(output)

    def _grown(self, chain: Chain | None, node: ir.Node) -> Chain | None:
        """`chain` with `node` at its end, or the chain that `node` starts."""
        if chain is None and node.inputs[0] is not None:
            chain = chain_at(node.inputs[0], self.facts)
        return None if chain is None else chain.grown(node, self.facts)

    def _settle(self, value: ir.Value) -> None:
        """Write the chain that ends at `value` in fewer nodes, where there is a way."""
        own, whole = self._own.get(value), self._whole.get(value)
        if own is None or whole is None or not (value.uses() or value.is_graph_output()):
            return
        node = value.producer()
        assert node is not None
        best = None
        for chain in (own, whole):
            for plan, targets in writable(chain.layout, node, self.facts):
                length = max(len(plan), 1) if value.is_graph_output() else len(plan)
                computed = sum(isinstance(t, ir.Value) for t in targets)
                # A tie that starts further back frees what several chains now share.
                cost = (length, computed, -chain.nodes)
                if best is None or cost < best[0]:
                    best = cost, chain, plan, targets
        if best is not None and best[0] < (own.nodes, own.computed, -own.nodes):
            self._write(value, *best[1:])

    def _write(self, old: ir.Value, chain: Chain, plan: Plan, targets: Targets) -> None:
        node = old.producer()
        assert node is not None
        new, nodes = draw(node, chain.source, plan, targets, self._constants)
        if not nodes and old.is_graph_output():
            nodes = [ir.node("Identity", [new])]
            new = nodes[0].outputs[0]
        if nodes:
            edit.replace(old, new, nodes)
        else:
            old.replace_all_uses_with(new)
        self.hits += 1
        remove_dead(node)
        for made in nodes:
            self.facts.visit(made)
            for known in (self._whole, self._own) if is_view(made) else ():
                assert made.inputs[0] is not None
                known[made.outputs[0]] = self._grown(known.get(made.inputs[0]), made)


def writable(layout: Layout, last: ir.Node | None, facts: Facts) -> list[tuple[Plan, Targets]]:
    """The plans of a layout whose targets are constants, or that of `last`, which it replaces."""
    found = []
    for plan in layout.plans():
        targets = _targets(plan, layout.source_shape, last, facts)
        if targets is not None:
            found.append((plan, targets))
    return found


def _targets(plan: Plan, source: Sizes, node: ir.Node | None, facts: Facts) -> Targets | None:
    """The targets of the Reshapes of a plan; None where one of them has to be computed anew."""
    found = Targets()
    if plan.first is not None:
        target = reshape_target(source, plan.first)
        if isinstance(target, str):
            return None
        found.append(target)
    if plan.last is not None:
        target = reshape_target(plan.between, plan.last)
        if not isinstance(target, str):
            found.append(target)
        elif (own := _own_target(node, facts)) is not None:
            found.append(own)
        else:
            return None
    return found


def _own_target(node: ir.Node | None, facts: Facts) -> ir.Value | None:
    """The computed target of the last Reshape, if it says the same behind any other tensor."""
    if node is None or node.op_type != "Reshape":
        return None
    content = facts.content(node.inputs[1])
    if content is None or not all(
        e.number == -1 or (e.is_size and e.number != 0) for e in content.entries
    ):
        return None
    return node.inputs[1]


def draw(
    at: ir.Node, source: ir.Value, plan: Plan, targets: Targets, constants: Constants
) -> tuple[ir.Value, list[ir.Node]]:
    """The nodes of a plan, not yet in the graph of `at`, and what the last of them makes."""
    graph, name = at.graph, at.outputs[0].name
    assert isinstance(graph, ir.Graph)
    nodes, value, left = list[ir.Node](), source, list(targets)

    def add(node: ir.Node, suffix: str) -> ir.Value:
        nodes.append(node)
        node.outputs[0].name, node.outputs[0].type = f"{name}_{suffix}", source.type
        return node.outputs[0]

    def reshape(value: ir.Value, suffix: str) -> ir.Value:
        target = left.pop(0)
        if not isinstance(target, ir.Value):
            key = id(graph), tuple(target)
            if key not in constants:
                array = np.array(target, np.int64)
                constants[key] = edit.constant(graph, f"{name}_target", array)
            target = constants[key]
        return add(ir.node("Reshape", [value, target]), suffix)

    if plan.first is not None:
        value = reshape(value, "split")
    if plan.perm is not None:
        value = add(ir.node("Transpose", [value], attributes={"perm": list(plan.perm)}), "turned")
    if plan.last is not None:
        value = reshape(value, "joined")
    return value, nodes


def remove_dead(node: ir.Node) -> None:
    """Remove `node` and the views before it, as far as nothing reads them any more."""
    todo: ir.Node | None = node
    while todo is not None and todo.graph is not None:
        if any(v.uses() or v.is_graph_output() for v in todo.outputs):
            return
        x = todo.inputs[0]
        todo.graph.remove(todo, safe=True)
        before = None if x is None else x.producer()
        todo = before if before is not None and is_view(before) else None
