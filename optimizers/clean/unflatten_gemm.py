"""Write a Gemm between two Reshapes as a MatMul of the tensor that was flattened."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit, read
from ..outcome import Outcome, describe
from .contents import ONE
from .facts import Facts
from .simplify_shapes import reshape_target


class UnflattenGemm(ir.passes.InPlacePass):
    """Write a Gemm between two Reshapes as a MatMul of the tensor that was flattened.

    ```
    f = Reshape(x, [-1, 64])  g = Gemm(f, w, b)  y = Reshape(g, [batch, seq, 128])
    ->
    m = MatMul(x, w)  y = Add(m, b)
    ```

    x is [batch, seq, 64], or is reshaped to it by constants. With transB=1 a Transpose of the
    weight is written; it folds, because it is only written where every reader of the weight is
    rewritten. alpha and beta must be 1, transA 0, and b a row. nn.Linear behind a view and
    GPT-2's Conv1D are exported in this way; as MatMul they need no size of the batch.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Judge every Gemm first: whether a weight may be transposed depends on all its readers."""
        facts, notes = Facts(model), list[str]()
        found: dict[ir.Node, _Found] = {}
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            facts.visit(node)
            gemm = read.producer(node.inputs[0], "Gemm") if node.op_type == "Reshape" else None
            if gemm is None:
                continue
            judged = _read(node, gemm, facts)
            if isinstance(judged, str):
                notes.append(f"{describe(gemm)}: {judged}")
            elif judged is not None:
                found[gemm] = judged
        tied = {
            gemm: f"another node reads {what.weight.name!r}"
            for gemm, what in found.items()
            if what.turn and not all(n in found for n in read.readers(what.weight))
        }
        notes += [f"{describe(gemm)}: {reason}" for gemm, reason in tied.items()]
        turned: dict[ir.Value, ir.Value] = {}
        for gemm, what in found.items():
            if gemm not in tied:
                _write(gemm, what, turned)
        hits = len(found) - len(tied)
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


@dataclass(frozen=True)
class _Found:
    last: ir.Node
    source: ir.Value
    target: list[int] | None
    weight: ir.Value
    turn: bool
    bias: ir.Value | None


def _read(last: ir.Node, gemm: ir.Node, facts: Facts) -> _Found | str | None:
    """What to write; why nothing can be; None where the Gemm is not between two Reshapes."""
    first = read.producer(gemm.inputs[0], "Reshape")
    if first is None or read.reader(gemm.outputs[0]) is not last or last.graph is not gemm.graph:
        return None
    weight, bias, source = gemm.inputs[1], None, first.inputs[0]
    if len(gemm.inputs) > 2:
        bias = gemm.inputs[2]
    x, y, w = (facts.shape(v) for v in (source, last.outputs[0], weight))
    if source is None or weight is None or x is None or y is None or w is None or len(y) < 2:
        return None
    for name in ("alpha", "beta"):
        if (factor := gemm.attributes.get_float(name, 1.0)) != 1.0:
            return f"{name} is {factor:g}"
    if gemm.attributes.get_int("transA", 0):
        return "transA is 1"
    turn = bool(gemm.attributes.get_int("transB", 0))
    size_in, size_out = (w[1], w[0]) if turn else (w[0], w[1])
    if y[-1] != size_out:
        return f"the last size is {y[-1]} behind it, and {size_out} in it"
    if turn and not (weight.is_initializer() and not weight.is_graph_input()):
        return f"the transposed weight {weight.name!r} is computed"
    if bias is not None:
        row = facts.shape(bias)
        if row is None or any(size != ONE for size in row[:-1]):
            return f"the bias {bias.name!r} is no row"
    want = (*y[:-1], size_in)
    target = None if x == want else reshape_target(x, want)
    if isinstance(target, str):
        return target
    return _Found(last, source, target, weight, turn, bias)


def _write(gemm: ir.Node, what: _Found, turned: dict[ir.Value, ir.Value]) -> None:
    graph, output = gemm.graph, what.last.outputs[0]
    assert isinstance(graph, ir.Graph)
    x, w, nodes = what.source, what.weight, []
    if what.target is not None:
        shape = edit.constant(graph, f"{output.name}_target", np.array(what.target, np.int64))
        nodes.append(ir.node("Reshape", [x, shape]))
        x = nodes[-1].outputs[0]
        x.name, x.type = f"{output.name}_input", what.source.type
    if what.turn:
        if w not in turned:
            turn = ir.node("Transpose", [w], attributes={"perm": [1, 0]})
            graph.insert_before(gemm, turn)
            turned[w] = turn.outputs[0]
            turned[w].name, turned[w].type = f"{w.name}_turned", w.type
            turned[w].shape = None if w.shape is None else ir.Shape(list(w.shape)[::-1])
        w = turned[w]
    nodes.append(ir.node("MatMul", [x, w]))
    if what.bias is not None:
        nodes[-1].outputs[0].name = f"{output.name}_product"
        nodes[-1].outputs[0].type, nodes[-1].outputs[0].shape = output.type, output.shape
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], what.bias]))
    edit.replace(output, nodes[-1].outputs[0], nodes)
