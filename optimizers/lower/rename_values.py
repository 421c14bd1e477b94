"""Give values other names, where a provider takes a name for more than a name."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..outcome import Outcome


class RenameValues(ir.passes.InPlacePass):
    """Keep values inside the graph from names that mean something to a provider.

    ```
    y = Unsqueeze(x, axes)
    ->
    y = Unsqueeze(x, axes_value)
    ```

    OpenVINO's provider (in onnxruntime-openvino 1.24.1) refuses an Unsqueeze of which an input is
    called `axes`, constant or not. Inputs and outputs of the graph keep their names: they are its
    signature.

    Args:
        names: The names that are taken.
    """

    def __init__(self, names: Collection[str] = ()) -> None:
        super().__init__()
        self.names = frozenset(names)

    def call(self, model: ir.Model) -> Outcome:
        """Visit all values, of subgraphs too."""
        hits = 0
        for graph in model.graphs():
            made = (v for node in graph for v in node.outputs)
            for value in [*graph.initializers.values(), *made]:
                inner = not (value.is_graph_input() or value.is_graph_output())
                if inner and value.name in self.names:
                    value.name = f"{value.name}_value"
                    hits += 1
        if hits:
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits)
