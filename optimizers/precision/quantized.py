"""Whether a model is quantized already."""

from __future__ import annotations

import onnx_ir as ir

from ..outcome import describe

# Ops that read, make or multiply quantized numbers, whatever their domain.
OPS = {
    *("ConvInteger", "ConvIntegerToFloat", "DequantizeLinear", "DynamicQuantizeLinear"),
    *("DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "GatherBlockQuantized", "MatMulBnb4"),
    *("MatMulFpQ4", "MatMulInteger", "MatMulInteger16", "MatMulIntegerToFloat", "MatMulNBits"),
    *("MulInteger", "QAttention", "QEmbedLayerNormalization", "QGemm", "QMoE"),
    *("QOrderedAttention", "QOrderedGelu", "QOrderedLayerNormalization"),
    *("QOrderedLongformerAttention", "QOrderedMatMul", "QuantizeLinear"),
}


def already_quantized(model: ir.Model) -> str | None:
    """The first node that shows that someone quantized the model; None where none does.

    Tables of embeddings in int8 are no such sign: they stand apart from the layers.
    """
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            if node.op_type in OPS or node.op_type.startswith("QLinear"):
                return describe(node)
    return None
