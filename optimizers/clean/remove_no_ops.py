"""Remove nodes that return what they were given."""

from __future__ import annotations

import onnx_ir as ir

from ..dims import same_shape
from ..outcome import Outcome


class RemoveNoOps(ir.passes.InPlacePass):
    """Remove Identity, and the Reshape and Transpose that change nothing.

    ```
    b = Identity(x)                                                 ->  x
    b = Reshape(x, s)              where x and b have one shape     ->  x
    b = Transpose<perm=[0, 1, 2]>(x)                                ->  x
    a = Transpose<perm=p>(x)  b = Transpose<perm=inverse of p>(a)   ->  x
    a = Reshape(x, s1)  b = Reshape(a, s2)                          ->  b = Reshape(x, s2)
    ```

    Shapes prove it, by number or by name. A second Reshape is left alone where a 0 in its shape
    could copy a size from the tensor between the two. An Identity from an input straight to an
    output stays: ONNX has no other way to say it. Cast, Expand, Concat and Dropout that do
    nothing are gone before: constant folding takes them.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Rewire readers in graph order; nodes left without readers go with the dead code."""
        hits = 0
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            hits += _shorten_reshape(node)
            source = _unchanged(node)
            hits += source is not None and _bypass(node, source)
        return Outcome(model, bool(hits), hits=hits)


def _unchanged(node: ir.Node) -> ir.Value | None:
    """The value that `node` returns as it is, or None."""
    if node.domain != "" or not node.inputs or (x := node.inputs[0]) is None:
        return None
    match node.op_type:
        case "Identity":
            return x
        case "Reshape":
            return x if same_shape(x, node.outputs[0]) else None
        case "Transpose":
            perm = _perm(node)
            if perm is None:
                return None
            if perm == sorted(perm):
                return x
            inner = x.producer()
            if inner is None or inner.op_type != "Transpose" or inner.domain != "":
                return None
            first = _perm(inner)
            if first is not None and [first[axis] for axis in perm] == sorted(perm):
                return inner.inputs[0]
    return None


def _bypass(node: ir.Node, source: ir.Value) -> bool:
    """Let the readers of `node` read `source`, under the output's own name where it is one."""
    output, graph = node.outputs[0], node.graph
    assert graph is not None
    if output.is_graph_output():
        producer = source.producer()
        if producer is None or producer.graph is not graph or source.is_graph_output():
            return False
        # `source` becomes the output: it takes over what the signature promises.
        name, type_, shape = output.name, output.type, output.shape
        output.replace_all_uses_with(source, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        source.name, source.type, source.shape = name, type_ or source.type, shape or source.shape
        return True
    output.replace_all_uses_with(source)
    graph.remove(node, safe=True)
    return True


def _shorten_reshape(node: ir.Node) -> bool:
    """Let a Reshape of a Reshape read what the first one read."""
    if node.op_type != "Reshape" or node.domain != "" or node.inputs[0] is None:
        return False
    inner = node.inputs[0].producer()
    if inner is None or inner.op_type != "Reshape" or inner.domain != "":
        return False
    if not node.attributes.get_int("allowzero", 0):
        shape = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] else None
        if shape is None or 0 in shape.numpy():
            return False
    node.replace_input_with(0, inner.inputs[0])
    return True


def _perm(node: ir.Node) -> list[int] | None:
    perm = node.attributes.get_ints("perm", None)
    if perm is not None:
        return list(perm)
    shape = node.outputs[0].shape
    return None if shape is None else list(reversed(range(len(shape))))
