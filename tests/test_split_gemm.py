"""Gemm as MatMul and Add: the same numbers, and a layer that int8 finds."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxpress.optimizers.precision.layers import layers
from onnxpress.optimizers.precision.split_gemm import SplitGemm


def made(*, trans_b=1, bias=(48,), given=True, **attributes):
    rng = np.random.default_rng(0)
    x, w, b = (ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT)) for n in "xwb")
    x.shape = ir.Shape(["n", 32])
    for value, shape in ((w, (48, 32) if trans_b else (32, 48)), (b, bias)):
        array = rng.standard_normal(shape).astype(np.float32)
        value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(shape)
    inputs = [x, w, b] if given else [x, w]
    node = ir.node("Gemm", inputs, attributes={"transB": trans_b, **attributes}, name="linear")
    (y,) = node.outputs
    y.name, y.type, y.shape = "y", x.type, ir.Shape(["n", 48])
    graph = ir.Graph(
        [x], [y], nodes=[node], initializers=inputs[1:], opset_imports={"": 23}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def run(model):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("given", [True, False])
def test_it_computes_the_same_and_is_a_layer(trans_b, given):
    model = made(trans_b=trans_b, given=given)
    want = run(model)
    assert not layers(model)[0]
    assert SplitGemm()(model).modified
    assert not SplitGemm()(model).modified
    assert [n.op_type for n in model.graph] == ["MatMul", "Add"][: 1 + given]
    assert [v.name for v in model.graph.outputs] == ["y"]
    np.testing.assert_allclose(run(model), want, rtol=1e-5, atol=1e-5)
    (layer,) = layers(model)[0]
    assert (layer.bias is not None) == given


@pytest.mark.parametrize("changed", [{"alpha": 0.5}, {"beta": 2.0}, {"bias": (1, 48)}])
def test_what_is_more_than_a_layer_stays(changed):
    model = made(**changed)
    assert not SplitGemm()(model).modified
