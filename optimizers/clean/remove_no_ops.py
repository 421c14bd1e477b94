"""Remove nodes that return what they were given."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit, read
from ..dims import dim, same_shape
from ..outcome import Outcome

END = (1 << 31) - 1  # the least of the numbers that exporters write for "to the end"

VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")  # same numbers in the same order

NEUTRAL = {"Mul": 1, "Div": 1, "Pow": 1, "Add": 0, "Sub": 0, "And": True, "Or": False}

COMMUTE = ("Mul", "Add", "And", "Or")

T = ir.DataType
EXACT = {  # types that hold every value of the key
    T.BOOL: {T.UINT8, T.INT8, T.INT32, T.INT64, T.FLOAT16, T.FLOAT, T.DOUBLE},
    T.INT32: {T.INT64, T.DOUBLE},
    T.FLOAT16: {T.FLOAT, T.DOUBLE},
    T.BFLOAT16: {T.FLOAT, T.DOUBLE},
    T.FLOAT: {T.DOUBLE},
}


class RemoveNoOps(ir.passes.InPlacePass):
    """Remove nodes that return what they were given.

    ```
    b = Identity(x)                                                 ->  x
    b = Reshape(x, s)              where x and b have one shape     ->  x
    b = Squeeze(Unsqueeze(x, 0), 0), Reshape(Reshape(x)), ...       ->  x where shapes are equal
    b = Transpose<perm=[0, 1, 2]>(x)                                ->  x
    a = Transpose<perm=p>(x)  b = Transpose<perm=q>(a)              ->  one Transpose, or x
    a = Reshape(x, s1)  b = Reshape(a, s2)                          ->  b = Reshape(x, s2)
    a = Unsqueeze(x, i)  b = Unsqueeze(a, j)                        ->  one Unsqueeze
    b = Mul(x, 1), Div(x, 1), Pow(x, 1), Add(x, 0), Sub(x, 0)       ->  x where x keeps its shape
    b = And(x, true), Or(x, false), Where(true, x, z)               ->  x where x keeps its shape
    b = Not(Not(x)), Neg(Neg(x)), Cast to the type it has           ->  x
    b = Cast<to=A>(Cast<to=B>(x))  where x is A and B holds all of A ->  x
    b = Slice of all of x, Expand to its shape, Concat or Max of x alone, Clip without bounds,
        Dropout outside of training                                 ->  x
    ```

    Shapes prove it, by number or by name. The 1 and the 0 are single numbers: a bias that happens
    to be all zeros is a part of the patterns that lifting looks for. A second Reshape is left
    alone where a 0 in its shape could copy a size from the tensor between the two; two Unsqueezes
    or Transposes where another node reads what is between them. An Identity from an input straight
    to an output stays: ONNX has no other way to say it.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Rewire readers in graph order; nodes left without readers go with the dead code."""
        hits = 0
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.domain not in ("", "ai.onnx"):
                continue
            changed = _shorten_reshape(node) or _merge_unsqueeze(node) or _merge_transpose(node)
            source = _unchanged(node)
            hits += (source is not None and _bypass(node, source)) or changed
        if hits:
            common.NameFixPass()(model)  # the name of a new constant may be that of another value
        return Outcome(model, bool(hits), hits=hits)


def _unchanged(node: ir.Node) -> ir.Value | None:
    """The value that `node` returns as it is, or None."""
    if not node.inputs or (x := node.inputs[0]) is None:
        return None
    y, op = node.outputs[0], node.op_type
    if op in NEUTRAL:
        return _neutral(node)
    if op in VIEWS:
        return _same_view(x, y)
    match op:
        case "Identity":
            return x
        case "Expand":
            return x if same_shape(x, y) else None
        case "Transpose":
            perm = _perm(node)
            return x if perm is not None and perm == sorted(perm) else None
        case "Concat" | "Max" | "Min" | "Sum" | "Mean":
            return x if len(node.inputs) == 1 else None
        case "Cast":
            return _cast(x, node.attributes.get_int("to", 0))
        case "Not" | "Neg":
            inner = read.producer(x, op)
            return None if inner is None else inner.inputs[0]
        case "Slice":
            return x if _whole(node) else None
        case "Where":
            return _chosen(node)
        case "Clip":
            bounded = any(v is not None for v in node.inputs[1:]) or node.attributes
            return None if bounded else x
        case "Dropout":
            return x if _idle(node) else None
    return None


def _neutral(node: ir.Node) -> ir.Value | None:
    """The operand that a neutral element leaves as it is."""
    if len(node.inputs) != 2:
        return None
    a, b = node.inputs
    for x, c in ((a, b), (b, a)) if node.op_type in COMMUTE else ((a, b),):
        if x is None or not same_shape(x, node.outputs[0]):
            continue
        if _is_neutral(c, node.op_type):
            return x
    return None


def _is_neutral(c: ir.Value | None, op: str) -> bool:
    """Whether c is the number that `op` does nothing with; a bias of zeros is a bias."""
    fill = read.producer(c, "ConstantOfShape")
    if op in ("And", "Or") and fill is not None:
        tensor = fill.attributes.get_tensor("value", None)
        return tensor is not None and bool(tensor.numpy().all()) == NEUTRAL[op]
    array = read.constant(c)
    if array is None or (array.size != 1 and op not in ("And", "Or")):
        return False
    return bool(np.all(array == NEUTRAL[op]))


def _same_view(x: ir.Value, y: ir.Value) -> ir.Value | None:
    """What `y` is a view of, through any number of views, and has the shape of."""
    found: ir.Value | None = x
    while found is not None:
        if same_shape(found, y):
            return found
        view = read.producer(found, *VIEWS)
        found = None if view is None else view.inputs[0]
    return None


def _cast(x: ir.Value, to: int) -> ir.Value | None:
    if x.dtype is None:
        return None
    if x.dtype == to:
        return x
    inner = read.producer(x, "Cast")
    source = None if inner is None else inner.inputs[0]
    if source is None or source.dtype != to:
        return None
    return source if x.dtype in EXACT.get(source.dtype, ()) else None


def _whole(node: ir.Node) -> bool:
    """Whether a Slice takes all there is, forwards."""
    x, y = node.inputs[0], node.outputs[0]
    if x is None or len(node.inputs) < 3:
        return False
    steps = read.ints(node, "steps", 4) if len(node.inputs) > 4 and node.inputs[4] else [1]
    if steps is None or any(step != 1 for step in steps):
        return False
    if same_shape(x, y):
        return True
    starts, ends = read.ints(node, "starts", 1), read.ints(node, "ends", 2)
    axes = read.ints(node, "axes", 3) if len(node.inputs) > 3 and node.inputs[3] else None
    if starts is None or ends is None or any(starts):
        return False
    if axes is None:
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            return False  # computed: they may be any
        axes = list(range(len(ends)))
    sizes = [dim(x, axis) for axis in axes]
    known = zip(ends, sizes, strict=False)
    return all(end >= END or (isinstance(size, int) and end >= size) for end, size in known)


def _chosen(node: ir.Node) -> ir.Value | None:
    condition, a, b = node.inputs
    array = read.constant(condition)
    if array is None or not (array.all() or not array.any()):
        return None
    x = a if array.all() else b
    return x if x is not None and same_shape(x, node.outputs[0]) else None


def _idle(node: ir.Node) -> bool:
    """Whether a Dropout drops nothing, and nobody asks for its mask."""
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if "is_test" in node.attributes or (mode is not None and not read.is_scalar(mode, 0)):
        return False
    return not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])


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
    if node.op_type != "Reshape" or len(node.inputs) < 2 or node.inputs[0] is None:
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


def _merge_unsqueeze(node: ir.Node) -> bool:
    """Let an Unsqueeze of an Unsqueeze insert the axes of both."""
    inner = read.producer(node.inputs[0], "Unsqueeze") if node.op_type == "Unsqueeze" else None
    rank, graph = read.rank(node.outputs[0]), node.graph
    if inner is None or rank is None or read.reader(inner.outputs[0]) is not node:
        return False
    outer_axes, inner_axes = (read.ints(n, "axes", 1) for n in (node, inner))
    if outer_axes is None or inner_axes is None or len(node.inputs) < 2:
        return False
    outer = {a % rank for a in outer_axes}
    kept = [axis for axis in range(rank) if axis not in outer]
    axes = sorted(outer | {kept[a % len(kept)] for a in inner_axes})
    assert isinstance(graph, ir.Graph)
    node.replace_input_with(1, edit.constant(graph, f"{node.outputs[0].name}_axes", np.array(axes)))
    node.replace_input_with(0, inner.inputs[0])
    return True


def _merge_transpose(node: ir.Node) -> bool:
    """Let a Transpose of a Transpose turn as both did, unless another node reads the first."""
    inner = read.producer(node.inputs[0], "Transpose") if node.op_type == "Transpose" else None
    if inner is None:
        return False
    first, second = _perm(inner), _perm(node)
    if first is None or second is None:
        return False
    perm = [first[axis] for axis in second]
    if perm != sorted(perm) and read.reader(inner.outputs[0]) is not node:
        return False
    node.attributes["perm"] = ir.AttrInt64s("perm", perm)
    node.replace_input_with(0, inner.inputs[0])
    return True
