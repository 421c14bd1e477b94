"""Put the bodies of functions in the place of their calls."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..outcome import Outcome


class InlineFunctions(ir.passes.InPlacePass):
    """Inline every function of the model; the names of sizes inside are forgotten first.

    ```
    y = my.twice(x)                     <domain: "my"> twice (a) => (b) { b = Add(a, a) }
    ->
    y = Add(x, x)
    ```

    A name of a size means one number within a graph, but another one in each call of a function.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Forget, then let onnx_ir inline."""
        for function in model.functions.values():
            for node in ir.traversal.RecursiveGraphIterator(function):
                for value in node.outputs:
                    if value.shape is not None:
                        value.shape = ir.Shape(
                            [d if isinstance(d, int) else None for d in value.shape]
                        )
        count = len(model.functions)
        modified = common.InlinePass()(model).modified
        return Outcome(model, modified, hits=count if modified else 0)
