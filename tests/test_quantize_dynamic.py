"""Integer products with ranges of run time: the graph, its numbers, and what stays in float."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.lower.fuse_dynamic_matmul import FuseDynamicMatmul
from onnxpress.optimizers.precision.quantize_dynamic import LONGEST, QuantizeDynamic
from onnxpress.optimizers.precision.quantized import already_quantized

HEAD = '<ir_version: 10, opset_import: ["" : 23]>\n'
RNG = np.random.default_rng(0)
W = {
    "layer.q.weight": RNG.standard_normal((48, 32)).astype(np.float32),
    "layer.k.weight": RNG.standard_normal((48, 40)).astype(np.float32) * np.float32(0.01),
    "layer.q.bias": RNG.standard_normal(32).astype(np.float32),
}
W["layer.q.weight"][:, 3] = 0
TEXT = """g (float[b,s,48] x) => (float[b,s,32] y, float[b,s,40] z) {
    p = MatMul(x, "layer.q.weight")
    y = Add(p, "layer.q.bias")
    z = MatMul(x, "layer.k.weight")
}"""
X = RNG.standard_normal((2, 5, 48)).astype(np.float32)


def model_of(text: str = TEXT, weights: dict[str, np.ndarray] = W) -> ir.Model:
    for name in weights:
        text = text.replace(f'"{name}"', name.replace(".", "__"))
    model = ir.from_onnx_text(HEAD + text)
    for name, array in weights.items():
        short = name.replace(".", "__")
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == short)
        value.name, value.const_value = name, ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        model.graph.register_initializer(value)
    InferShapes()(model)
    return model


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def signature(model: ir.Model) -> list[tuple]:
    return [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


def test_layers_become_integer_products_that_share_their_input():
    model = model_of()
    before, want = signature(model), run(model, x=X)
    outcome = QuantizeDynamic()(model)
    assert outcome.modified
    assert (outcome.hits, outcome.notes) == (2, ())
    product = ["MatMulInteger", "Cast", "Mul", "Mul"]
    assert ops(model) == ["DynamicQuantizeLinear", *product, "Add", *product]
    assert {k: v.dtype.name for k, v in model.graph.initializers.items()} == {
        "layer.q.bias": "FLOAT",
        "layer.q.weight_int8": "INT8",
        "layer.q.weight_scales": "FLOAT",
        "layer.k.weight_int8": "INT8",
        "layer.k.weight_scales": "FLOAT",
    }
    assert signature(model) == before
    common.CheckerPass(full_check=True)(model)
    got = run(model, x=X)
    for a, b in zip(got, want, strict=True):
        assert 0 < np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)
    np.testing.assert_array_equal(got[0][..., 3], want[0][..., 3])  # a column of zeros is exact
    again = QuantizeDynamic()(model)
    assert (again.hits, again.modified) == (0, False)
    assert "already: DynamicQuantizeLinear" in again.notes[0]


def test_numbers_are_those_of_the_definition():
    model = model_of()
    QuantizeDynamic()(model)
    scale = np.float32((X.max() - X.min()) / 255)
    zero = np.clip(np.rint(-X.min() / scale), 0, 255)
    x = (np.clip(np.rint(X / scale) + zero, 0, 255) - zero) * scale
    columns = np.abs(W["layer.k.weight"]).max(0) / 127
    w = np.rint(W["layer.k.weight"] / columns) * columns
    np.testing.assert_allclose(run(model, x=X)[1], x @ w, rtol=1e-4, atol=1e-5)


def test_the_lowered_form_computes_the_same():
    model = model_of()
    QuantizeDynamic()(model)
    InferShapes()(model)
    want = run(model, x=X)
    assert FuseDynamicMatmul()(model).hits == 2
    assert ops(model) == ["DynamicQuantizeLinear", *["MatMulIntegerToFloat"] * 2]
    for a, b in zip(run(model, x=X), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_user_may_skip_layers():
    model = model_of()
    assert QuantizeDynamic(skip=["layer.q"])(model).hits == 1
    assert ops(model).count("MatMul") == 1
    assert "layer.q.weight" in model.graph.initializers


def test_a_weight_of_two_layers_is_quantized_once():
    text = """g (float[b,s,48] x, float[b,s,48] u) => (float[b,s,32] y, float[b,s,32] z) {
        y = MatMul(x, "layer.q.weight")
        z = MatMul(u, "layer.q.weight") }"""
    model = model_of(text, {"layer.q.weight": W["layer.q.weight"]})
    assert QuantizeDynamic()(model).hits == 2
    assert ops(model).count("DynamicQuantizeLinear") == 2
    assert set(model.graph.initializers) == {"layer.q.weight_int8", "layer.q.weight_scales"}


def test_a_weight_that_others_read_stays_beside_its_integers():
    text = """g (float[b,s,48] x) => (float[b,s,32] y, float[32,48] z) {
        y = MatMul(x, "layer.q.weight")
        z = Transpose("layer.q.weight") }"""
    model = model_of(text, {"layer.q.weight": W["layer.q.weight"]})
    outcome = QuantizeDynamic()(model)
    assert outcome.hits == 1
    assert "others read it" in outcome.notes[0]
    assert "layer.q.weight" in model.graph.initializers
    run(model, x=X)


BAD = W["layer.q.weight"].copy()
BAD[0, 0] = np.nan
ONE = 'g (float[b,s,48] x) => (float[b,s,32] y) { y = MatMul(x, "layer.q.weight") }'
REFUSED = {
    "no numbers": (ONE, BAD, "NaN or infinity"),
    "sums beyond 32 bits": (
        ONE.replace("48", str(LONGEST + 1)).replace("32", "1"),
        np.ones((LONGEST + 1, 1), np.float32),
        "too large for 32 bits",
    ),
    "a row of rank 1": (
        'g (float[48] x) => (float[32] y) { y = MatMul(x, "layer.q.weight") }',
        W["layer.q.weight"],
        "rank of its input is 1",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_layers_that_stay_in_float(why):
    text, weight, said = REFUSED[why]
    model = model_of(text, {"layer.q.weight": weight})
    before = ir.to_onnx_text(model, exclude_initializers=True)
    outcome = QuantizeDynamic()(model)
    assert (outcome.hits, outcome.modified) == (0, False)
    assert said in outcome.notes[0]
    assert ir.to_onnx_text(model, exclude_initializers=True) == before


def test_sums_of_the_longest_rows_fit():
    assert LONGEST * 255 * 127 < 2**31 <= (LONGEST + 1) * 255 * 127


def test_a_model_without_layers():
    model = ir.from_onnx_text(HEAD + "g (float[b] x) => (float[b] y) { y = Neg(x) }")
    outcome = QuantizeDynamic()(model)
    assert (outcome.hits, outcome.modified) == (0, False)


@pytest.mark.parametrize(
    ("op", "body"),
    [
        ("QuantizeLinear", "y = QuantizeLinear(x, s, z)"),
        ("DequantizeLinear", "y = DequantizeLinear(x, s, z)"),
        ("MatMulNBits", "y = com.microsoft.MatMulNBits<K=4, N=4, block_size=16>(x, s, z)"),
        ("QLinearAdd", "y = com.microsoft.QLinearAdd(x, s, z, x, s, z, s, z)"),
        (
            "MatMulInteger",
            "y = If(c) <then_branch = t () => (a) { a = MatMulInteger(x, z) }, "
            "else_branch = e () => (b) { b = Identity(x) }>",
        ),
    ],
)
def test_a_quantized_model_is_known_by_its_first_such_node(op, body):
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'
        f"g (x, s, z, c) => (y) {{ i = Identity(x)  {body} }}"
    )
    found = already_quantized(model)
    assert found is not None
    assert found.startswith(op)
    assert QuantizeDynamic()(model).notes[0].endswith(found)
    assert already_quantized(model_of()) is None
