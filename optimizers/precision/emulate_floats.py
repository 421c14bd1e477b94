"""Compute a fp16 or bf16 graph in float32, rounded after each node: kernels or not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..outcome import Outcome
from ..read import readers

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FULL = ir.DataType.FLOAT


class EmulateFloats(ir.passes.InPlacePass):
    """Give every value of a 16-bit type the type float32 and the numbers of the 16-bit type.

    ```
    y = MatMul(x, w)                                     x, w, y bfloat16
    ->
    a = MatMul(x, w)                                     all float32; w has the same numbers
    y = Cast<float>(Cast<bfloat16>(a))
    ```

    What a device computes that multiplies in 16 bits and adds up in float32, as tensor cores do.
    It is made to be run, for the check of a graph that has no kernels here, and never published:
    ONNX Runtime has none for bfloat16 on the CPU, and computes float16 in float32 from one missing
    kernel to the next, so that nothing overflows there that would overflow elsewhere. A graph that
    has a 16-bit type among its inputs and outputs is refused: its signature would change.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Retype all values, then round after each node that computed one."""
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.dtype in HALVES:
                note = f"{value.name!r} is {value.dtype}, and the signature has to stay"
                return Outcome(model, False, notes=(note,))
        rounded = retyped = 0
        for graph in list(model.graphs()):
            for value in (*graph.inputs, *graph.initializers.values()):  # inputs of bodies
                if value.dtype in HALVES:
                    _widen(value)
                    retyped += 1
            for node in list(graph):
                if _rounds(node):
                    continue
                _widen_attributes(node)
                for value in node.outputs:
                    if value.dtype in HALVES:
                        _round(graph, node, value)
                        rounded += 1
        return Outcome(model, bool(rounded or retyped), hits=rounded)


def _rounds(node: ir.Node) -> bool:
    """Whether this is a Cast to 16 bits that only Casts to float32 read: it does as it should."""
    made = node.outputs[0]
    if node.op_type != "Cast" or made.dtype not in HALVES or made.is_graph_output():
        return False
    source, found = node.inputs[0], readers(made)
    full = source is not None and source.dtype == FULL
    return full and all(n.op_type == "Cast" and n.outputs[0].dtype == FULL for n in found)


def _widen(value: ir.Value) -> None:
    if value.const_value is not None:
        array = value.const_value.numpy().astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
    value.dtype = FULL


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    half = value.dtype
    assert half is not None
    narrow = ir.node("Cast", [value], attributes={"to": half.value}, name=f"{value.name}_narrow")
    wide = ir.node("Cast", [narrow.outputs[0]], attributes={"to": FULL.value})
    wide.name = f"{value.name}_wide"
    out = wide.outputs[0]
    for v, dtype in ((value, FULL), (narrow.outputs[0], half), (out, FULL)):
        v.dtype = dtype
    narrow.outputs[0].shape = out.shape = value.shape
    graph.insert_after(node, [narrow, wide])
    value.replace_all_uses_with(out, replace_graph_outputs=True)
    narrow.replace_input_with(0, value)
    name = value.name
    narrow.outputs[0].name, out.name = f"{name}_narrow", name
    value.name = f"{name}_exact"


def _widen_attributes(node: ir.Node) -> None:
    """A Cast to 16 bits rounds anyway; a constant of them becomes one of float32."""
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALVES:
            array = attribute.as_tensor().numpy().astype(np.float32)
            node.attributes[name] = ir.AttrTensor(name, ir.tensor(array))
        elif node.op_type == "Cast" and name == "to" and attribute.as_int() in HALVES:
            node.attributes[name] = ir.AttrInt64(name, FULL.value)
