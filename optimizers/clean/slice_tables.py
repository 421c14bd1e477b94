"""Take the first rows of a table as a slice, where an exporter gathers them one by one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import dim
from ..edit import replace
from ..outcome import Outcome, too_old
from ..read import constant, ints, producer, rank


class SliceTables(ir.passes.InPlacePass):
    """Turn a Gather of counted rows into a Slice of the table.

    ```
    positions = Slice([[0, 1, ..., 511]], [0], length, [1], [1])
    y = Gather(table, positions)                     with table [512, 64], and no other reader
    ->
    y = Slice(table, [0], length, [1], [1])          with table [1, 512, 64]
    ```

    How BERT and its kin add their positions. The positions have to count every row of the table
    from 0, so that a length beyond it is cut at the same place.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit every Gather."""
        if (old := too_old(model, 10, "tables are sliced")) is not None:
            return old
        hits = 0
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            if node.op_type != "Gather" or node.domain != "" or not _counts_rows(node):
                continue
            table, cut = node.inputs[0], node.inputs[1].producer()  # type: ignore[union-attr]
            assert table is not None
            assert cut is not None
            if rank(cut.inputs[0]) == 2:
                _add_axis(table)
            # The axis of the positions, the last of theirs, is the one before the rows' own.
            made = ir.node("Slice", [table, *cut.inputs[1:]])
            replace(node.outputs[0], made.outputs[0], [made])
            hits += 1
        if hits:
            common.RemoveUnusedNodesPass()(model)
        return Outcome(model, bool(hits), hits=hits)


def _counts_rows(gather: ir.Node) -> bool:
    table, cut = gather.inputs[0], producer(gather.inputs[1], "Slice")
    if table is None or cut is None or gather.attributes.get_int("axis", 0) != 0:
        return False
    weight = table.is_initializer() and not table.is_graph_input() and not table.is_graph_output()
    if not weight or len(table.uses()) > 1 or rank(table) != 2 or table.const_value is None:
        return False
    rows, n, axes = constant(cut.inputs[0]), rank(cut.inputs[0]), ints(cut, "axes", 3)
    steps = ints(cut, "steps", 4) if len(cut.inputs) > 4 else [1]
    # Counted from the front: the table has one axis more.
    if rows is None or n not in (1, 2) or axes != [n - 1] or steps != [1]:
        return False
    if ints(cut, "starts", 1) != [0] or (n == 2 and rows.shape[0] != 1):
        return False
    return rows.size == dim(table, 0) and np.array_equal(rows.reshape(-1), np.arange(rows.size))


def _add_axis(table: ir.Value) -> None:
    """Make [rows, size] into [1, rows, size], without reading it."""
    tensor = table.const_value
    assert tensor is not None
    shape = ir.Shape([1, *tensor.shape.numpy()])
    table.const_value = ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy()[None]), dtype=tensor.dtype, shape=shape, name=table.name
    )
    table.shape = shape
