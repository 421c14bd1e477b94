"""fp16 and bf16: where Casts stand, what stays in float32, and what the probe finds.

Numbers are checked in ONNX Runtime on the CPU, without its optimizers, against the graph in
float32. It has few kernels for fp16 and next to none for bf16; between two nodes without one it
leaves fp16 in float32, so that nothing overflows there. So a converted graph is run in float32
with each result rounded to its type, which is what it means; and as it is, where kernels exist.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxpress
import onnxruntime as ort
import pytest
from onnxpress.errors import InputError, UsageError
from onnxpress.optimizers import TARGETS, optimize
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.outcome import SCOPE
from onnxpress.optimizers.precision.convert_floats import ConvertFloats
from onnxpress.optimizers.precision.float_ranges import HALVES
from onnxpress.optimizers.precision.overflow import float_values, observe_peaks, overflows

from .onnx_models import graph, normal

DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
BOTH = pytest.mark.parametrize("precision", ["fp16", "bf16"])
TOLERANCE = {"fp16": 5e-3, "bf16": 4e-2}
LOWEST = float(np.finfo(np.float32).min)


# How graphs are run, and compared ------------------------------------------------------------


def session_run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def rounded(model: ir.Model) -> ir.Model:
    """A graph of 16-bit floats in float32, with what each node gives rounded to its type."""
    model, halves, full = model.clone(), set(DTYPES.values()), ir.TensorType(ir.DataType.FLOAT)
    for value in model.graph.initializers.values():
        if value.dtype in halves:
            array = value.const_value.numpy().astype(np.float32)
            value.const_value, value.type = ir.tensor(array, name=value.name), full
    for node in list(model.graph):
        for attribute in list(node.attributes.values()):
            if node.op_type == "Cast" and attribute.value in halves:
                node.attributes["to"] = ir.AttrInt64("to", 1)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in halves:
                tensor = ir.tensor(attribute.value.numpy().astype(np.float32))
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, tensor)
        for value in node.outputs:
            if value.dtype not in halves:
                continue
            down = ir.node("Cast", [value], attributes={"to": int(value.dtype)})
            up = ir.node("Cast", [down.outputs[0]], attributes={"to": 1})
            value.type = full
            value.replace_all_uses_with(up.outputs[0], replace_graph_outputs=True)
            down.replace_input_with(0, value)
            model.graph.insert_after(node, [down, up])
            down.outputs[0].name, up.outputs[0].name = f"{value.name}_down", f"{value.name}_up"
    return model


def run(model: ir.Model, feeds: dict[str, np.ndarray], *, as_it_is: bool = False):
    return list(session_run(model if as_it_is else rounded(model), feeds).values())


def run_model(model, feeds):
    return [session_run(model, given) for given in feeds]


def signature(model: ir.Model) -> list[tuple[str, object, str]]:
    return [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


def check(model: ir.Model) -> None:
    """The types of the graph, to onnx: strictly where it knows all ops."""
    proto = ir.to_proto(model)
    strict = not any(n.domain for n in model.graph.all_nodes())
    onnx.checker.check_model(proto, full_check=strict)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=strict)


def error(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    return max(
        float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-9))
        for a, b in zip(got, want, strict=True)
    )


def body(model: ir.Model) -> list[str]:
    """The nodes as text: op, inputs, outputs, and the type that a Cast gives."""
    lines = []
    for n in model.graph:
        to = f"<{ir.DataType(n.attributes['to'].value).name}>" if n.op_type == "Cast" else ""
        outs, ins = (", ".join(v.name if v else "" for v in vs) for vs in (n.outputs, n.inputs))
        lines.append(f"{outs} = {n.op_type}{to}({ins})")
    return lines


def convert(model: ir.Model, precision: str = "fp16", **options) -> tuple[str, ...]:
    """Convert, and hold the result to what every conversion owes; the notes."""
    before = signature(model)
    outcome = ConvertFloats(precision, **options)(model)
    check(model)
    if options.get("keep_io", True):
        assert signature(model) == before
    pairs = [
        n.name
        for n in model.graph
        if n.op_type == "Cast"
        and (p := n.inputs[0].producer()) is not None
        and p.op_type == "Cast"
        and {n.outputs[0].dtype, p.outputs[0].dtype} <= {ir.DataType.FLOAT, DTYPES[precision]}
    ]
    assert not pairs
    text = ir.to_onnx_text(model)
    again = ConvertFloats(precision, **options)(model)
    assert (again.hits, again.modified) == (0, False)
    assert ir.to_onnx_text(model) == text
    return outcome.notes


MLP = "g (float[batch,8] x, float[8,16] w1, float[16] b1, float[16,8] w2) => (float[batch,8] y)"
MLP += "{ m = MatMul(x, w1)  a = Add(m, b1)  h = Relu(a)  y = MatMul(h, w2) }"


def mlp(scale: float = 1.0) -> ir.Model:
    weights = {"w1": normal(1, 8, 16) * np.float32(scale), "b1": normal(2, 16)}
    model = graph(MLP, {**weights, "w2": normal(3, 16, 8) / np.float32(scale)})
    for i, node in enumerate(model.graph):
        node.name = f"n{i}_{node.op_type}"
    return model


X = {"x": normal(0, 3, 8)}


# Types follow --------------------------------------------------------------------------------


@BOTH
def test_types_follow_and_inputs_and_outputs_stay(precision):
    model = mlp()
    want, weights = run(model, X), {n: v.dtype for n, v in model.graph.initializers.items()}
    assert convert(model, precision) == ()
    assert body(model) == [
        f"x_{precision} = Cast<{DTYPES[precision].name}>(x)",
        f"m = MatMul(x_{precision}, w1)",
        "a = Add(m, b1)",
        "h = Relu(a)",
        f"y_{precision} = MatMul(h, w2)",
        f"y = Cast<FLOAT>(y_{precision})",
    ]
    assert weights.keys() == model.graph.initializers.keys()
    assert {v.dtype for v in model.graph.initializers.values()} == {DTYPES[precision]}
    assert 0 < error(run(model, X), want) < TOLERANCE[precision]


def test_inputs_and_outputs_are_converted_where_that_is_asked():
    model = mlp()
    want = run(model, X)
    convert(model, keep_io=False)
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [DTYPES["fp16"]] * 2
    assert not any(n.op_type == "Cast" for n in model.graph)
    assert error(run(model, {"x": X["x"].astype(np.float16)}, as_it_is=True), want) < 5e-3


@pytest.mark.parametrize("keep", ["n1_Add", "layer.0.bias", "layer.0"])
def test_what_is_kept_by_name_or_module_has_casts_around_it(keep):
    model = mlp()
    for node in model.graph:
        node.metadata_props[SCOPE] = "layer.1"
    model.graph[1].metadata_props[SCOPE] = "layer.0.bias"
    notes = convert(model, keep={keep, "nowhere"})
    assert body(model)[1:5] == [
        "m = MatMul(x_fp16, w1)",
        "m_fp32 = Cast<FLOAT>(m)",
        "a = Add(m_fp32, b1)",
        "a_fp16 = Cast<FLOAT16>(a)",
    ]
    assert model.graph.initializers["b1"].dtype == ir.DataType.FLOAT
    assert notes == (
        "Add 'n1_Add' stays in float32: as asked",
        "no node or module is named 'nowhere'",
    )


def test_a_cast_is_shared_by_its_readers_and_a_weight_is_there_in_both_types():
    model = graph(
        """g (float[batch,8] x, float[8,8] w) => (float[batch,8] y)
        { a = MatMul(x, w)  b = MatMul(a, w)  c = Sin(a)  d = Cos(a)
          e = Add(c, d)  f = Add(b, e)  g1 = MatMul(f, w)  y = Sinh(g1) }""",
        {"w": normal(1, 8, 8) / 3},
    )
    model.graph[6].name = "last"
    want = run(model, X)
    convert(model, keep={"last"})
    casts = Counter(line.split(" = ")[1] for line in body(model) if "Cast" in line)
    assert casts["Cast<FLOAT>(a)"] == 1  # for Sin and for Cos
    assert sorted(model.graph.initializers) == ["w", "w_fp16"]
    assert error(run(model, X), want) < 2e-2


def test_what_only_moves_numbers_between_nodes_that_stay_stays_too():
    model = graph(
        """g (float[2,8] x, float[8,8] w) => (float[8,2] y)
        { a = MatMul(x, w)  b = Relu(a)  t = Transpose<perm=[1,0]>(b)  i = Identity(t)
          c = Tanh(i)  y = Identity(c) }""",
        {"w": normal(1, 8, 8)},
    )
    model.graph[1].name, model.graph[4].name = "first", "last"
    convert(model, keep={"first", "last"})
    assert [line.split(" = ")[1] for line in body(model)] == [
        *("Cast<FLOAT16>(x)", "MatMul(x_fp16, w)", "Cast<FLOAT>(a)", "Relu(a_fp32)"),
        *("Transpose(b)", "Identity(t)", "Tanh(i)", "Identity(c)"),
    ]


def test_what_is_cast_to_float_is_cast_to_where_it_is_read():
    model = graph(
        """g (int64[batch,8] n, float[8,8] w) => (float[batch,8] y)
        { f = Cast<to=1>(n)  s = Sin(f)  m = MatMul(f, w)  y = Add(s, m) }""",
        {"w": normal(1, 8, 8)},
    )
    feeds = {"n": np.arange(16).reshape(2, 8)}
    want = run(model, feeds)
    convert(model)
    assert "f = Cast<FLOAT>(n)" in body(model)
    assert "f_fp16 = Cast<FLOAT16>(n)" in body(model)
    assert error(run(model, feeds), want) < 5e-3


# What stays in float32 -----------------------------------------------------------------------


@BOTH
def test_positions_stay_exact(precision):
    # 2049 is no fp16 and 257 no bf16: rounded, they are other buckets and other angles.
    model = graph(
        """g (int64[n] p, float[1,4] frequency, float[64,8] table, float half, float low)
        => (float[n,4] y, float[n,8] z, bool[n] far)
        { axis = Constant<value_ints=[1]>()
          f = Cast<to=1>(p)  r = Unsqueeze(f, axis)  m = Mul(r, frequency)  y = Sin(m)
          d = Div(f, half)  g1 = Log(d)  k = Cast<to=7>(g1)  z = Gather(table, k)
          far = Greater(f, low) }""",
        {
            "frequency": np.float32([[1, 0.1, 0.01, 0.001]]),
            "table": normal(1, 64, 8),
            "half": np.float32(2.0),
            "low": np.float32(4096.5),
        },
    )
    feeds = {"p": np.array([2, 257, 2049, 4097, 65537])}
    want = run(model, feeds)
    notes = convert(model, precision)
    got = run(model, feeds)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[2], want[2])
    assert error(got[1:2], want[1:2]) < TOLERANCE[precision]
    assert any("Sin" in n and "positions and angles" in n for n in notes)


@pytest.mark.parametrize(
    ("precision", "text", "reason"),
    [
        ("bf16", 'y = Einsum<equation="ij->ji">(a)', "opset 23 has it in no bf16"),
        ("fp16", 'y = Einsum<equation="ij->ji">(a)', None),
        ("fp16", "i = Constant<value_int=0>()  y = CumSum(a, i)", "running sum"),
        (
            "fp16",
            "s = Constant<value_float=0.1>()  q = QuantizeLinear(a, s)  y = DequantizeLinear(q, s)",
            "scales are halved in no quantized graph",
        ),
        ("fp16", "n = RandomNormalLike<seed=1.0>(a)  y = Add(a, n)", "another draw"),
        ("fp16", "y = com.example.Op(a)", "nothing is known of com.example"),
    ],
)
def test_an_op_without_the_type_stays_in_float32(precision, text, reason):
    ops = '"" : 23, "com.example" : 1'
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: [{ops}]>
        g (float[8,8] x) => (float[8,8] y) <float[8,8] a> {{ a = Tanh(x)  {text} }}"""
    )
    notes = convert(model, precision)
    assert any(reason in note for note in notes) if reason else notes == ()
    assert any(v.dtype == DTYPES[precision] for n in model.graph for v in n.outputs)


def test_statistics_of_a_norm_stay_in_float32():
    model = graph(
        """g (float[3,8] x, float[8] s, float[8] b) => (float[3,8] y, float[3,1] mean, float[3,1] d)
        { y, mean, d = LayerNormalization(x, s, b) }""",
        {"s": normal(1, 8), "b": normal(2, 8)},
    )
    want = run(model, X)
    convert(model)
    assert [v.dtype.name for v in model.graph[1].outputs] == ["FLOAT16", "FLOAT", "FLOAT"]
    assert error(run(model, X), want) < 5e-3


def test_what_ops_of_onnx_runtime_take_is_known():
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (float[2,3,8] x, float[8] s, float[8] b) => (float[2,3,8] y, float[2,3,8] t)
        <float[2,3,8] t> {
            y, , , t = com.microsoft.SkipLayerNormalization<epsilon=0.001>(x, x, s, b)
        }"""
    )
    feeds = {"x": normal(0, 2, 3, 8), "s": normal(1, 8), "b": normal(2, 8)}
    want = run(model, feeds)
    convert(model)
    assert error(run(model, feeds), want) < 5e-3


def test_a_constant_beyond_the_range_keeps_its_reader_and_bf16_holds_it():
    text = """g (float[3,8] x, float c) => (float[3,8] y)
    { s = Sigmoid(x)  a = Mul(s, c)  y = Div(a, c) }"""
    want = run(graph(text, {"c": np.float32(3e5)}), X)
    model = graph(text, {"c": np.float32(3e5)})
    notes = convert(model, "fp16")
    assert any("Mul" in n and "'c' holds 3e+05" in n for n in notes)
    assert error(run(model, X), want) < 5e-3
    model = graph(text, {"c": np.float32(3e5)})
    assert convert(model, "bf16") == ()


@pytest.mark.parametrize("eps", ["Add", "Clip"])
def test_an_epsilon_that_would_be_zero_keeps_the_division(eps):
    bounded = "m = Sqrt(q)  n = Clip(m, e)" if eps == "Clip" else "m = Add(q, e)  n = Sqrt(m)"
    model = graph(
        f"""g (float[3,8] x, float e, int64[1] last) => (float[3,8] y)
        {{ h = Tanh(x)  s = Mul(h, h)  q = ReduceSum(s, last)  {bounded}  y = Div(h, n) }}""",
        {"e": np.float32(1e-12), "last": np.array([-1])},
    )
    feeds = {"x": X["x"] * np.array([[1], [0], [1]], np.float32)}
    want = run(model, feeds)
    notes = convert(model)
    assert np.isfinite(run(model, feeds)[0]).all()  # a row of zeros would be 0/0
    assert error(run(model, feeds), want) < 5e-3
    assert any("Div" in n and "'e' holds 1e-12" in n for n in notes)


# Masks ---------------------------------------------------------------------------------------

ATTENTION = """g (float[2,3,8] q, bool[2,1,1,3] seen, float zero, float low) => (float[2,3,8] y)
{ shape = Constant<value_ints=[2, 1, 3, 3]>()  all = Expand(seen, shape)
  mask = Where(all, zero, low)  y = Attention<q_num_heads=2, kv_num_heads=2>(q, q, q, mask) }"""
SOFTMAX = """g (float[2,3,8] q, bool[2,1,3] seen, float one, float low) => (float[2,3,8] y)
{ t = Transpose<perm=[0,2,1]>(q)  s = MatMul(q, t)  f = Cast<to=1>(seen)  n = Sub(one, f)
  mask = Mul(n, low)  m = Add(s, mask)  p = Softmax(m)  y = MatMul(p, q) }"""
FILLED = """g (float[2,3,8] q, bool[2,1,3] seen, float low) => (float[2,3,8] y)
{ t = Transpose<perm=[0,2,1]>(q)  s = MatMul(q, t)  m = Where(seen, s, low)
  p = Softmax(m)  y = MatMul(p, q) }"""


@BOTH
@pytest.mark.parametrize("text", [ATTENTION, SOFTMAX, FILLED], ids=["attention", "add", "fill"])
@pytest.mark.parametrize("low", [LOWEST, -3.3e38, -1e9])
def test_a_row_that_is_masked_throughout_gives_no_nan(precision, text, low):
    weights = {"zero": np.float32(0), "one": np.float32(1), "low": np.float32(low)}
    model = graph(text, {n: w for n, w in weights.items() if f"float {n}" in text})
    q = normal(0, 2, 3, 8) * 8  # scores of some hundred, on both sides
    seen = np.array([[1, 1, 0], [0, 0, 0]], bool)
    feeds = {"q": q, "seen": seen.reshape(2, *(1,) * (text is ATTENTION), 1, 3)}
    want = run(model, feeds)[0]
    notes = convert(model, precision)
    gots = [run(model, feeds)[0]]
    if precision == "fp16":
        gots.append(run(model, feeds, as_it_is=True)[0])
    for got in gots:
        np.testing.assert_allclose(got[0], want[0], atol=0.02 * np.abs(q).max(), rtol=0)
        # Nothing is asked of the other row but to be a mean of values: fp16 keeps scores in it,
        # which a lower number swallows. Zeros would be the kernel's answer to a row of -inf.
        assert (q[1].min(0) - 0.1 <= got[1]).all()
        assert (got[1] <= q[1].max(0) + 0.1).all()
        assert got[1].any()
    cut = model.graph.initializers["low"].const_value.numpy()
    assert cut.astype(np.float32) >= HALVES[precision].mask
    if low < HALVES[precision].mask:
        assert notes == (f"the mask 'low' is cut at {HALVES[precision].mask:.6g}: {precision} "
                         "holds no lower number that may be added to a score",)  # fmt: skip


def test_minus_infinity_stays_what_it_is():
    model = graph(FILLED, {"low": np.float32(-np.inf)})
    assert convert(model) == ()
    assert model.graph.initializers["low"].const_value.numpy() == -np.inf


def test_attention_keeps_its_softmax_in_float32():
    model = graph(ATTENTION, {"zero": np.float32(0), "low": np.float32(LOWEST)})
    convert(model)
    assert model.graph[-2].attributes["softmax_precision"].value == ir.DataType.FLOAT


def test_a_mask_that_comes_in_is_named():
    text = """g (float[2,3,8] q, float[2,1,3,3] mask) => (float[2,3,8] y)
    { y = Attention<q_num_heads=2, kv_num_heads=2>(q, q, q, mask) }"""
    (note,) = convert(graph(text))
    assert "the input 'mask' is a mask of float32: what is below -65504 becomes -inf" in note


# Refusals ------------------------------------------------------------------------------------


def test_what_cannot_be_converted_is_left_alone_with_the_reason():
    def said(text: str) -> tuple[str, ...]:
        model = ir.from_onnx_text(text)
        outcome = ConvertFloats("fp16")(model)
        assert (outcome.modified, outcome.hits) == (False, 0)
        return outcome.notes

    head = '<ir_version: 10, opset_import: ["" : 23, "my" : 1]>'
    assert said(f"{head} g (double[2] x) => (double[2] y) {{ y = Tanh(x) }}") == (
        "left in float32: it has no float32",
    )
    assert said(
        f"""{head} g (float[2] x) => (float[2] y) {{ y = my.twice(x) }}
        <domain: "my", opset_import: ["" : 23]> twice (a) => (b) {{ b = Add(a, a) }}"""
    ) == ("left in float32: it has functions, to be inlined first: twice",)
    assert said(f"{head} g (float[2] x) => (float[2] y) {{ a = my.f(x)  y = Tanh(a) }}") == (
        "left in float32: the type of 'a' is not known",
    )
    with pytest.raises(UsageError, match="no 16-bit float 'fp8'"):
        ConvertFloats("fp8")


def test_float64_is_left_alone():
    model = graph(
        """g (double[3,8] x, float[8,8] w) => (double[3,8] y)
        { t = Tanh(x)  f = Cast<to=1>(t)  m = MatMul(f, w)  y = Cast<to=11>(m) }""",
        {"w": normal(1, 8, 8)},
    )
    convert(model)
    assert body(model)[1:] == [
        *("f_fp16 = Cast<FLOAT16>(t)", "m = MatMul(f_fp16, w)", "y = Cast<DOUBLE>(m)"),
    ]


@BOTH
def test_bodies_are_converted_and_their_edges_stay(precision):
    model = graph(
        """g (float[3,8] x, bool c, float[8,8] w) => (float[3,8] y)
        { a = MatMul(x, w)  b = If(c) <
            then_branch = t () => (float[3,8] t1) { t0 = MatMul(a, w)  t1 = Tanh(t0) },
            else_branch = e () => (float[3,8] e1) { e1 = Identity(a) }>
          y = Relu(b) }""",
        {"w": normal(1, 8, 8)},
    )
    wants = [run(model, {**X, "c": np.array(c)}) for c in (True, False)]
    notes = convert(model, precision)
    assert len(notes) == 1
    assert "it has a body" in notes[0]
    inner = {n.op_type: n for n in model.graph.all_nodes()}
    assert inner["Tanh"].outputs[0].dtype == DTYPES[precision]
    assert inner["If"].outputs[0].dtype == ir.DataType.FLOAT
    if precision == "fp16":
        for c, want in zip((True, False), wants, strict=True):
            assert error(run(model, {**X, "c": np.array(c)}, as_it_is=True), want) < 5e-3


def test_weights_on_disk_stay_there(tmp_path):
    model = mlp()
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=64)
    model = ir.load(tmp_path / "m.onnx")
    want = run(mlp(), X)
    ConvertFloats("fp16")(model)
    assert isinstance(model.graph.initializers["w1"].const_value, ir.LazyTensor)
    assert error(run(model, X), want) < 5e-3


# The probe -----------------------------------------------------------------------------------


def typed(model: ir.Model) -> ir.Model:
    InferShapes()(model)
    return model


def planted() -> ir.Model:
    """Two layers with an activation of 1e5 between them, which a norm brings down again."""
    model = graph(
        """g (float[n,8] x, float[8,8] w, float big, float[8] s, float[8,8] v) => (float[n,8] y)
        { a = MatMul(x, w)  c = Mul(a, big)  d = LayerNormalization(c, s)  y = MatMul(d, v) }""",
        {
            "w": normal(1, 8, 8),
            "big": np.float32(5e4),
            "s": normal(3, 8),
            "v": normal(4, 8, 8),
        },
    )
    for node in model.graph:
        node.name = f"make_{node.outputs[0].name}"
    return typed(model)


def test_a_planted_overflow_is_found_named_and_kept():
    model, seen_inputs = planted(), [X, {"x": normal(5, 4, 8)}]
    assert float_values(model) == ["a", "c", "d", "y"]
    peaks = observe_peaks(model, run_model, seen_inputs, chunk=2)
    assert peaks["c"] > 1e5
    found = overflows(model, peaks, "fp16")
    assert [(o.node, o.value) for o in found] == [("make_c", "c"), ("make_d", "c")]
    assert str(found[0]) == f"Mul 'make_c': 'c' of {peaks['c']:.3g} exceeds 3.28e+04"
    assert overflows(model, peaks, "bf16") == []

    want = run(model, X)
    plain, kept = planted(), planted()
    ConvertFloats("fp16")(plain)
    assert not np.isfinite(run(plain, X)[0]).all()
    notes = convert(kept, "fp16", keep={o.node for o in found})
    assert error(run(kept, X), want) < 5e-3
    assert Counter(n.op_type for n in kept.graph)["Cast"] == 4
    assert [note for note in notes if "as asked" in note] == [
        "Mul 'make_c' stays in float32: as asked",
        "LayerNormalization 'make_d' stays in float32: as asked",
    ]


def test_masks_are_no_overflow_and_sums_inside_of_a_node_are():
    weights = {"zero": np.float32(0), "low": np.float32(LOWEST)}
    model = typed(graph(ATTENTION, weights))
    feeds = [{"q": normal(0, 2, 3, 8), "seen": np.zeros((2, 1, 1, 3), bool)}]
    assert overflows(model, observe_peaks(model, run_model, feeds), "fp16") == []

    model = graph(
        """g (float[3,8] x, float k) => (float[1,1] y)
        { a = Mul(x, k)  y = ReduceL2<keepdims=1>(a) }""",
        {"k": np.float32(1000)},
    )
    (found,) = overflows(typed(model), observe_peaks(model, run_model, [X]), "fp16")
    assert (found.op, found.value) == ("ReduceL2", "y")


def test_what_vanishes_is_found_too():
    model = graph(
        """g (float[3,8] x, float k, float e) => (float[3,8] y)
        { a = Mul(x, k)  b = Div(a, k)  y = Add(b, e) }""",
        {"k": np.float32(1e-6), "e": np.float32(1e-12)},
    )
    typed(model)
    feeds = {"x": X["x"] * np.float32(1e-3)}
    want = run(model, feeds)
    found = overflows(model, observe_peaks(model, run_model, [feeds]), "fp16")
    assert {(o.op, o.value) for o in found} == {("Mul", "a"), ("Div", "a"), ("Add", "e")}
    assert all(o.vanishes and "is rounded to 0" in str(o) for o in found)
    convert(model, keep={o.node for o in found})
    assert error(run(model, feeds), want) < 5e-3


def test_what_is_wrong_in_float32_is_said():
    model = graph("g (float[3,8] x) => (float[3,8] y) { a = Log(x)  y = Relu(a) }")
    with pytest.raises(InputError, match="type of 'a' is not known"):
        float_values(model)
    typed(model)
    with pytest.raises(InputError, match="'a' is NaN in float32 already, on input 0"):
        observe_peaks(model, run_model, [X])
    with pytest.raises(InputError, match="'x' is inf in float32 already, on input 1"):
        observe_peaks(model, run_model, [{"x": abs(X["x"])}, {"x": X["x"] + np.inf}])
    with pytest.raises(InputError, match="no inputs"):
        observe_peaks(model, run_model, [])
    with pytest.raises(InputError, match="headroom is 0"):
        overflows(model, {}, "fp16", headroom=0.5)


# Transformers --------------------------------------------------------------------------------

_path = Path(onnxpress.__file__).parent / "benchmarks" / "corpus.py"
_spec = importlib.util.spec_from_file_location("corpus", _path)
assert _spec is not None
assert _spec.loader is not None
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)


@pytest.mark.parametrize("name", ["bert-base-eager", "gpt2", "llama", "t5", "vit"])
def test_transformers_check_and_give_the_same(name, tmp_path):
    file = corpus.export(name, "script14", tmp_path / "m.onnx")
    _, example, names, _ = corpus.module(name)
    feeds = {n: x.numpy() for n, x in zip(names, example, strict=False)}
    lifted = ir.load(file)
    optimize(lifted, TARGETS["tensorrt"])  # ai.onnx alone, so that onnx checks all of it
    want = run(lifted, feeds)
    for precision in DTYPES:
        model = lifted.clone()
        convert(model, precision)
        assert error(run(model, feeds), want) < TOLERANCE[precision]
        heavy = [n for n in model.graph if n.op_type in ("MatMul", "Attention", "Conv")]
        assert {n.outputs[0].dtype for n in heavy} == {DTYPES[precision]}
