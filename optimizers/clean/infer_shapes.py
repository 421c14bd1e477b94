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
    """

    def call(self, model: ir.Model) -> Outcome:
        """Run inference and keep what it found."""
        infer = common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
        modified = infer(model).modified
        untyped = [
            f"{node.op_type} {node.name!r}: no type for output {value.name!r}"
            for node in model.graph
            for value in node.outputs
            if value.name and value.dtype is None and value.uses()
        ]
        return Outcome(model, modified, hits=int(modified), notes=tuple(untyped))
