"""Write a Gemm between two Reshapes as MatMul and Add, which take tensors of any rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit, read
from ..outcome import Outcome, describe
from .facts import Facts
from .simplify_shapes import OLDEST, reshape_target
from .weight_views import is_weight, view_of

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

POINTWISE = {  # may stand between the Gemm and the Reshape back
    *("Elu", "Erf", "Gelu", "LeakyRelu", "Mish", "Neg", "Relu", "Selu", "Sigmoid", "Softplus"),
    *("Swish", "Tanh"),
}


class UnfoldGemm(ir.passes.InPlacePass):
    """Write a Gemm between two Reshapes as MatMul and Add, which take tensors of any rank.

    ```
    a = Reshape(x, [-1, 64])                        x [batch, seq, 64]
    b = Gemm<transB=1>(a, w, bias)                  w [192, 64]
    y = Reshape(b, [batch, seq, 192])
    ->
    c = MatMul(x, w_turned)                         w_turned [64, 192], a view of the file
    y = Add(c, bias)
    ```

    A Relu or another pointwise op may stand before the last Reshape. Where x has other leading
    dimensions than y (the heads of attention), one Reshape stays before the MatMul; where y splits
    the last one, it stays behind. Refused: a weight that has to be turned and that another node
    reads too (it would be stored twice), factors other than 1, a bias with a row for each row of
    x, sizes that are not known.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Read every Gemm, then write those whose weights may be turned."""
        if (opset := model.opset_imports.get("", 0)) < OLDEST:
            note = f"the opset is {opset}, and Gemm is unfolded from opset {OLDEST}"
            return Outcome(model, False, notes=(note,))
        facts, found, notes = Facts(model), dict[ir.Node, _Found](), list[str]()
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            facts.visit(node)
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type == "Gemm" and node.domain in ("", "ai.onnx"):
                what = _read(node, facts)
                if isinstance(what, str):
                    notes.append(f"{describe(node)}: {what}")
                elif what is not None:
                    found[node] = what
        turned: dict[ir.Value, ir.Value] = {}
        hits = 0
        for node, what in found.items():
            weight = node.inputs[1]
            assert weight is not None
            if what.turned:
                if not all(n in found and found[n].turned for n in read.readers(weight)):
                    notes.append(
                        f"{describe(node)}: it reads {weight.name!r} transposed, "
                        "which another node reads as it is"
                    )
                    continue
                if weight not in turned:
                    turned[weight] = view_of(weight, np.transpose, what.turned)
                weight = turned[weight]
            _write(node, what, weight)
            hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


@dataclass
class _Found:
    """How to write one Gemm.

    Attributes:
        source: What the first Reshape reads.
        target: What to reshape it to; None where it has its leading dimensions already.
        between: The pointwise nodes between the Gemm and the last Reshapes.
        ends: The last Reshapes.
        targets: What they have to make of the new result; None for those that can go.
        turned: The shape of the transposed weight; None where it can be read as it is.
    """

    source: ir.Value
    target: list[int] | None
    between: list[ir.Node]
    ends: list[ir.Node]
    targets: list[list[int] | None]
    turned: list[int] | None


def _read(node: ir.Node, facts: Facts) -> _Found | str | None:
    """What to write; why not; None where no Reshape stands on both sides."""
    fold = read.producer(node.inputs[0], "Reshape")
    weight = node.inputs[1]
    if fold is None or fold.graph is not node.graph or (source := fold.inputs[0]) is None:
        return None
    between = list[ir.Node]()
    value = node.outputs[0]
    while (step := read.reader(value, *POINTWISE)) is not None and step.graph is node.graph:
        between.append(step)
        value = step.outputs[0]
    ends = read.readers(value)
    if not ends or any(n.op_type != "Reshape" or n.inputs[0] is not value for n in ends):
        return None
    if any(v.is_graph_output() for v in (node.outputs[0], value)):
        return "its result is an output of the graph"
    if any(n.graph is not node.graph for n in ends):
        return "its result is read in a subgraph"
    refusal = _refusal(node)
    if refusal is not None:
        return refusal
    wide, shapes = facts.shape(weight), [facts.shape(n.outputs[0]) for n in ends]
    x = facts.shape(source)
    if not x or wide is None:
        return f"the shape of {source.name!r} is not known"
    turned = bool(node.attributes.get_int("transB", 0))
    k, n = wide[::-1] if turned else wide
    numbers = [size for d in (k, n) if (size := d.number) is not None]
    # Rows as they are in the source, if its last axis is a row; else as in the first result.
    lead = x[:-1] if x[-1] == k else (shapes[0] or ())[:-1]
    target = None if (*lead, k) == x else reshape_target(x, (*lead, k))
    if not lead or len(numbers) < 2 or isinstance(target, str):
        return f"the sizes of its rows, {k} before and {n} behind, are not those of tensors there"
    targets = list[list[int] | None]()
    for shape in shapes:
        end = [] if shape is None else reshape_target((*lead, n), shape)
        if shape is None or isinstance(end, str):
            return f"what is behind it has sizes that cannot be constants: {end}"
        targets.append(None if shape == (*lead, n) else end)
    if target is not None and targets[0] is not None:
        return f"the last size behind it is {shapes[0][-1] if shapes[0] else None}, its own is {n}"
    return _Found(source, target, between, ends, targets, numbers if turned else None)


def _refusal(node: ir.Node) -> str | None:
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    for name in ("alpha", "beta"):
        if (factor := node.attributes.get_float(name, 1.0)) != 1.0:
            return f"{name} is {factor:g}"
    if node.attributes.get_int("transA", 0):
        return "it transposes what it is given"
    if weight is None or not is_weight(weight):
        return "its weight is no constant"
    if weight.dtype not in FLOATS or read.rank(weight) != 2:
        return f"its weight is {weight.dtype} of rank {read.rank(weight)}"
    if bias is not None and (read.rank(bias) is None or (read.rank(bias) or 0) > 1):
        return f"its bias has shape {bias.shape}"
    return None


def _write(node: ir.Node, found: _Found, weight: ir.Value) -> None:
    graph, name = node.graph, node.outputs[0].name
    assert isinstance(graph, ir.Graph)
    x, nodes = found.source, list[ir.Node]()

    def add(op: str, inputs: list[ir.Value], suffix: str) -> ir.Value:
        nodes.append(ir.node(op, inputs))
        made = nodes[-1].outputs[0]
        made.name, made.type = f"{name}_{suffix}", node.outputs[0].type
        return made

    if found.target is not None:
        rows = edit.constant(graph, f"{name}_target", np.array(found.target, np.int64))
        x = add("Reshape", [x, rows], "rows")
    value = add("MatMul", [x, weight], "product")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        value = add("Add", [value, node.inputs[2]], "sum")
    edit.replace(node.outputs[0], value, nodes)
    for made in (value, *(step.outputs[0] for step in found.between)):
        made.shape = _shape(found, weight)
    if found.between:
        value = found.between[-1].outputs[0]
    for end, target in zip(found.ends, found.targets, strict=True):
        old = end.outputs[0]
        if target is not None:
            name = f"{old.name}_target"
            end.replace_input_with(1, edit.constant(graph, name, np.array(target, np.int64)))
            end.attributes.pop("allowzero", None)
        elif old.is_graph_output():
            same = ir.node("Identity", [value])
            edit.replace(old, same.outputs[0], [same])
        else:
            old.replace_all_uses_with(value)


def _shape(found: _Found, weight: ir.Value) -> ir.Shape | None:
    """The shape of the new result, in the names that the graph has for it."""
    if found.target is not None:
        return found.ends[0].outputs[0].shape
    if found.source.shape is None or weight.shape is None:
        return None
    return ir.Shape([*list(found.source.shape)[:-1], weight.shape[1]])
