"""Graphs that others exported: any opset, any shape of file, and what is no model at all.

The ONNX project's backend tests are sampled here, one case for each op of a list;
benchmarks/backend_tests.py runs them all.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxpress
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnxpress.errors import SourceError
from onnxpress.exporter import resolve
from onnxpress.optimizers import TARGETS, count_ops, optimize
from onnxpress.optimizers.clean.convert_opset import ConvertOpset
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.clean.simplify_with_onnxsim import SimplifyWithOnnxsim
from onnxpress.runtime import Session

from . import onnx_models

BENCHMARKS = Path(onnxpress.__file__).parent / "benchmarks"


def model(text: str, *, opset: int = 17, imports: str = "", ir_version: int = 8) -> ir.Model:
    head = f'<ir_version: {ir_version}, opset_import: ["" : {opset}{imports}]>'
    return ir.from_onnx_text(f"{head} {text}")


def run(graph: ir.Model, *arrays: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(graph).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return session.run(None, dict(zip(names, arrays, strict=True)))


# The ONNX project's own tests ------------------------------------------------------------------

MODULES = """
abs acos add affinegrid argmax batch_normalization bitwiseand ceil center_crop_pad clip col2im
concat conv convinteger convtranspose cumsum det div dropout dynamicquantizelinear elu equal erf
exp expand eyelike gather gatherelements gathernd gemm globalaveragepool greater_or_equal
gridsample gru hardmax hardsigmoid hardswish if_ instance_normalization isinf layernormalization
leakyrelu logsoftmax loop lrn lstm matmul matmulinteger max maxunpool meanvariancenormalization
melweightmatrix mish nonmaxsuppression pow prelu qlinearconv qlinearmatmul reducel1 reducemax
reducemean reducesum reducesumsquare resize rnn scan scatterelements scatternd sequenceinsert
slice softmax tfidfvectorizer tile trilu upsample where
"""


@functools.cache
def backend():
    """benchmarks/backend_tests.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("backend_tests")


def cases_of(module: str) -> list:
    """The cases that one module of onnx's makes; its loader takes 8 s to make them all."""
    package = "onnx.backend.test.case.node"
    importlib.import_module(f"{package}.{module}")
    op = module.replace("_", "")
    found = []
    for case in importlib.import_module(package)._NodeTestCases:
        opset = next((i.version for i in case.model.opset_import if not i.domain), 0)
        ops = {node.op_type.lower() for node in case.model.graph.node}
        if op in ops and 9 <= opset <= 22:
            found.append(
                backend().Case(case.name, case.model, case.data_sets, case.rtol, case.atol)
            )
    return found


def converted(proto: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.from_proto(proto)
    assert not ConvertOpset()(graph).notes
    assert graph.opset_imports[""] == 23
    optimize(graph, TARGETS["cpu"])
    return ir.to_proto(graph)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", MODULES.split())
def test_a_backend_case_of(module):
    for case in cases_of(module):
        verdict, why = backend().check(case, converted)
        if verdict != "not run":
            assert verdict == "right", f"{case.name}: {why}"
            return
    pytest.fail("ONNX Runtime runs none of them: take it off the list")


# Opsets ----------------------------------------------------------------------------------------


def test_conversion_keeps_names_metadata_and_weights():
    graph = model(
        "g (float[2,3] x) => (float[2,1] y) { a = Add(x, w) y = ReduceMean<axes=[1]>(a) }"
    )
    w = ir.Value(name="w", const_value=ir.tensor(np.ones((2, 3), np.float32), name="w"))
    graph.graph[0].replace_input_with(1, w)
    graph.graph.register_initializer(w)
    graph.graph[1].name, graph.graph[1].metadata_props["from"] = "mean", "encoder.norm"
    weight = w.const_value
    ConvertOpset()(graph)
    assert graph.graph.initializers["w"].const_value is weight
    constant, mean = graph.graph[1], graph.graph[2]
    assert (mean.name, mean.op_type, mean.metadata_props["from"]) == (
        "mean", "ReduceMean", "encoder.norm",
    )  # fmt: skip
    assert constant.metadata_props["from"] == "encoder.norm"
    assert graph.ir_version == 11


def test_functions_are_converted_from_their_own_opset():
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    g (float[batch,3] x) => (float[batch,1] y) { y = my.total(x) }
    <domain: "my", opset_import: ["" : 11]> total (x) => (y) { y = ReduceSum<axes=[1]>(x) }"""
    graph = ir.from_onnx_text(text)
    assert ConvertOpset()(graph).hits == 1
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(run(graph, x)[0], x.sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("why", "graph"),
    [
        ("imports opsets [11, 17] of ai.onnx", model(
            "g (float[2] x) => (float[2] y) { y = Relu(x) }", imports=', "ai.onnx" : 11')),
        ("its channels are", model(
            "g (float[b,c,4] x, float[1] s, float[1] t) => (float[b,c,4] y)"
            " { y = GroupNormalization<num_groups=1>(x, s, t) }", opset=18)),
        ("ai.onnx has no such op", model("g (float[2] x) => (float[2] y) { y = ATen(x) }")),
        ("an attribute is an argument of the function", ir.from_onnx_text(
            """<ir_version: 8, opset_import: ["" : 12, "my" : 1]>
            g (float[2,3] x) => (float[2,3] y) { y = my.soft<axis=1>(x) }
            <domain: "my", opset_import: ["" : 12]>
            soft <axis> (x) => (y) { y = Softmax<axis: int = @axis>(x) }""")),
        ("scales and sizes", model(
            "g (float[1,1,2,2] x, float[4] s, int64[4] z) => (float[1,1,4,4] y)"
            " { y = Resize(x, , s, z) }", opset=11)),
    ],
    ids=lambda v: v[:30] if isinstance(v, str) else "",
)  # fmt: skip
def test_what_cannot_be_said_in_opset_23_stays_as_it_is(why, graph):
    before = ir.to_onnx_text(graph)
    outcome = ConvertOpset()(graph)
    assert why in " ".join(outcome.notes)
    assert not outcome.hits
    assert ir.to_onnx_text(graph) == before


@pytest.mark.parametrize("opset", [13, 23, 25])
def test_the_domain_of_onnx_gets_its_short_name(opset):
    graph = model("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=opset)
    graph.opset_imports["ai.onnx"] = graph.opset_imports.pop("")
    ConvertOpset()(graph)
    assert graph.opset_imports == {"": max(opset, 23)}
    assert not ConvertOpset()(graph).modified


def test_an_op_of_the_runtime_in_the_domain_of_onnx_does_not_stop_conversion():
    text = """g (float[2,8] x, float[8] w) => (float[2,8] y) {
        n = SimplifiedLayerNormalization<axis=-1, epsilon=0.00001>(x, w) y = Softmax<axis=1>(n) }"""
    graph = model(text, opset=12)
    x, w = np.random.default_rng(0).standard_normal((2, 8)).astype("f"), np.ones(8, np.float32)
    want = run(graph, x, w)
    assert ConvertOpset()(graph).modified
    assert graph.opset_imports[""] == 23
    np.testing.assert_allclose(run(graph, x, w)[0], want[0], rtol=1e-6)


# onnxsim ---------------------------------------------------------------------------------------

SHAPES = """g (float[2,8] x) => (float[2,8] y) {
    n = Shape(x) zeros = ConstantOfShape(n) a = Add(x, zeros) b = Relu(a) y = MatMul(b, w) }"""


def shapes() -> ir.Model:
    graph = model(SHAPES)
    w = ir.Value(name="w", const_value=ir.tensor(weights(), name="w"))
    graph.graph[-1].replace_input_with(1, w)
    graph.graph.register_initializer(w)
    return graph


def weights() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)


def test_onnxsim_simplifies_without_seeing_the_weights(monkeypatch):
    pytest.importorskip("onnxsim")
    monkeypatch.setattr("onnxpress.optimizers.clean.simplify_with_onnxsim.STAYS", 100)
    graph = shapes()
    weight = graph.graph.initializers["w"].const_value
    x = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    want = run(graph, x)
    outcome = SimplifyWithOnnxsim()(graph)
    assert outcome.hits == 1, outcome.notes
    assert "ConstantOfShape" not in count_ops(graph)
    assert graph.graph.initializers["w"].const_value is weight
    assert [v.name for v in graph.graph.inputs] == ["x"]
    np.testing.assert_allclose(run(graph, x)[0], want[0], rtol=1e-6)


FAKES = {
    "ended by signal": "import os; os.abort()",
    "took longer": "import time; time.sleep(60)",
    "MemoryError": "bytearray(64 << 30)",
    "it failed: ValueError: no": "raise ValueError('no')",
    "cannot be read": "sys = __import__('sys'); open(sys.argv[2], 'wb').write(b'x' * 9); "
    "__import__('os')._exit(0)",
    "has 6 nodes, ours 5": "m.graph.node.append(onnx.NodeProto(op_type='Neg', input=['x'], "
    "output=['more']))",
    "changed the signature": "m.graph.output[0].name = m.graph.node[-1].output[0] = 'z'",
    "Unrecognized attribute: wrong": "n = onnx.NodeProto(op_type='Relu', input=['x'], "
    "output=['more']); n.attribute.add(name='wrong', i=1, type=2); m.graph.node.insert(0, n)",
}


@pytest.mark.parametrize("said", FAKES)
def test_onnxsim_is_left_out_when(said, monkeypatch, tmp_path):
    body = "import onnx\ndef simplify(path, **_):\n m = onnx.load(path)\n"
    (tmp_path / "onnxsim.py").write_text(f"{body} {FAKES[said]}\n return m, True\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    graph = shapes()
    before = ir.to_onnx_text(graph)
    timeout = 0.5 if said == "took longer" else 60
    outcome = SimplifyWithOnnxsim(timeout_s=timeout, memory_bytes=4 << 30)(graph)
    assert said in outcome.notes[0]
    assert not outcome.modified
    assert ir.to_onnx_text(graph) == before


def test_onnxsim_is_left_out_when_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install onnxsim" in SimplifyWithOnnxsim()(shapes()).notes[0]


# Files -----------------------------------------------------------------------------------------


def quantized(onnx_type: str, dtype: type) -> onnx.ModelProto:
    text = f"""g (float[batch,4] x, {onnx_type}[4,3] w, float scale) => (float[batch,3] y) {{
        d = DequantizeLinear(w, scale) y = MatMul(x, d) }}"""
    w = np.arange(-4, 8).reshape(4, 3).astype(dtype)
    return ir.to_proto(onnx_models.graph(text, {"w": w, "scale": np.float32([0.1])[0]}, opset=21))


BRANCHES = """g (float[batch,3] x) => (float[batch,3] y) {
    s = ReduceSum<keepdims=0>(x) zero = Constant<value = float {0.0}>() c = Greater(s, zero)
    y = If(c) <then_branch = a () => (float[batch,3] p) { p = Relu(x) },
               else_branch = b () => (float[batch,3] q) { q = Neg(x) }> }"""
LOOP = """g (float[2,3] x) => (float[2,3] y) {
    n = Constant<value = int64 {3}>() t = Constant<value = bool {1}>()
    y = Loop(n, t, x) <body = b (int64 i, bool c, float[2,3] v) => (bool d, float[2,3] w) {
        d = Identity(c) one = Constant<value = float {1.0}>() w = Add(v, one) }> }"""
LOCAL = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    g (float[batch,3] x) => (float[batch,3] y) { y = my.twice(x) }
    <domain: "my", opset_import: ["" : 17]> twice (x) => (y) { y = Add(x, x) }"""


def without_shapes() -> onnx.ModelProto:
    proto = ir.to_proto(model("g (float[2,3] x) => (float[2,3] y) { a = Relu(x) y = Neg(a) }"))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.ClearField("shape")
    return proto


def overridable() -> onnx.ModelProto:
    text = "g (float[2,3] x, float[3] w) => (float[2,3] y) { y = Add(x, w) }"
    proto = ir.to_proto(model(text, opset=8, ir_version=3))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "w"))
    return proto


GOOD = {
    "if": ir.to_proto(model(BRANCHES)),
    "loop": ir.to_proto(model(LOOP)),
    "function": ir.to_proto(ir.from_onnx_text(LOCAL)),
    "int4": quantized("int4", ml_dtypes.int4),
    "float8": quantized("float8e4m3fn", ml_dtypes.float8_e4m3fn),
    "no shapes": without_shapes(),
    "initializer that is an input": overridable(),
    "contrib": ir.to_proto(model(
        "g (float[2,3] x, float[3] b) => (float[2,3] y) { y = com.microsoft.BiasGelu(x, b) }",
        imports=', "com.microsoft" : 1')),
    "opset 26": ir.to_proto(model("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=26)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_is_unusual_is_right_after_conversion_and_the_pipeline(name):
    before = ir.from_proto(GOOD[name])
    rng = np.random.default_rng(0)
    weights = before.graph.initializers
    feeds = [
        rng.standard_normal((2, 3) if d is None else [n if isinstance(n, int) else 2 for n in d])
        .astype(np.float32)
        for d in (v.shape for v in before.graph.inputs if v.name not in weights)
    ]  # fmt: skip
    want = run(before, *feeds)
    after = ir.from_proto(GOOD[name])
    ConvertOpset()(after)
    optimize(after, TARGETS["cpu"])
    for have, expected in zip(run(after, *feeds), want, strict=True):
        np.testing.assert_allclose(have, expected, rtol=1e-5, atol=1e-6)


def test_an_op_of_an_unknown_domain_stays_and_is_reported():
    graph = model(
        "g (float[2,3] x) => (float[2,1] y) { a = acme.Spin(x) y = ReduceMean<axes=[1]>(a) }",
        imports=', "acme" : 1',
    )
    notes = ConvertOpset()(graph).notes
    steps = optimize(graph, TARGETS["cpu"])
    assert not notes
    assert count_ops(graph) == {"ReduceMean": 1, "acme::Spin": 1}
    assert any("Spin" in note and "no type" in note for step in steps for note in step.notes)


RELU = "g (float[2,3] x) => (float[2,3] y) { a = Relu(x) y = Neg(a) }"


def bytes_of(text: str, **options) -> bytes:
    return ir.to_proto(model(text, **options)).SerializeToString()


def changed(text: str, change: Callable[[onnx.ModelProto], Any], opset: int = 17) -> bytes:
    proto = ir.to_proto(model(text, opset=opset))
    change(proto)
    return proto.SerializeToString()


def tensor(*shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ones(shape, np.float32), "w")


ADD = "g (float[2,3] x) => (float[2,3] y) { y = Add(x, w) }"
SPARSE = onnx.SparseTensorProto(
    values=tensor(2), indices=numpy_helper.from_array(np.array([0, 4])), dims=[2, 3]
)
BAD = {
    "Required attribute 'axis' is missing": bytes_of(
        "g (float[2,3] x) => (float[4,3] y) { y = Concat(x, x) }"
    ),
    "No Op registered for Frobnicate": bytes_of(
        "g (float[2,3] x) => (float[2,3] y) { y = Frobnicate(x) }"
    ),
    "'b'": bytes_of(RELU).replace(b"\x0a\x01a\x12", b"\x0a\x01b\x12"),
    "bound to different types": bytes_of(
        "g (float[2,3] x, int64[2,3] z) => (float[2,3] y) { y = Add(x, z) }"
    ),
    "acme:Spin": bytes_of(
        "g (float[2,3] x) => (float[2,3] y) { y = acme.Spin(x) }", imports=', "acme" : 1'
    ),
    "'y' is given twice": changed(RELU, lambda p: p.graph.output.append(p.graph.output[0])),
    "two opsets of ai.onnx: 17 and 11": bytes_of(RELU, imports=', "ai.onnx" : 11'),
    "is of opset 28": changed(RELU, lambda p: setattr(p.opset_import[0], "domain", "ai.onnx"), 28),
    "FLOAT[2,3], and its tensor is FLOAT[2]": changed(
        ADD, lambda p: p.graph.initializer.extend([tensor(2, 3), tensor(2)])
    ),
    "'w', which nothing gives": changed(ADD, lambda p: p.graph.sparse_initializer.append(SPARSE)),
    "my::f imports opset 16 of ai.onnx": ir.to_proto(ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[2,3] x) => (float[2,3] y) { y = my.f(x) }
        <domain: "my", opset_import: ["" : 16]> f (x) => (y) { y = Relu(x) }"""
    )).SerializeToString(),
    "no kernel for a node": bytes_of("g (float[2] x) => (float[2] y) { y = Add(x, x) }", opset=6),
    "is of opset 29": bytes_of(RELU, opset=29),
    "IR version 14": bytes_of(RELU, ir_version=14),
    "of type STRING": bytes_of("g (string[2] x) => (string[2] y) { y = Identity(x) }"),
    "the file holds no graph": b"",
    "cannot be read": bytes_of(RELU)[:-3],
    "cannot be read ": b"hello world, not a model\n" * 20,
}  # fmt: skip


def refused(path: Path, said: str) -> None:
    """`press` says it in words of ours, names the file, and leaves nothing behind."""
    out = path.parent / "outputs" / "out"
    with pytest.raises(SourceError) as caught:
        onnxpress.press(str(path), out, measure=False)
    assert said.strip() in caught.value.what
    assert path.parent.as_posix() in caught.value.where
    assert caught.value.hint
    assert not out.parent.exists() or not list(out.parent.iterdir())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("said", BAD)
def test_what_is_no_model_is_refused(said, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(BAD[said])
    refused(path, said)


def test_names_that_repeat_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    proto = ir.to_proto(model(RELU))
    proto.graph.node[1].output[0] = proto.graph.output[0].name = "a"
    path.write_bytes(proto.SerializeToString())
    refused(path, "cannot be read: Output 'a' is redeclared")
    for node in (proto := ir.to_proto(model(RELU))).graph.node:
        node.name = "same"
    path.write_bytes(proto.SerializeToString())
    refused(path, "two nodes with same node name (same)")


def test_of_two_initializers_of_one_name_the_later_counts_as_in_onnxruntime(tmp_path):
    later = numpy_helper.from_array(np.full((2, 3), 7, np.float32), "w")
    (tmp_path / "model.onnx").write_bytes(
        changed(ADD, lambda p: p.graph.initializer.extend([tensor(2, 3), later]))
    )
    onnxpress.press(str(tmp_path / "model.onnx"), tmp_path / "out", measure=False)
    have = onnxpress.load(tmp_path / "out").run({"x": np.zeros((2, 3), np.float32)})["y"]
    np.testing.assert_array_equal(have, np.full((2, 3), 7))


def with_weights_beside(path: Path) -> onnx.ModelProto:
    text = "g (float[batch,64] x, float[64,3] w) => (float[batch,3] y) { y = MatMul(x, w) }"
    graph = onnx_models.graph(text, {"w": np.ones((64, 3), np.float32)})
    ir.save(graph, path, external_data="model.data", size_threshold_bytes=0)
    return onnx.load(path, load_external_data=False)


@pytest.mark.parametrize("size", [None, 0, 100, 767, 768])
@pytest.mark.parametrize("place", ["graph", "branch", "attribute"])
def test_weights_that_are_missing_or_cut_are_refused(place, size, tmp_path):
    path, data = tmp_path / "model.onnx", tmp_path / "model.data"
    proto = with_weights_beside(path)
    weight = proto.graph.initializer.pop()
    match place:
        case "graph":
            proto.graph.initializer.append(weight)
        case "attribute":
            node = onnx.NodeProto(op_type="Constant", output=["w"])
            node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=weight)
            proto.graph.node.insert(0, node)
        case "branch":
            branch = onnx.GraphProto(name="b", node=proto.graph.node, initializer=[weight])
            branch.output.append(proto.graph.output[0])
            branch.node[0].output[0] = branch.output[0].name = "z"
            test = onnx.NodeProto(op_type="Constant", output=["c"])
            yes = numpy_helper.from_array(np.array(True))
            test.attribute.add(name="value", type=onnx.AttributeProto.TENSOR, t=yes)
            either = onnx.NodeProto(op_type="If", input=["c"], output=["y"])
            for name in ("then_branch", "else_branch"):
                either.attribute.add(name=name, type=onnx.AttributeProto.GRAPH, g=branch)
            del proto.graph.node[:]
            proto.graph.node.extend([test, either])
    path.write_bytes(proto.SerializeToString())
    data.write_bytes(data.read_bytes()[: size or 0])
    if size == 768:
        assert resolve(str(path)).graph
        return
    if size is None:
        data.unlink()
    with pytest.raises(SourceError) as caught:
        resolve(str(path))
    assert ("missing" if size is None else f"cut short: {size} bytes, tensor") in caught.value.what
    assert caught.value.where == str(data)
    refused(path, caught.value.what)


@pytest.mark.parametrize("location", ["../model.data", "sub/../../model.data", "/etc/passwd"])
def test_weights_outside_of_the_folder_are_refused(location, tmp_path):
    path = tmp_path / "sub" / "model.onnx"
    path.parent.mkdir()
    proto = with_weights_beside(path)
    (path.parent / "model.data").rename(tmp_path / "model.data")
    entries = proto.graph.initializer[0].external_data
    next(e for e in entries if e.key == "location").value = location
    path.write_bytes(proto.SerializeToString())
    refused(path, f"outside of its folder, in {location}")


def test_weights_that_are_a_link_to_another_folder_are_taken(tmp_path):
    path = tmp_path / "model.onnx"
    with_weights_beside(path)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model.data").rename(tmp_path / "blobs" / "data")
    (tmp_path / "model.data").symlink_to("blobs/data")
    assert resolve(str(path)).weights_sha256


# What was found in the field -------------------------------------------------------------------


def test_an_initializer_that_is_an_input_is_a_weight(tmp_path):
    path, out = tmp_path / "model.onnx", tmp_path / "out"
    path.write_bytes(overridable().SerializeToString())
    assert [i.name for i in onnxpress.press(str(path), out, measure=False).inputs] == ["x"]
    assert [v.name for v in ir.load(out / "model.onnx").graph.inputs] == ["x"]
    manifest = onnxpress.optimize(path, tmp_path / "again")
    assert [i.name for i in manifest.inputs] == ["x"]


def test_weights_of_four_bits_are_multiplied_exactly(tmp_path):
    text = """g (float[batch,64] x, int4[64,32] w, float[2,32] s) => (float[batch,32] y) {
        d = DequantizeLinear<axis=0, block_size=32>(w, s) y = MatMul(x, d) }"""
    rng = np.random.default_rng(0)
    w = rng.integers(-8, 8, (64, 32)).astype(ml_dtypes.int4)
    s = rng.uniform(0.01, 0.1, (2, 32)).astype(np.float32)
    ir.save(onnx_models.graph(text, {"w": w, "s": s}, opset=21), tmp_path / "model.onnx")
    x = rng.standard_normal((3, 64)).astype(np.float32)
    want = x @ (w.astype(np.float32) * s.repeat(32, axis=0))
    level = {"session.qdq_matmulnbits_accuracy_level": "4"}  # ONNX Runtime's default
    exact, rounded = (Session(tmp_path / "model.onnx", config=c) for c in (None, level))
    np.testing.assert_allclose(exact.run({"x": x})["y"], want, rtol=1e-5, atol=1e-5)
    assert np.abs(rounded.run({"x": x})["y"] - want).max() > 1e-3


SEQUENCES = """g (float[2] x, float[3] z, bool c) => (float[n] y) {
    s = If(c) <then_branch = a () => (seq(float[n]) p) { p = SequenceConstruct(x, z) },
               else_branch = b () => (seq(float[n]) q) { q = SequenceConstruct(z) }>
    t = Identity(s) u = SequenceInsert(t, x) y = ConcatFromSequence<axis=0>(u) }"""


@pytest.mark.parametrize("flag", [True, False])
def test_a_sequence_does_not_become_a_tensor(flag):
    arrays = np.ones(2, np.float32), np.zeros(3, np.float32), np.array(flag)
    graph = model(SEQUENCES)
    want = run(graph, *arrays)
    assert InferShapes()(graph).modified
    assert not InferShapes()(graph).modified
    np.testing.assert_array_equal(run(graph, *arrays)[0], want[0])
    optimize(graph, TARGETS["cpu"])
    np.testing.assert_array_equal(run(graph, *arrays)[0], want[0])
