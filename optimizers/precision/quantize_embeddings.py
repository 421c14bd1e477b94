"""Keep tables of embeddings in int8, and look rows up in them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..clean.weight_views import is_weight
from ..dims import dim
from ..edit import constant, replace
from ..outcome import Outcome, describe, too_old
from ..read import rank, readers
from .calibrators import TINY, Array

BLOCK = 64  # numbers that share a scale, at most
SMALLEST_BLOCK = 16  # below it scales would take more than an eighth of the table
ROWS = 4096  # quantized at a time: a table may be larger than its integers and its floats together
SCALES = ir.DataType.BFLOAT16  # the range of float32: no table is too small for its scales


class QuantizeEmbeddings(ir.passes.InPlacePass):
    """Look up rows of an int8 table, and scale what was looked up.

    ```
    y = Gather(table, ids)                       table float32 [30522, 384]
    ->
    rows = Gather(table_int8, ids)               int8 [30522, 6, 64]
    scales = Gather(table_scales, ids)           bfloat16 [30522, 6, 1]
    a = Cast<float>(rows)  b = Cast<float>(scales)
    y = Reshape(Mul(a, b), [0, 0, 384])
    ```

    One scale for each 64 numbers of a row, without zero point; where no divisor of the width from
    16 to 64 is found, one for a row, and no Reshape. Only rows that are asked for are scaled, so
    that the cost is one of the text, not of the vocabulary. Of the forms tried on MiniLM (mean of
    1 - cosine to float32 over 100 sentences; microseconds of the lookup alone at 1x16 and 8x128):

        float32                                      0         7     360
        DequantizeLinear, one scale a table          2.8e-4    8     320
        DequantizeLinear, one scale a column         2.2e-5   16     830
        Cast, Mul, one scale a row                   1.9e-5   10     610
        DequantizeLinear, one scale each 64 numbers  8.8e-6   21     880
        this one                                     8.7e-6   12     760
        DequantizeLinear of the whole table, Gather  1.9e-5   5700   26000

    Scales are not constants where they are used: right for CPU and CUDA, while TensorRT has no
    use for it, whose engines hold floats anyway. Quantize before lowering: the kernel of
    EmbedLayerNormalization takes float tables.

    Args:
        min_rows: Tables of fewer rows (positions of short texts, segments) stay in float.
        skip: Names of tables that stay in float.
        scales: The type that scales are kept in; their values are bfloat16's in any case.
    """

    def __init__(
        self,
        *,
        min_rows: int = 256,
        skip: Collection[str] = (),
        scales: ir.DataType = SCALES,
    ) -> None:
        super().__init__()
        self.min_rows, self.skip, self.scales = min_rows, frozenset(skip), scales

    def call(self, model: ir.Model) -> Outcome:
        """Visit every table that a Gather reads."""
        if (outcome := too_old(model, 13, "Cast takes bfloat16")) is not None:
            return outcome
        hits, small, notes = 0, 0, []
        tables: dict[ir.Value, None] = {}
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.op_type == "EmbedLayerNormalization":
                notes.append(f"{describe(node)}: its kernel takes tables in float")
            elif node.op_type == "Gather" and node.domain == "" and node.inputs[0] is not None:
                tables[node.inputs[0]] = None
        for table in tables:
            if table.const_value is None or not _floats(table) or table.name in self.skip:
                continue
            shape = table.const_value.shape.numpy()
            if len(shape) < 2:
                continue  # a list of numbers
            if shape[0] < self.min_rows:
                small += 1
            elif why := _refusal(table):
                notes.append(f"table {table.name!r} stays in float: {why}")
            elif (written := _write(table, self.scales)) == 0:
                notes.append(f"table {table.name!r} stays in float: it holds NaN or infinity")
            else:
                hits += written
        if small:
            notes.append(f"tables of fewer than {self.min_rows} rows that stay in float: {small}")
        if hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))


def _floats(table: ir.Value) -> bool:
    return table.dtype is not None and table.dtype.is_floating_point()


def _refusal(table: ir.Value) -> str | None:
    if table.dtype != ir.DataType.FLOAT:
        return f"its numbers are {table.dtype}, not FLOAT"
    if rank(table) != 2:
        return f"its rank is {rank(table)}, not 2"
    if not is_weight(table):
        return "it is an input or an output of the graph"
    if dim(table, 1) == 0:
        return "its rows are empty"
    for node in readers(table):
        if node.op_type != "Gather" or node.domain != "":
            return f"{describe(node)} reads it too"
        if node.attributes.get_int("axis", 0) not in (0, -2):
            return f"{describe(node)} does not look up rows"
        if rank(node.inputs[1]) is None:
            return f"the rank of the ids of {describe(node)} is not known"
    return None


def quantize_rows(table: Array, block: int) -> tuple[Array, Array] | None:
    """A table (V, D) as int8 (V, D / block, block) and scales (V, D / block, 1), in bfloat16.

    Rounding a scale to 8 bits moves 127 steps of it by a quarter of one: nothing is clipped.

    Returns:
        Integers and scales; None where the table holds NaN or infinity.
    """
    shape = len(table), table.shape[1] // block
    integers = np.empty((*shape, block), np.int8)
    scales = np.empty((*shape, 1), SCALES.numpy())
    for start in range(0, len(table), ROWS):
        rows = slice(start, start + ROWS)
        part = table[rows].reshape(-1, shape[1], block)
        largest = np.abs(part).max(axis=2, keepdims=True)
        if not np.isfinite(largest).all():
            return None
        scales[rows] = np.where(largest == 0, 1, np.maximum(largest / 127, TINY))
        levels = np.rint(part / scales[rows].astype(np.float32))
        integers[rows] = np.clip(levels, -127, 127)
    return integers, scales


def _write(table: ir.Value, kept: ir.DataType) -> int:
    """Let the readers of the table read integers; how many there were, 0 where none can be."""
    tensor, graph = table.const_value, table.graph
    assert tensor is not None
    assert isinstance(graph, ir.Graph)
    width = int(tensor.shape.numpy()[1])
    block = next((n for n in range(BLOCK, SMALLEST_BLOCK - 1, -1) if width % n == 0), width)
    made = quantize_rows(tensor.numpy(), block)
    if made is None:
        return 0
    made = made[0], made[1].astype(kept.numpy())
    name = str(table.name)
    flat = block == width
    integers, scales = (
        constant(graph, f"{name}_{what}", array.reshape(len(array), -1) if flat else array)
        for what, array in zip(("int8", "scales"), made, strict=True)
    )
    gathers = readers(table)
    for gather in gathers:
        ids, out = gather.inputs[1], gather.outputs[0]
        nodes: list[ir.Node] = []
        floats = []
        for source in (integers, scales):
            rows = ir.node("Gather", [source, ids], attributes={"axis": 0})
            rows.outputs[0].name = f"{out.name}_{'int8' if source is integers else 'scales'}"
            nodes.append(rows)
            if source.dtype != ir.DataType.FLOAT:
                to = {"to": int(ir.DataType.FLOAT)}
                nodes.append(ir.node("Cast", rows.outputs, attributes=to))
                nodes[-1].outputs[0].name = f"{rows.outputs[0].name}_float"
            floats.append(nodes[-1].outputs[0])
        nodes.append(ir.node("Mul", floats))
        if not flat:
            nodes[-1].outputs[0].name = f"{out.name}_blocks"
            target = np.array([0] * (rank(ids) or 0) + [width], np.int64)
            shape = constant(graph, f"{out.name}_shape", target)
            nodes.append(ir.node("Reshape", [nodes[-1].outputs[0], shape]))
        replace(out, nodes[-1].outputs[0], nodes)
        assert gather.graph is not None
        gather.graph.remove(gather, safe=True)
    del graph.initializers[name]
    return len(gathers)
