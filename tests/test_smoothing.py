"""SmoothQuant: exact in float wherever it is folded, and chosen where it helps."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnxpress.optimizers.precision.calibrators import MinMax
from onnxpress.optimizers.precision.layers import layers
from onnxpress.optimizers.precision.observe import Seen, observe
from onnxpress.optimizers.precision.quantize_static import QuantizeStatic, Scheme
from onnxpress.optimizers.precision.smooth_activations import (
    SmoothActivations,
    Smoothing,
    choose_smoothing,
)

from . import onnx_models
from .int8_models import (
    HEADS,
    SIZE,
    D,
    apply,
    block,
    build,
    error,
    feeds,
    ops,
    run,
    session_run,
    weights_of,
)
from .onnx_models import normal

W = normal(1, D, D) / np.float32(np.sqrt(D))
IO = f"float[b,s,{D}] x", f"float[b,s,{D}] y"
X = feeds()


def factors(n: int, seed: int = 5) -> np.ndarray:
    return np.exp(normal(seed, n)).astype(np.float32)


def smooth(model: ir.Model, value: str, chosen: np.ndarray, data=None) -> str:
    """Smooth one activation, and hold the graph to its float numbers; where the factors went."""
    data = data or [X, feeds(9, 1, 5)]
    want = list(run(model, data))
    outcome = apply(model, SmoothActivations([Smoothing(value, 0.5, chosen, 0.1)]))[0]
    assert outcome.hits == 1
    for got, right in zip(run(model, data), want, strict=True):
        for name in right:
            scale = np.abs(right[name]).max()
            np.testing.assert_allclose(got[name], right[name], rtol=1e-5, atol=1e-5 * scale)
    return outcome.notes[0].split(", ", 1)[1]


# Where the division goes --------------------------------------------------------------------------

A_MUL = "divided by a Mul"
VALUES = "folded into the weight of "


@pytest.mark.parametrize(
    ("options", "value", "where"),
    [
        ({}, "ln1", "folded into LayerNormalization"),
        ({}, "ln2", "folded into LayerNormalization"),
        ({"rms": True}, "ln1", "folded into RMSNormalization"),
        ({"pre": False}, "ln1", A_MUL),  # the residual reads it too
        ({"pre": False}, "x", A_MUL),  # an input of the graph
        ({"ffn": "Relu"}, "f", VALUES),
        ({"ffn": "Relu", "bias": False}, "f", VALUES),
        ({"ffn": "gated"}, "f", VALUES),
        ({"ffn": "gated", "bias": False}, "f", VALUES),
        ({"ffn": "Gelu"}, "f", A_MUL),
        ({"ffn": "Tanh"}, "f", A_MUL),
        ({}, "a", VALUES),
        ({"bias": False}, "a", VALUES),
    ],
    ids=str,
)
def test_a_block_computes_the_same(options, value, where):
    model = block(**options)
    before = ops(model)
    n = 48 if value == "f" else D
    assert smooth(model, value, factors(n)).startswith(where)
    assert len(ops(model)) == len(before) + (where == A_MUL)


@pytest.mark.parametrize("kv", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_heads_share_factors(kv, bias):
    each = factors(kv * SIZE).reshape(kv, 1, SIZE)
    tied = np.broadcast_to(each, (kv, HEADS // kv, SIZE)).reshape(-1)
    assert smooth(block(kv=kv, bias=bias), "a", tied).startswith(VALUES)
    assert smooth(block(kv=kv, bias=bias), "a", factors(D)) == A_MUL  # apart: no head of v fits


def test_the_search_ties_what_grouped_heads_share():
    model = block(kv=2, outliers=30)
    seen = observe(model, ["a"], run, [X], MinMax)
    (found,) = choose_smoothing(model, seen)
    each = found.factors.reshape(2, HEADS // 2, SIZE)
    np.testing.assert_allclose(each, np.broadcast_to(each[:, :1], each.shape), rtol=1e-6)
    assert smooth(model, "a", found.factors).startswith(VALUES)


ATTENTION = f"Attention<q_num_heads={HEADS}, kv_num_heads={HEADS}>"
QKV = {name: normal(i, D, D) / np.float32(6) for i, name in enumerate(("wq", "wk", "wv", "wo"))}
PROJECT = "q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)"
NOT_FOLDED = {
    "a graph output": (f"{IO[1]}, float[b,s,{D}] a", f"{PROJECT} a = {ATTENTION}(q, k, v)"),
    "read by another node": (
        f"{IO[1]}, float[b,s,{D}] z",
        f"{PROJECT} a = {ATTENTION}(q, k, v) z = Neg(a)",
    ),
    "the cache holds values": (
        f"{IO[1]}, float[b,h,s,e] pk, float[b,h,s,e] pv",
        f"{PROJECT} a, pk, pv = {ATTENTION}(q, k, v)",
    ),
    "the cache is read": (
        IO[1],
        f"""{PROJECT} i = Constant<value_ints=[0, 0, {HEADS}, {SIZE}]>()  z = Reshape(x, i)
        past = Transpose<perm=[0, 2, 1, 3]>(z)  a, pk, pv = {ATTENTION}(q, k, v, , past, past)""",
    ),
    "values are an output": (
        f"{IO[1]}, float[b,s,{D}] v",
        f"{PROJECT} a = {ATTENTION}(q, k, v)",
    ),
    "values are read twice": (
        f"{IO[1]}, float[b,s,{D}] z",
        f"{PROJECT} a = {ATTENTION}(q, k, v) z = Neg(v)",
    ),
    "values are the keys": (
        IO[1],
        f"q = MatMul(x, wq)  v = MatMul(x, wv) a = {ATTENTION}(q, v, v)",
    ),
    "values are the queries": (
        IO[1],
        f"k = MatMul(x, wk)  v = MatMul(x, wv) a = {ATTENTION}(v, k, v)",
    ),
    "heads of rank 4": (
        IO[1],
        f"""{PROJECT} i = Constant<value_ints=[0, 0, {HEADS}, {SIZE}]>()
        q4 = Reshape(q, i) k4 = Reshape(k, i) v4 = Reshape(v, i)
        qt = Transpose<perm=[0,2,1,3]>(q4) kt = Transpose<perm=[0,2,1,3]>(k4)
        vt = Transpose<perm=[0,2,1,3]>(v4) at = Attention(qt, kt, vt)
        a4 = Transpose<perm=[0,2,1,3]>(at) j = Constant<value_ints=[0, 0, {D}]>()
        a = Reshape(a4, j)""",
    ),
    "a layer that is read twice": (
        f"{IO[1]}, float[b,s,{D}] z",
        "v = MatMul(x, wv)  a = Relu(v)  z = Neg(v)",
    ),
    "a product of a layer with itself": (IO[1], "v = MatMul(x, wv)  a = Mul(v, v)"),
    "a gate that reads the layer": (IO[1], "v = MatMul(x, wv)  s = Sigmoid(v)  a = Mul(s, v)"),
    "a weight that is fed": (IO[1], "v = MatMul(x, u)  a = Relu(v)"),
    "a bias that is fed": (IO[1], "v = MatMul(x, wv) t = Add(v, c)  a = Relu(t)"),
    "a sum of two layers": (
        IO[1],
        "v = MatMul(x, wv) k = MatMul(x, wk) t = Add(v, k)  a = Relu(t)",
    ),
}


@pytest.mark.parametrize("case", NOT_FOLDED)
def test_what_others_see_is_not_scaled(case):
    outputs, body = NOT_FOLDED[case]
    given = {**X, "u": W, "c": normal(8, D)}
    text = f"{body}  y = MatMul(a, wo)"
    used = {name: w for name, w in QKV.items() if f" {name})" in text}
    inputs = [IO[0]] + [f"float[{D},{D}] u"] * ("u)" in text) + [f"float[{D}] c"] * ("c)" in text)
    model = build(", ".join(inputs), outputs, text, used)
    given = {v.name: given[v.name] for v in model.graph.inputs}
    assert smooth(model, "a", factors(D), [given]) == A_MUL


def test_a_cache_keeps_the_values_of_the_float_model():
    model = onnx_models.decoder(heads=4)
    past = {v.name: normal(4, 2, 4, 3, 8) for v in model.graph.inputs if "past" in v.name}
    given = {
        **past,
        "input_ids": np.array([[5, 6], [7, 8]]),
        "attention_mask": np.ones((2, 5), np.int64),
        "position_ids": np.array([[3, 4], [3, 4]]),
    }
    assert smooth(model, "a0", factors(32), [given]) == A_MUL
    assert any("present" in name for name in session_run(model, given))


def test_a_factor_of_one_column_is_not_the_layer_that_takes_them():
    """A gate (..., 1) times (..., D): the shapes alone may not tell, the weight does."""
    weights = {"wg": normal(3, D, 1), "wv": W, "wo": QKV["wo"]}
    body = "g = MatMul(x, wg)  v = MatMul(x, wv)  a = Mul(g, v)  y = MatMul(a, wo)"
    model = build(*IO, body, weights)
    for value in (v for node in model.graph for v in node.outputs if v.name in "gva"):
        value.shape = ir.Shape([None, None, None])
    assert smooth(model, "a", factors(D)) == f"{VALUES}n1_MatMul"


def test_a_norm_that_is_not_the_layers_alone_is_left_as_it_is():
    norm = 'n, mean = LayerNormalization(x, "n.weight")  y = MatMul(n, w)'
    weights = {"n.weight": factors(D), "w": W}
    model = build(IO[0], f"{IO[1]}, float[b,s,1] mean", norm, weights)
    assert smooth(model, "n", factors(D)) == A_MUL
    body = "n = LayerNormalization(x, scale)  y = MatMul(n, w)"
    model = build(f"{IO[0]}, float[{D}] scale", IO[1], body, {"w": W})
    assert smooth(model, "n", factors(D), [{**X, "scale": factors(D, 7)}]) == A_MUL


def test_weights_that_others_read_stay_and_those_that_no_one_reads_go():
    weights = {"w": W, "wo": QKV["wo"], "extra": normal(2, 4)}
    body = "v = MatMul(x, w)  a = Relu(v)  y = MatMul(a, wo)  u = MatMul(x, w)  z = Neg(w)"
    outputs = f"{IO[1]}, float[b,s,{D}] u, float[{D},{D}] z"
    model = build(IO[0], outputs, body, weights)
    smooth(model, "a", factors(D))
    assert set(weights_of(model)) == {"w", "w_smooth", "wo_smooth", "extra"}


def test_all_activations_of_a_block_at_once():
    for options in ({"ffn": "gated"}, {"ffn": "Relu", "pre": False}, {"rms": True, "kv": 2}):
        model = block(**options)
        want = session_run(model, X)
        names = dict.fromkeys(layer.input.name for layer in layers(model)[0])
        chosen = [Smoothing(n, 0.5, factors(48 if n == "f" else D), 0.1) for n in names]
        assert apply(model, SmoothActivations(chosen))[0].hits == len(names)
        assert error(session_run(model, X), want) < 1e-5
        stay = SmoothActivations([])
        assert apply(model, stay)[0].notes == ()


# The search ---------------------------------------------------------------------------------------


def seen_of(rows: np.ndarray) -> Seen:
    seen = Seen(MinMax())
    seen.see(rows.astype(np.float32))
    return seen


def linear(w: np.ndarray = W) -> ir.Model:
    return build(IO[0], f"float[b,s,{w.shape[1]}] y", "y = MatMul(x, w)", {"w": w})


def int8_error(model: ir.Model, data: dict, *passes: ir.passes.InPlacePass) -> float:
    """Relative error of the whole graph in int8, after the passes."""
    want, model = session_run(model, data), model.clone()
    for p in passes:
        p(model)
    names = [str(layer.input.name) for layer in layers(model)[0]]
    seen = observe(model, names, run, [data], MinMax)
    QuantizeStatic({n: s.calibrator.range() for n, s in seen.items()})(model)
    return error(session_run(model, data), want)


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("outlier", [30, 100])
def test_planted_outliers_are_moved_into_the_weights(kind, outlier):
    x = normal(0, 2, 200, D)
    x[..., [3, 17]] *= outlier
    w = W.copy()
    w[[3, 17]] /= outlier  # as training leaves them: what is large counts no more than the rest
    model, scheme = linear(w), Scheme(kind)
    (found,) = choose_smoothing(model, {"x": seen_of(x.reshape(-1, D))}, scheme=scheme)
    assert found.error < 1 / 25  # squared: at least 5 times
    assert found.factors[[3, 17]].min() > 3 * np.delete(found.factors, [3, 17]).max()
    np.testing.assert_allclose(np.log(found.factors).mean(), 0, atol=1e-5)
    if kind == "uint8":
        plain = int8_error(model, {"x": x})
        assert int8_error(model, {"x": x}, SmoothActivations([found])) < plain / 5


def test_nothing_is_done_where_there_is_nothing_to_gain():
    x = normal(0, 1, 400, D)
    assert choose_smoothing(linear(), {"x": seen_of(x[0])}) == []
    for rows in (np.zeros((9, D)), np.zeros((0, D))):
        assert choose_smoothing(linear(), {"x": seen_of(rows)}) == []
    assert choose_smoothing(linear(), {}) == []


def test_all_of_the_sample_has_a_say_not_its_first_rows():
    rows = normal(0, 1000, D) * np.float32(0.001)
    rows[600:] = normal(1, 400, D)
    rows[600:, 5] *= 80
    early = rows.copy()
    early[:] = np.concatenate([rows[600:], rows[:600]])
    late, soon = (choose_smoothing(linear(), {"x": seen_of(r)}) for r in (rows, early))
    assert len(late) == len(soon) == 1
    assert late[0].error == pytest.approx(soon[0].error, rel=0.25)
    rows[:600] = 0
    assert choose_smoothing(linear(), {"x": seen_of(rows)})


def test_a_channel_that_was_always_zero_is_neither_blown_up_nor_cut():
    rows = normal(0, 300, D)
    rows[:, 4] *= 50
    rows[:, [7, 8]] = 0
    model = linear()
    (found,) = choose_smoothing(model, {"x": seen_of(rows)})
    assert found.factors[[7, 8]].tolist() == [1, 1]
    smooth(model.clone(), "x", found.factors)
    awake = rows[None].copy()
    awake[0, :, 7] = 1  # a text that was not among the calibration data
    SmoothActivations([found])(model)
    want = awake @ W
    low, high = (rows / found.factors).min(), (rows / found.factors).max()
    QuantizeStatic({"x_smooth": (float(low), float(high))})(model)
    assert error(session_run(model, {"x": awake}), {"y": want}) < 0.02


@pytest.mark.parametrize("rows", [normal(3, 1, D), np.full((5, D), 2.5), np.full((5, D), -1e-20)])
def test_one_row_or_a_constant(rows):
    model = linear()
    for found in choose_smoothing(model, {"x": seen_of(rows)}):
        assert np.isfinite(found.factors).all()
        assert (found.factors > 0).all()
        assert found.error < 0.8
        smooth(model, "x", found.factors)


def test_a_weight_of_zeros_does_no_harm():
    w = W.copy()
    w[:, 2], w[9] = 0, 0
    rows = normal(0, 300, D)
    rows[:, 4] *= 50
    (found,) = choose_smoothing(linear(w), {"x": seen_of(rows)})
    assert np.isfinite(found.factors).all()
    smooth(linear(w), "x", found.factors)
    assert choose_smoothing(linear(np.zeros_like(W)), {"x": seen_of(rows)}) == []


def test_a_weight_that_two_activations_meet_is_not_stored_twice():
    body = "h = MatMul(x, w)  t = Tanh(h)  y = MatMul(t, w)"
    model = build(*IO, body, {"w": W})
    rows = normal(0, 300, D)
    rows[:, 4] *= 50
    assert choose_smoothing(model, {"x": seen_of(rows), "t": seen_of(rows)}) == []


def test_folding_is_taken_for_less_than_a_mul():
    """The same activation: a Mul has to bring a fifth, what is free has to bring anything."""
    rows = normal(0, 400, D)
    rows[:, ::2] *= 1.25
    free = build(
        *IO, "n = RMSNormalization(x, s)  y = MatMul(n, w)", {"s": np.ones(D, np.float32), "w": W}
    )
    (found,) = choose_smoothing(free, {"n": seen_of(rows)})
    assert 0.8 < found.error < 1
    assert choose_smoothing(linear(), {"x": seen_of(rows)}) == []
