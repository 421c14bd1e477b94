"""Which ops take 16-bit floats, and where: one table for each question, and onnx's schemas.

Types come from the schemas of onnx, by opset. The tables hold what a schema does not say: what
is computed wrongly though the types are right, and the ops of com.microsoft, read from the
schemas of ONNX Runtime 1.32 (`get_all_operator_schema`).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

FLOAT = ir.DataType.FLOAT

KEEP = {
    **dict.fromkeys(
        ("QuantizeLinear", "DequantizeLinear"), "scales are halved in no quantized graph"
    ),
    "CumSum": "a running sum counts no further than its mantissa",
    **dict.fromkeys(
        ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
         "RandomUniformLike"),
        "a draw in another type is another draw",
    ),
    **dict.fromkeys(
        ("BlackmanWindow", "EyeLike", "HammingWindow", "HannWindow", "MelWeightMatrix"),
        "it names its type itself",
    ),
}  # fmt: skip
"""Ops of ai.onnx that stay in float32, and why."""

SIZES = {"Shape", "Size"}
"""Ops that look at no number."""

MOVES = {
    *("Cast", "CastLike", "Concat", "Dropout", "Expand", "Flatten", "Gather", "GatherElements"),
    *("Identity", "Pad", "Reshape", "ScatterElements", "ScatterND", "Slice", "Split", "Squeeze"),
    *("Tile", "Transpose", "Trilu", "Unsqueeze", "Where"),
}
"""Ops that move numbers and compute none."""

COMPARISONS = {"Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"}

CHEAP = {
    *(MOVES - {"Gather", "GatherElements", "ScatterElements", "ScatterND"}),
    *("Abs", "Add", "Ceil", "Clip", "Div", "Exp", "Floor", "Log", "Max", "Min", "Mod", "Mul"),
    *("Neg", "Pow", "Range", "Reciprocal", "Round", "Sign", "Sqrt", "Sub"),
}
"""Ops of which positions, angles and masks are made."""

ANGLES = {"Cos", "Range", "Sin"}
"""Ops whose float inputs are positions or angles: 2049 is no fp16, and 257 no bf16."""

ROOTS = {"Expand", "Identity", "Pow", "Reciprocal", "Reshape", "Sqrt", "Unsqueeze"}
"""Ops through which a denominator's epsilon goes before anything is divided."""

FLOAT_OUTPUTS = {"LayerNormalization": (1, 2)}
"""Outputs of the type in which the op accumulates: stash_type, float32 by default."""

MASK_INPUTS = {
    ("", "Attention"): 3,
    ("com.microsoft", "Attention"): 5,
    ("com.microsoft", "GroupQueryAttention"): 10,
    ("com.microsoft", "MultiHeadAttention"): 5,
}
"""The input that is added to the scores."""

MASK_ATTRIBUTE = "mask_filter_value"  # of com.microsoft's attentions


@dataclass(frozen=True)
class Contrib:
    """What an op of com.microsoft takes: the types, and the inputs and outputs of float32."""

    types: tuple[str, ...] = ("fp16", "bf16")
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


CONTRIB = {
    "Attention": Contrib(),
    "BiasAdd": Contrib(("fp16",)),
    "BiasGelu": Contrib(),
    "BiasSoftmax": Contrib(("fp16",)),
    "DecoderMaskedMultiHeadAttention": Contrib(("fp16",)),
    "EmbedLayerNormalization": Contrib(("fp16",)),
    "FastGelu": Contrib(),
    "FusedMatMul": Contrib(),
    "Gelu": Contrib(),
    "GemmFastGelu": Contrib(),
    "GroupQueryAttention": Contrib(inputs=(12, 13)),
    "MatMulNBits": Contrib(),
    "MultiHeadAttention": Contrib(),
    "QuickGelu": Contrib(),
    "RotaryEmbedding": Contrib(),
    "SkipLayerNormalization": Contrib(outputs=(1, 2)),
    "SkipSimplifiedLayerNormalization": Contrib(outputs=(1, 2)),
}
"""Ops of com.microsoft; all that are not listed stay in float32."""


@dataclass(frozen=True)
class Ports:
    """Which inputs and outputs of a node can be of the 16-bit type."""

    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]


def label(node: ir.Node) -> str:
    """The name of a node; of one without a name that of its first output."""
    return node.name or str(node.outputs[0].name)


def adds_mask(node: ir.Node, index: int) -> bool:
    """Whether this input of a node is added to attention scores."""
    return MASK_INPUTS.get((node.domain, node.op_type)) == index


def ports(node: ir.Node, opset: int, half: str) -> Ports | str:
    """Where a node takes fp16 or bf16 in the place of float32; or why it stays in float32."""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    if any(v.type is not None and not isinstance(v.type, ir.TensorType) for v in values):
        return "it reads or makes a sequence or an optional"
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
           for a in node.attributes.values()):  # fmt: skip
        return "it has a body, whose inputs and outputs stay in float32"
    if node.domain == "com.microsoft":
        return _contrib(node, half)
    if node.domain != "":
        return f"nothing is known of {node.domain}"
    if node.op_type in KEEP:
        return KEEP[node.op_type]
    if node.op_type == "SimplifiedLayerNormalization":  # ONNX Runtime's own, in this domain
        return Ports(_floats(node.inputs), tuple(i == 0 for i in range(len(node.outputs))))
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return f"opset {opset} has no such op"
    name = "tensor(float16)" if half == "fp16" else "tensor(bfloat16)"
    takes = {c.type_param_str for c in schema.type_constraints if name in c.allowed_type_strs}
    fixed = FLOAT_OUTPUTS.get(node.op_type, ())
    inputs = tuple(
        floats and _formal(schema.inputs, i) in takes
        for i, floats in enumerate(_floats(node.inputs))
    )
    outputs = tuple(
        floats and i not in fixed and _formal(schema.outputs, i) in takes
        for i, floats in enumerate(_floats(node.outputs))
    )
    if not any((*inputs, *outputs)):
        return f"opset {opset} has it in no {half}"
    return Ports(inputs, outputs)


def _contrib(node: ir.Node, half: str) -> Ports | str:
    rule = CONTRIB.get(node.op_type)
    if rule is None:
        return "nothing is known of its types"
    if half not in rule.types:
        return f"ONNX Runtime has it in no {half}"
    inputs = (f and i not in rule.inputs for i, f in enumerate(_floats(node.inputs)))
    outputs = (f and i not in rule.outputs for i, f in enumerate(_floats(node.outputs)))
    return Ports(tuple(inputs), tuple(outputs))


def _floats(values: object) -> tuple[bool, ...]:
    return tuple(v is not None and v.dtype == FLOAT for v in values)  # type: ignore[attr-defined]


def _formal(formals: object, index: int) -> str:
    """The type parameter of an input or output; the last one may stand for many."""
    many = list(formals)  # type: ignore[call-overload]
    return str(many[min(index, len(many) - 1)].type_str) if many else ""
