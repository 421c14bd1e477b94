"""Write RMSNormalization as arithmetic, where a provider lacks the operator."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..edit import replace
from ..outcome import Outcome, describe
from ..read import rank
from .writer import Writer


class DecomposeRmsNormalization(ir.passes.InPlacePass):
    """Write RMSNormalization (opset 23) in the form in which OpenVINO finds it again.

    ```
    y = RMSNormalization<axis=-1, epsilon=e>(x, scale)
    ->
    mean = ReduceMean<keepdims=1>(Pow(x, 2), [-1])
    y = Mul(Mul(x, Reciprocal(Sqrt(Add(mean, e)))), scale)
    ```

    Declined, with a note: types other than float, whose sums the operator takes in float32.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit RMSNormalization nodes in order."""
        hits, notes = 0, []
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "RMSNormalization" or node.domain != "":
                continue
            x, scale = node.inputs
            n = rank(x)
            if x is None or x.dtype != ir.DataType.FLOAT or n is None:
                notes.append(f"{describe(node)}: its input is {x.type if x else None} of rank {n}")
                continue
            axis = node.attributes.get_int("axis", -1)
            axes = range(axis - n if axis >= 0 else axis, 0)
            w = Writer(node, str(node.outputs[0].name))
            mean = w.op("ReduceMean", w.op("Pow", x, w.number(2.0, x)), w.ints(*axes), keepdims=1)
            epsilon = w.number(node.attributes.get_float("epsilon", 1e-5), x)
            size = w.op("Sqrt", w.op("Add", mean, epsilon))
            y = w.op("Mul", w.op("Mul", x, w.op("Reciprocal", size)), scale)
            replace(node.outputs[0], y, w.nodes)
            hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))
