"""Give every value its type and shape."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..outcome import Outcome


class InferShapes(ir.passes.InPlacePass):
    """Give every value its type and shape; names of dimensions survive.

    ```
    g (float[batch, seq, 8] x, float[8] w) => (float[batch, seq, 8] y) {
        a = Mul(x, w)  y = Relu(a)
    }
    ->
    g (float[batch, seq, 8] x, float[8] w) => (float[batch, seq, 8] y)
    <float[batch, seq, 8] a> {
        a = Mul(x, w)  y = Relu(a)
    }
    ```

    onnx does the work, through onnx_ir, which hands it the graph without the weights. Not
    strict: a node that onnx cannot infer (a contrib op) leaves its own outputs untyped instead of
    stopping the whole.

    onnx_ir keeps the element type alone of what onnx finds, which makes a tensor of a sequence and
    of an optional. So what may be one of these stays without a type where it came without.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Run inference and keep what it found."""
        infer = common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
        open_ = _may_be_no_tensor(model)
        before = _types(model) if open_ else None
        modified = infer(model).modified
        for value in open_:
            value.type = value.shape = None
        if before is not None:
            modified = _types(model) != before
        untyped = [
            f"{node.op_type} {node.name!r}: no type for output {value.name!r}"
            for node in model.graph
            for value in node.outputs
            if value.name and value.dtype is None and value.uses()
        ]
        return Outcome(model, modified, hits=int(modified), notes=tuple(untyped))


_MAKERS = {
    *("SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceMap"),
    *("SplitToSequence", "Optional", "OptionalGetElement"),
}
_CARRIERS = {"Identity", "If", "Loop"}  # what comes out of these is what went in, or was made there


def _may_be_no_tensor(model: ir.Model) -> list[ir.Value]:
    """Values without a type that may be sequences or optionals: none in most graphs."""
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    made = any(node.op_type in _MAKERS for node in nodes)
    given = any(not isinstance(v.type, ir.TensorType | None) for v in model.graph.inputs)
    if not made and not given:
        return []
    values = [v for n in nodes if n.op_type in _MAKERS | _CARRIERS for v in n.outputs]
    for graph in model.graph.subgraphs():
        values.extend(graph.inputs)  # of a Loop's body: what the Loop carries
    return [v for v in values if v.type is None]


def _types(model: ir.Model) -> list[tuple[ir.TypeProtocol | None, ir.Shape | None]]:
    values = [v for graph in model.graphs() for v in (*graph.inputs, *graph.initializers.values())]
    values += [v for n in ir.traversal.RecursiveGraphIterator(model.graph) for v in n.outputs]
    return [(v.type, v.shape) for v in values]
