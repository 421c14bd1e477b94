"""Take Softmax over the last axis as it is, where an old opset ran it over a matrix."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import same_shape
from ..edit import replace
from ..outcome import Outcome
from ..read import producer, rank, reader


class UnflattenSoftmax(ir.passes.InPlacePass):
    """Drop Flatten and Reshape around a Softmax over the last axis.

    ```
    f = Flatten<axis=3>(x)                           with x of rank 4
    p = Softmax<axis=-1>(f)
    y = Reshape(p, shape)                            with y of the shape of x
    ->
    y = Softmax<axis=-1>(x)
    ```

    Before opset 13, Softmax ran over all axes from its own to the last; where the rank is not known
    yet, `convert_opset` writes that out. LogSoftmax and Hardmax alike.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every Softmax of a matrix."""
        hits = 0
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type not in ("Softmax", "LogSoftmax", "Hardmax") or node.domain != "":
                continue
            flatten = producer(node.inputs[0], "Flatten")
            reshape = reader(node.outputs[0], "Reshape")
            if flatten is None or reshape is None or node.attributes.get_int("axis", -1) != -1:
                continue
            x, result = flatten.inputs[0], reshape.outputs[0]
            n, axis = rank(x), flatten.attributes.get_int("axis", 1)
            if x is None or n is None or axis not in (n - 1, -1) or not same_shape(x, result):
                continue
            made = ir.node(node.op_type, [x], attributes={"axis": -1})
            replace(result, made.outputs[0], [made])
            hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
        return Outcome(model, bool(hits), hits=hits)
