"""Static int8: which layers, what calibration sees, the graph, its numbers, and its refusals."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxpress.errors import InputError, UsageError
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.lower.fuse_integer_matmul import LONGEST, FuseIntegerMatmul
from onnxpress.optimizers.outcome import SCOPE
from onnxpress.optimizers.precision import compensate_weights as compensating
from onnxpress.optimizers.precision import observe as observing
from onnxpress.optimizers.precision.calibrators import MinMax, quantize_weight
from onnxpress.optimizers.precision.compensate_weights import compensate
from onnxpress.optimizers.precision.convert_floats import ConvertFloats
from onnxpress.optimizers.precision.emulate_floats import EmulateFloats
from onnxpress.optimizers.precision.layers import layers
from onnxpress.optimizers.precision.learn_int8 import Int8, learn
from onnxpress.optimizers.precision.observe import ROWS, Seen, observe, with_outputs
from onnxpress.optimizers.precision.quantize_static import QuantizeStatic, Scheme
from onnxpress.optimizers.precision.simulate import rounded_activation, rounded_weight
from onnxpress.optimizers.precision.smooth_activations import SmoothActivations

from .int8_models import (
    D,
    apply,
    block,
    build,
    error,
    feeds,
    ops,
    run,
    session_run,
    text,
    weights_of,
)  # fmt: skip
from .onnx_models import normal

W = normal(1, D, D) / np.float32(np.sqrt(D))
B = normal(2, D)
IO = f"float[b,s,{D}] x", f"float[b,s,{D}] y"
X = feeds()
UINT8, INT8 = Scheme("uint8"), Scheme("int8")
BOTH = pytest.mark.parametrize("scheme", [UINT8, INT8], ids=lambda s: s.activations)


def names(model: ir.Model) -> list[str]:
    return [layer.name for layer in layers(model)[0]]


def ranges(model: ir.Model, data=X) -> dict[str, tuple[float, float]]:
    inputs = list(dict.fromkeys(str(layer.input.name) for layer in layers(model)[0]))
    return {n: s.calibrator.range() for n, s in observe(model, inputs, run, [data], MinMax).items()}


# Layers -------------------------------------------------------------------------------------------


def test_layers_have_the_names_of_modules_then_of_weights_of_biases_and_of_nodes():
    weights = {"enc.3.q.weight": W, "enc.3.q.bias": B, "val_7": W + 1, "enc.3.k.bias": B + 1}
    weights["val_8"], weights["val_9"] = W + 2, W + 3
    body = """p = MatMul(x, "enc.3.q.weight")  a = Add(p, "enc.3.q.bias")
    r = MatMul(a, val_7)  c = Add("enc.3.k.bias", r)  d = MatMul(c, val_8)  y = MatMul(d, val_9)"""
    model = build(*IO, body, weights)
    list(model.graph)[-1].metadata_props[SCOPE] = "head.0"
    found, notes = layers(model)
    assert [f.name for f in found] == ["enc.3.q", "enc.3.k", "n4_MatMul", "head.0"]
    assert [f.kind for f in found] == ["enc.*.q", "enc.*.k", "n*_MatMul", "head.*"]
    assert [f.bias and f.bias.name for f in found] == ["enc.3.q.bias", "enc.3.k.bias", None, None]
    assert [f.output.name for f in found] == ["a", "c", "d", "y"]
    assert notes == []


def test_a_bias_that_layers_share_names_none_of_them():
    """Equal biases become one initializer; smoothing parts them again, and names must not move."""
    weights = {"w1": W, "w2": W + 1, "first.bias": np.zeros(D, np.float32)}
    body = """p = MatMul(x, w1)  a = Add(p, "first.bias")  h = Relu(a)
    r = MatMul(h, w2)  y = Add(r, "first.bias")"""
    model = build(*IO, body, weights)
    before = names(model)
    assert before == ["n0_MatMul", "n3_MatMul"]
    (part,) = (n for n in model.graph if n.name == "n1_Add")
    own = ir.Value(name="first.bias_smooth", const_value=ir.tensor(B), type=part.inputs[1].type)
    own.shape = part.inputs[1].shape
    model.graph.register_initializer(own)
    part.replace_input_with(1, own)
    assert names(model) == before


def test_a_module_that_is_called_twice_has_two_names():
    body = 'h = MatMul(x, "m.weight")  t = Tanh(h)  y = MatMul(t, "m.weight")'
    assert names(build(*IO, body, {"m.weight": W})) == ["m#1", "m#2"]


def test_no_layers():
    small = normal(3, D, 31)
    weights = {"small": small, "w3": normal(4, 1, D, D), "out": W, "both": W, "half": W, "b1": B}
    inputs = f"{IO[0]}, float[{D},{D}] fed"
    outputs = f"float[b,s,31] a, float[1,{D},{D}] e, float[{D},{D}] out"
    outputs += f", {IO[1]}, {IO[1].replace('y', 'f')}, {IO[1].replace('y', 'g')}"
    body = """a = MatMul(x, small)  h = Cast<to=10>(x)  hw = Cast<to=10>(half)  y = MatMul(x, fed)
    f = MatMul(x, w3)  g = MatMul(x, out)  e3 = MatMul(both, w3)  e = Identity(e3)"""
    found, notes = layers(build(inputs, outputs, body, weights))
    assert found == []
    assert [note.split(": ")[1] for note in notes] == [
        "its weight has 992 elements; below 1024 int8 saves nothing",
        "its weight has rank 3, not 2",
        "its weight is an output of the graph",
    ]
    half = build(
        f"float16[b,{D}] x", f"float16[b,{D}] y", "y = MatMul(x, w)", {"w": W.astype(np.float16)}
    )
    assert layers(half)[1] == [
        "MatMul 'n0_MatMul' stays as it is: its weight is FLOAT16, not float32"
    ]


def test_what_is_added_is_a_bias_only_where_it_is_one():
    for term, shape in (("r", f"float[{D}] r"), ("b1", ""), ("p", "")):
        inputs = ", ".join(s for s in (IO[0], shape) if s)
        weights = {"w": W} | ({"b1": B[None]} if term == "b1" else {})
        model = build(inputs, IO[1], f"p = MatMul(x, w)  y = Add(p, {term})", weights)
        assert layers(model)[0][0].bias is None


# What calibration sees ----------------------------------------------------------------------------


def see(rows: np.ndarray, *cuts: int, gram: bool = False) -> Seen:
    seen = Seen(MinMax(), wants_gram=gram)
    for part in np.split(rows, cuts):
        seen.see(part)
    return seen


def test_the_sample_is_the_same_in_whatever_batches():
    rows = normal(0, 3000, 4)
    whole, parts = see(rows), see(rows, 1, 1, 700, 702, 2999)
    np.testing.assert_array_equal(whole.rows, parts.rows)
    assert len(whole.rows) == ROWS
    assert whole.count == parts.count == 3000
    few = see(rows[:50], 20)
    np.testing.assert_array_equal(few.rows, rows[:50])  # all of them, in their order
    for seen in (whole, parts):
        np.testing.assert_array_equal(seen.low, rows.min(0))
        np.testing.assert_array_equal(seen.high, rows.max(0))


def test_the_sample_is_uniform():
    index = np.arange(40_000, dtype=np.float32)[:, None]
    kept = see(index, *range(0, 40_000, 640)).rows[:, 0]
    assert len(set(kept)) == ROWS
    counts = np.histogram(kept, 16, (0, 40_000))[0]
    assert ((counts - 64) ** 2 / 64).sum() < 37.7  # chi squared of 15: one in a thousand


def test_the_gram_is_x_t_x(monkeypatch):
    rows = normal(0, 500, 7) + 1
    np.testing.assert_allclose(see(rows, 10, 11, gram=True).gram, rows.T @ rows, rtol=1e-4)
    assert see(rows).gram is None
    monkeypatch.setattr(observing, "WIDEST", 6)
    assert see(rows, gram=True).gram is None


def test_values_of_a_graph_as_they_are():
    model = build(*IO, "h = MatMul(x, w)  t = Tanh(h)  y = Identity(t)", {"w": W})
    before = ir.to_onnx_text(model)
    seen = observe(model, ["x", "t", "y"], run, [X, feeds(1, 1, 3)], MinMax, gram=True)
    assert ir.to_onnx_text(model) == before
    x = np.concatenate([X["x"].reshape(-1, D), feeds(1, 1, 3)["x"].reshape(-1, D)])
    np.testing.assert_array_equal(seen["x"].rows, x)
    np.testing.assert_allclose(seen["t"].rows, np.tanh(x @ W), atol=1e-6)
    assert seen["y"].calibrator.range() == (seen["t"].low.min(), seen["t"].high.max())
    assert [v.name for v in with_outputs(model, ["x", "h"]).graph.outputs] == ["x", "h"]


def test_padding_is_left_out():
    data = [{"x": X["x"].copy()}, {"x": normal(3, 1, 4, D)}, {"x": normal(4, 2, 3, D)}]
    data[0]["x"][0, 10:] = np.nan
    masks = [np.arange(16) < np.array([[10], [16]]), np.ones((1, 4), bool), np.zeros((2, 3), bool)]
    lookup = {id(given): mask for given, mask in zip(data, masks, strict=True)}
    model = build(*IO, "h = MatMul(x, w)  y = Tanh(h)", {"w": W})

    def ahead(model, data):
        """A run that reads all of its data before it gives anything."""
        yield from run(model, list(data))

    for how in (run, ahead):
        seen = observe(
            model, ["x", "y"], how, data, MinMax, real=lambda g: lookup[id(g)], gram=True
        )
        rows = np.concatenate([d["x"][m] for d, m in zip(data, masks, strict=True)])
        assert seen["x"].count == len(rows) == 30
        np.testing.assert_array_equal(seen["x"].rows, rows)
        assert seen["x"].calibrator.range() == (rows.min(), rows.max())
        np.testing.assert_allclose(seen["x"].gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    nothing = observe(model, ["y"], run, data[2:], MinMax, real=lambda _: masks[2])["y"]
    assert nothing.count == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_numbers_are_refused_by_name(bad):
    model = build(*IO, "h = Sqrt(x)  n = Log(h)  y = MatMul(n, w)", {"w": W})
    x = np.abs(X["x"])
    x[1, 2, 3] = 0 if bad == -np.inf else bad
    with pytest.raises(InputError, match="'n' holds NaN or infinity"):
        learn(model, Int8(), run, lambda: [{"x": np.abs(X["x"])}, {"x": x}])
    w = W.copy()
    w[3, 4] = bad
    with pytest.raises(InputError, match=r"weight 'lin\.weight' of lin holds NaN"):
        learn(
            build(*IO, 'y = MatMul(x, "lin.weight")', {"lin.weight": w}), Int8(), run, lambda: [X]
        )


def test_what_cannot_be_learned():
    model = build(*IO, "y = MatMul(x, w)", {"w": W})
    with pytest.raises(InputError, match="no calibration data"):
        learn(model, Int8(), run, list)
    with pytest.raises(UsageError, match="no calibrator 'best'"):
        learn(model, Int8(calibrator="best"), run, lambda: [X])
    with pytest.raises(UsageError, match="no MatMul with a constant weight"):
        learn(build(*IO, "y = Tanh(x)"), Int8(), run, lambda: [X])
    learned = learn(model, Int8(), run, lambda: [X], real=lambda _: np.zeros((2, 16), bool))
    assert (learned.ranges, learned.weights, learned.smoothings) == ({}, {}, [])
    outcome = apply(model, *learned.passes())[1]
    assert outcome.notes == ("n0_MatMul stays in float: its input was not calibrated",)


# The graph ----------------------------------------------------------------------------------------

GOLDEN = """
   x_quantized = QuantizeLinear (x, x_scale, x_zero_point)
   x_dequantized = DequantizeLinear (x_quantized, x_scale, x_zero_point)
   "q.weight_dequantized" = DequantizeLinear <axis: int = 1> ("q.weight_int8", "q.weight_scales")
   qm = MatMul (x_dequantized, "q.weight_dequantized")
   q = Add (qm, "q.bias")
   "k.weight_dequantized" = DequantizeLinear <axis: int = 1> ("k.weight_int8", "k.weight_scales")
   k = MatMul (x_dequantized, "k.weight_dequantized")
   v = MatMul (x, "v.weight")
   y = Attention <q_num_heads: int = 4, kv_num_heads: int = 4> (q, k, v)
"""


def qkv() -> ir.Model:
    weights = {"q.weight": W, "q.bias": B, "k.weight": W * 2, "v.weight": W * 3}
    body = """qm = MatMul(x, "q.weight")  q = Add(qm, "q.bias")  k = MatMul(x, "k.weight")
    v = MatMul(x, "v.weight")  y = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v)"""
    return build(*IO, body, weights)


def test_the_graph_that_is_written():
    model = qkv()
    (outcome,) = apply(model, QuantizeStatic(ranges(model), keep=["v"]))
    assert (outcome.hits, outcome.notes) == (2, ())
    written = text(model)
    start = written.index("{", written.index("float[b,s,32] y"))
    lines = [line.rstrip() for line in written[start + 1 : written.rindex("}")].splitlines()]
    plain = "\n".join(line.split("] ", 1)[1] if line.startswith("   [") else line for line in lines)
    assert plain.split() == GOLDEN.split()
    kinds = {name: (v.dtype.name, str(v.shape)) for name, v in model.graph.initializers.items()}
    assert kinds == {
        "q.bias": ("FLOAT", "[32]"),
        "v.weight": ("FLOAT", "[32,32]"),
        "x_scale": ("FLOAT", "[]"),
        "x_zero_point": ("UINT8", "[]"),
        **{f"{n}.weight_int8": ("INT8", "[32,32]") for n in "qk"},
        **{f"{n}.weight_scales": ("FLOAT", "[32]") for n in "qk"},
    }


@BOTH
def test_numbers_are_those_of_the_simulation_within_their_bounds(scheme):
    weights = {"a.weight": W, "a.bias": B}
    model = build(*IO, 'p = MatMul(x, "a.weight")  y = Add(p, "a.bias")', weights)
    bounds = ranges(model)
    apply(model, QuantizeStatic(bounds, scheme=scheme))
    got = session_run(model, X)["y"]
    x, w = rounded_activation(X["x"], *bounds["x"], scheme), rounded_weight(W, scheme)
    np.testing.assert_allclose(got, x @ w + B, rtol=1e-5, atol=1e-5)
    half = float(weights_of(model)["x_scale"]) / 2
    columns = np.abs(W).max(0) / 254
    bound = half * np.abs(w).sum(0) + np.abs(X["x"]).sum(-1, keepdims=True) * columns
    assert (np.abs(got - (X["x"] @ W + B)) <= bound * 1.001 + 1e-5).all()
    np.testing.assert_array_less(np.abs(x - X["x"]), half * 1.001)  # nothing is clipped
    far = rounded_activation(np.float32([-1e6, 1e6]), *bounds["x"], scheme)
    np.testing.assert_allclose(
        session_run(model, {"x": np.full((1, 1, D), 1e6, np.float32)})["y"],
        np.full((1, 1, D), far[1]) @ w + B,
        rtol=1e-5,
        atol=1e-4,
    )


def test_the_scheme_of_tensorrt():
    model = block(outliers=20)
    learned = learn(model, Int8(INT8), run, lambda: [X])
    want = session_run(model, X)
    apply(model, *learned.passes())
    assert all(low == -high for low, high in learned.ranges.values())
    assert {n.domain for n in model.graph} == {""}
    assert ops(model).count("QuantizeLinear") == 4
    assert error(session_run(model, X), want) < 0.05
    zeros = [v for n in model.graph if n.op_type == "QuantizeLinear" for v in n.inputs[2:]]
    assert {(z.dtype, int(z.const_value.numpy())) for z in zeros} == {(ir.DataType.INT8, 0)}
    outcome = FuseIntegerMatmul()(model)
    assert (outcome.hits, len(outcome.notes)) == (0, 6)  # S8S8 is for others


def test_the_lowered_form_computes_the_same():
    model = block(bias=False)
    apply(model, *learn(model, Int8(), run, lambda: [X]).passes())
    want = session_run(model, X)
    assert FuseIntegerMatmul()(model).hits == 6
    assert ops(model).count("MatMulIntegerToFloat") == 6
    assert not {"MatMul", "DequantizeLinear"} & set(ops(model))
    assert error(session_run(model, X), want) < 1e-5


def test_sums_that_32_bits_do_not_hold_stay_in_float():
    n = LONGEST + 1
    q = ir.Value(name="w8", type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape([n, 1]))
    q.const_value = ir.tensor(np.ones((n, 1), np.int8), name="w8")
    model = build(
        f"float[b,{n}] x, int8[{n},1] w8",
        "float[b,1] y",
        """s = Constant<value_float=0.1>()  q = QuantizeLinear(x, s)
        d = DequantizeLinear(q, s)  w = DequantizeLinear(w8, s)  y = MatMul(d, w)""",
    )
    assert "too large for 32 bits" in FuseIntegerMatmul()(model).notes[0]


def test_a_correction_becomes_the_bias():
    zeros = np.zeros(64, np.float32)
    w = np.concatenate([W, W], 1)
    weights = {"a.weight": w, "a.bias": zeros, "other.bias": zeros}
    out = "float[b,s,64] y, float[b,s,64] u, float[b,s,64] z"
    body = """m = MatMul(x, "a.weight")  y = Add("a.bias", m)  z = MatMul(x, "a.weight")
    u = Add(y, "other.bias")"""
    model = build(IO[0], out, body, weights)
    assert names(model) == ["a#1", "a#2"]
    want = session_run(model, X)
    shift = {"a#1": normal(5, 64), "a#2": normal(6, 64)}
    plain, shifted = model.clone(), model
    apply(plain, QuantizeStatic(ranges(plain)))
    apply(shifted, QuantizeStatic(ranges(shifted), corrections=shift))
    a, b = session_run(plain, X), session_run(shifted, X)
    for name, by in (("y", "a#1"), ("u", "a#1"), ("z", "a#2")):
        np.testing.assert_allclose(b[name] - a[name], np.broadcast_to(shift[by], want[name].shape),
                                   atol=1e-5)  # fmt: skip
    assert ops(shifted).count("Add") == ops(plain).count("Add") + 1
    assert "a.bias" not in shifted.graph.initializers
    assert "other.bias" in shifted.graph.initializers
    assert FuseIntegerMatmul()(shifted).hits == 2
    assert ops(shifted).count("Add") == 1  # both biases are in the kernels


def test_weights_that_others_read():
    table = normal(7, 64, D)
    body = """e = Gather(table, ids)  a = MatMul(e, w)  b = MatMul(a, w)
    t = Transpose(table)  y = MatMul(b, head)  g = Gather(head, ids)"""
    weights = {"table": table, "w": W, "head": np.ascontiguousarray(table[:D])}
    outputs = f"float[b,s,{D}] y, float[b,s,{D}] g, float[{D},64] t"
    model = build("int64[b,s] ids", outputs, body, weights)
    data = {"ids": np.arange(32).reshape(2, 16)}
    want = session_run(model, data)
    learned = learn(model, Int8(smooth=False), run, lambda: [data])
    (outcome,) = apply(model, *learned.passes()[1:])
    assert outcome.hits == 3
    assert outcome.notes == ("head stays in float too: others read it",)
    assert {"table", "head", "head_int8", "w_int8"} <= set(weights_of(model))
    assert "w" not in weights_of(model)
    assert len([n for n in weights_of(model) if n.startswith("w_int8")]) == 1
    got = session_run(model, data)
    assert error(got, want) < 0.03
    np.testing.assert_array_equal(got["g"], want["g"])


def test_layers_that_share_a_weight_share_what_was_learned_of_it():
    body = 'h = MatMul(x, "m.weight")  t = Tanh(h)  y = MatMul(t, "m.weight")'
    model = build(*IO, body, {"m.weight": W})
    learned = learn(model, Int8(), run, lambda: [X])
    (first, scales), (second, _) = learned.weights["m#1"], learned.weights["m#2"]
    assert first is second
    copy = model.clone()
    assert apply(copy, *learned.passes(["m#1"]))[1].hits == 1
    np.testing.assert_array_equal(weights_of(copy)["m.weight_int8"], first)
    np.testing.assert_array_equal(weights_of(copy)["m.weight_scales"], scales)
    assert "m.weight" in weights_of(copy)


def test_refusals():
    model = qkv()
    notes = apply(model.clone(), QuantizeStatic({}))[0].notes
    assert notes == tuple(f"{n} stays in float: its input was not calibrated" for n in "qkv")
    old = build(*IO, "y = MatMul(x, w)", {"w": W}, opset=12)
    assert "the opset is 12" in apply(old, QuantizeStatic({"x": (-1.0, 1.0)}))[0].notes[0]
    bad = W.copy()
    bad[0, 0] = np.nan
    model = build(*IO, "y = MatMul(x, w)", {"w": bad})
    (outcome,) = apply(model, QuantizeStatic({"x": (-1.0, 1.0)}))
    assert outcome.notes == (
        "n0_MatMul stays in float: the weight has values that are NaN or infinite",
    )
    assert ops(model) == ["MatMul"]


def test_a_graph_that_is_quantized_in_part_is_not_quantized_again():
    """The layer that was kept is called by another name, now that it is alone."""
    body = 'h = MatMul(x, "m.weight")  t = Tanh(h)  y = MatMul(t, "m.weight")'
    model = build(*IO, body, {"m.weight": W})
    quantize = QuantizeStatic(ranges(model), keep=["m#1"])
    assert quantize(model).hits == 1
    again = quantize(model)
    assert (again.hits, again.modified) == (0, False)
    assert "quantized already: " in again.notes[0]


# Rounding that knows the data ---------------------------------------------------------------------


def correlated(k: int = 64, n: int = 48) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, 8)) @ rng.standard_normal((8, k))
    x += 0.05 * rng.standard_normal(x.shape)
    return x.astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)


def output_error(x: np.ndarray, w: np.ndarray, q: np.ndarray, scales: np.ndarray) -> float:
    return float(np.linalg.norm(x @ (q * scales - w)))


def test_errors_cancel_on_channels_that_move_together(monkeypatch):
    x, w = correlated()
    nearest, scales = quantize_weight(w, axis=1)
    q = compensate(w, x.T @ x, scales)
    assert q.dtype == np.int8
    assert output_error(x, w, q, scales) * 1.5 < output_error(x, w, nearest, scales)
    wide, w = correlated(300, 8)  # more than one block of rows
    nearest, scales = quantize_weight(w, axis=1)
    q = compensate(w, wide.T @ wide, scales)
    assert output_error(wide, w, q, scales) * 1.5 < output_error(wide, w, nearest, scales)
    monkeypatch.setattr(compensating, "BLOCK", 1000)  # they save time, and change nothing
    assert (compensate(w, wide.T @ wide, scales) == q).mean() > 0.999


def test_channels_on_their_own_are_rounded_to_nearest():
    _, w = correlated()
    nearest, scales = quantize_weight(w, axis=1)
    gram = np.diag(np.random.default_rng(1).uniform(0, 9, len(w))).astype(np.float32)
    np.testing.assert_array_equal(compensate(w, gram, scales), nearest)
    np.testing.assert_array_equal(compensate(w, gram * 0, scales), nearest)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_gram_without_an_inverse(rows):
    x, w = correlated()
    x = x[:rows].copy()
    x[:, 10:20] = 0  # never seen
    w[:, 5] = 0
    nearest, scales = quantize_weight(w, axis=1)
    q = compensate(w, x.T @ x, scales)
    assert (q[:, 5] == 0).all()
    np.testing.assert_array_equal(q[10:20], nearest[10:20])
    assert output_error(x, w, q, scales) <= output_error(x, w, nearest, scales)
    assert np.abs(q.astype(int)).max() <= 127


# All of it ----------------------------------------------------------------------------------------


def test_corrections_take_the_mean_of_the_error_away():
    x = normal(0, 4, 200, D) * np.float32(0.1) + normal(1, D) * 4
    weights = {"a.weight": W, "a.bias": B}
    model = build(*IO, 'p = MatMul(x, "a.weight")  y = Add(p, "a.bias")', weights)
    want = session_run(model, {"x": x})["y"]
    means = {}
    for correct in (False, True):
        int8 = Int8(smooth=False, compensate=False, correct=correct)
        learned = learn(model, int8, run, lambda: [{"x": x}])
        assert learned.weights == {}
        copy = model.clone()
        apply(copy, *learned.passes())
        wrong = session_run(copy, {"x": x})["y"] - want
        means[correct] = np.linalg.norm(wrong.mean((0, 1)))
    assert means[True] < means[False] / 10
    noise = learn(model, Int8(), run, lambda: [{"x": normal(3, 1, 1, D)}])
    assert noise.corrections == {}  # one row proves no shift


def test_each_step_of_learning_brings_its_part():
    data = [feeds(i, 4, 32) for i in range(3)]
    model = block(outliers=40)
    steps = [
        Int8(smooth=False, compensate=False, correct=False),
        Int8(compensate=False, correct=False),
        Int8(),
    ]
    fresh = feeds(99, 4, 32)
    want, errors, progress = session_run(model, fresh), [], []
    before = ir.to_onnx_text(model)
    for int8 in steps:
        learned = learn(model, int8, run, lambda: iter(data), progress=progress.append)
        assert ir.to_onnx_text(model) == before
        copy = model.clone()
        apply(copy, *learned.passes())
        errors.append(error(session_run(copy, fresh), want))
    assert errors[1] < errors[0] / 1.5
    assert errors[2] < errors[1]
    assert "smooth: 0 of 4 activations" in progress


def test_activations_that_never_change_are_named():
    one = np.full((2, 16, D), 0.7, np.float32)
    model = build(*IO, "h = MatMul(x, w)  y = MatMul(h, w2)", {"w": W, "w2": W + 1})
    learned = learn(model, Int8(), run, lambda: [{"x": one}, {"x": one[:1]}])
    assert learned.constant[0].startswith("x")
    want = session_run(model, {"x": one})
    apply(model, *learned.passes())
    assert error(session_run(model, {"x": one}), want) < 0.01


BLOCKS = st.fixed_dictionaries(
    {
        "pre": st.booleans(),
        "rms": st.booleans(),
        "kv": st.sampled_from([1, 2, 4]),
        "ffn": st.sampled_from(["Gelu", "Relu", "gated"]),
        "bias": st.booleans(),
        "outliers": st.sampled_from([1.0, 10.0, 60.0]),
        "seed": st.integers(0, 99),
    }
)


@settings(max_examples=20)
@given(BLOCKS, st.booleans(), st.sampled_from(["minmax", "percentile"]), st.data())
def test_any_block(options, symmetric, calibrator, draw):
    model = block(**options)
    # Texts enough, since smoothing brings every channel to the edge of what was seen; and short
    # ones too, since attention over few tokens takes the mean of few, which reaches farther.
    data, fresh = [feeds(n, 512 // n, n) for n in (4, 9, 32)], feeds(77, 3, 9)
    want = session_run(model, fresh)
    int8 = Int8(INT8 if symmetric else UINT8, calibrator=calibrator)
    learned = learn(model, int8, run, lambda: data)
    found, products = names(model), ops(model).count("MatMul")

    smoothed, kept = model.clone(), model.clone()
    apply(smoothed, SmoothActivations(learned.smoothings))
    assert error(session_run(smoothed, fresh), want) < 1e-5
    apply(kept, *learned.passes(found))
    assert text(kept) == text(smoothed)

    some = draw.draw(st.sets(st.sampled_from(found), max_size=3))
    apply(model, *learned.passes(some))
    assert ops(model).count("MatMul") == products
    int8_weights = [n for n in weights_of(model) if n.endswith("_int8")]
    assert len(int8_weights) == len(found) - len(some)
    assert error(session_run(model, fresh), want) < 0.1
    assert FuseIntegerMatmul()(model).hits == (0 if symmetric else len(int8_weights))
    InferShapes()(model)
    assert error(session_run(model, fresh), want) < 0.1


# bf16 and fp16 in float32 -------------------------------------------------------------------------

HALVES = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}


def rounded(x: np.ndarray, precision: str) -> np.ndarray:
    return x.astype(HALVES[precision]).astype(np.float32)


@pytest.mark.parametrize("precision", HALVES)
def test_16_bits_are_float32_rounded_after_each_node(precision):
    rng = np.random.default_rng(0)
    w, b = (rng.integers(-400, 400, s).astype(np.float32) / 512 for s in ((8, 8), (8,)))
    x = rng.integers(-400, 400, (5, 8)).astype(np.float32) / 64  # all sums are exact in float32
    body = "m = MatMul(x, w)  a = Add(m, b)  y = Add(a, two)"
    two = np.full(8, 2.0078125, np.float32)
    model = build("float[n,8] x", "float[n,8] y", body, {"w": w, "b": b, "two": two})
    ConvertFloats(precision)(model)
    apply(model, EmulateFloats())
    halves = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    assert not halves & {v.dtype for v in model.graph.initializers.values()}
    m = rounded(rounded(x, precision) @ rounded(w, precision), precision)
    a = rounded(m + rounded(b, precision), precision)
    y = rounded(a + rounded(two, precision), precision)
    assert (y != x @ w + b + two).any()
    np.testing.assert_array_equal(session_run(model, {"x": x})["y"], y)


def test_overflow_of_fp16_is_seen():
    model = build("float[n,8] x", "float[n,8] y", "t = Mul(x, x)  y = Sub(t, t)")
    ConvertFloats("fp16")(model)
    EmulateFloats()(model)
    x = np.full((1, 8), 300, np.float32)
    assert np.isnan(session_run(model, {"x": x})["y"]).all()
    x[:] = 3
    assert (session_run(model, {"x": x})["y"] == 0).all()


def test_bodies_have_16_bits_too():
    loop = """g (float[2] x) => (float[2] y) {
    h = Cast<to=16>(x)  n = Constant<value = int64 {3}>()  go = Constant<value = bool {1}>()
    s = Loop(n, go, h) <body = step (int64 i, bool c, bfloat16[2] t) => (bool d, bfloat16[2] u)
    { d = Identity(c)  f = Constant<value_float = 0.333>()  e = Cast<to=16>(f)  u = Add(t, e) }>
    y = Cast<to=1>(s) }"""
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 23]> ' + loop)
    InferShapes()(model)
    apply(model, EmulateFloats())
    x = want = np.float32([0.1, 7])
    third = rounded(np.float32(0.333), "bf16")
    want = rounded(want, "bf16")
    for _ in range(3):
        want = rounded(want + third, "bf16")
    np.testing.assert_array_equal(session_run(model, {"x": x})["y"], want)


def test_a_signature_of_16_bits_is_refused():
    model = build("float[n,8] x", "float[n,8] y", "y = Tanh(x)")
    ConvertFloats("bf16", keep_io=False)(model)
    assert apply(model, EmulateFloats())[0].notes == (
        "'x' is BFLOAT16, and the signature has to stay",
    )
