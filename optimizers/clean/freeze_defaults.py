"""Take weights out of the inputs."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..outcome import Outcome


class FreezeDefaults(ir.passes.InPlacePass):
    """Make constants of inputs that have a value of their own.

    ```
    g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }
    ->
    g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }
    ```

    Files below IR version 4 list all their weights so. In younger ones it is a default that a
    caller may override; no pass could fold such a weight, and a note says that it is fixed now.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit the inputs."""
        names = [v.name for v in model.graph.inputs if v.is_initializer()]
        meant = names if (model.ir_version or 0) >= 4 else []
        notes = tuple(f"the input {n!r} has a default, and is fixed to it now" for n in meant)
        common.RemoveInitializersFromInputsPass()(model)
        return Outcome(model, bool(names), hits=len(names), notes=notes)
