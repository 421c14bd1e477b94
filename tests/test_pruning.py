"""Pruning: what goes, what shrinks along, what makes up for it, and what is refused.

The exact proof: a graph without some heads or columns computes what the whole graph computes with
their rows of the next weight set to zero. Weights in the graphs below are written as inputs of
static shape; `build` makes random constants of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
from onnxpress.errors import InputError, UsageError
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.clean.name_sizes import NameSizes
from onnxpress.optimizers.precision.importance import Importance, InputNorms
from onnxpress.optimizers.precision.mask_weights import MaskWeights
from onnxpress.optimizers.precision.prune_feed_forward import PruneFeedForward, read_columns
from onnxpress.optimizers.precision.prune_heads import PruneHeads, read_heads
from onnxpress.optimizers.precision.removal import Score, Site, choose, prune, sites

FED = ("x", "memory", "mask", "past", "past_v", "ids")
SIZES = {"B": 2, "S": 5, "T": 3}


def build(text: str, seed: int = 0, opset: int = 23) -> ir.Model:
    """The graph, with what is not fed as constants."""
    rng = np.random.default_rng(seed)
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]>\ng {text}')
    for value in [v for v in model.graph.inputs if v.name not in FED]:
        model.graph.inputs.remove(value)
        shape = [int(d) for d in value.shape]
        array = rng.standard_normal(shape).astype(np.float32)
        if value.dtype == ir.DataType.INT64:
            array = np.array(TARGETS[value.name], np.int64)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    for node in model.graph:
        node.name = f"of_{node.outputs[0].name}"
    InferShapes()(model)
    NameSizes()(model)
    return model


TARGETS = {"split": [0, 0, 4, 4], "pair": [0, 0, 2, 4], "join": [0, 0, 16], "zero": [0], "one": [1]}


def feeds_of(model: ir.Model, seed: int = 1, **sizes: int) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(seed), {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else {**SIZES, **sizes}[str(d.value)] for d in value.shape]
        x = rng.standard_normal(shape).astype(np.float32)
        if value.dtype == ir.DataType.BOOL:
            x = x > -0.5
            x[..., 0] = True
        elif value.dtype == ir.DataType.INT64:
            x = rng.integers(0, 4, shape)
        found[str(value.name)] = x
    return found


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, feeds), strict=True))


def give_out(model: ir.Model, names: list[str]) -> ir.Model:
    """A copy that gives out these values too."""
    model = model.clone()
    values = {v.name: v for node in model.graph for v in node.outputs}
    model.graph.outputs.extend(values[n] for n in names if not values[n].is_graph_output())
    return model


def picture(model: ir.Model) -> str:
    """The nodes, and what shape each float constant has."""
    model = model.clone()
    for node in model.graph:
        node.name = ""
    lines = [
        re.sub(r"^\[\] ", "", line.strip())
        for line in ir.to_onnx_text(model, exclude_initializers=True).splitlines()
        if " = " in line
    ]
    weights = sorted(
        f"{name} {list(v.shape.numpy())}"
        for name, v in model.graph.initializers.items()
        if v.dtype == ir.DataType.FLOAT
    )
    return "\n".join([*lines, "; ".join(weights)])


def signature(model: ir.Model) -> list[tuple[object, ...]]:
    return [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


def all_sites(model: ir.Model) -> list[Site]:
    found = [s for read in (read_heads, read_columns) for _, s in sites(model, read)[0]]
    assert found
    return found


def scores_of(model: ir.Model, seed: int = 2) -> dict[str, Score]:
    """Random ones, without means."""
    rng = np.random.default_rng(seed)
    return {
        s.name: Score(rng.random(s.units), np.zeros(s.cut.slices[s.out, 1].size))
        for s in all_sites(model)
    }


def without(model: ir.Model, scores: Mapping[str, Score], fraction: float) -> ir.Model:
    """A copy in which the rows that use the pruned units are zero, and nothing else differs."""
    model = model.clone()
    for site in all_sites(model):
        units = scores[site.name].units
        multiple = 16 if site.what == "columns" and len(units) >= 16 else 1
        stay = -(-(len(units) - int(len(units) * fraction)) // multiple) * multiple
        gone = np.argsort(units)[: len(units) - stay]
        weight = site.out.inputs[1]
        array = weight.const_value.numpy().copy()
        array.reshape(len(units), -1, array.shape[1])[gone] = 0.0
        weight.const_value = ir.tensor(array, name=weight.name)
    return model


BERT = """(float[B,S,16] x, bool[B,1,S,S] mask, float[16,16] wq, float[16] bq, float[16,16] wk,
  float[16,16] wv, float[16] bv, float[16,16] wo, float[16] bo, float[16] scale,
  float[16,32] up, float[32] b1, float[32,16] down, float[16] b2) => (float[B,S,16] y) {
    q0 = MatMul(x, wq)
    q = Add(q0, bq)
    k = MatMul(x, wk)
    v0 = MatMul(x, wv)
    v = Add(bv, v0)
    c = Attention <q_num_heads: int = 4, kv_num_heads: int = 4>(q, k, v, mask)
    o = MatMul(c, wo)
    o1 = Add(o, bo)
    r = Add(o1, x)
    n = LayerNormalization <axis: int = -1>(r, scale)
    h0 = MatMul(n, up)
    h1 = Add(h0, b1)
    h = Gelu(h1)
    d = MatMul(h, down)
    d1 = Add(d, b2)
    y = Add(d1, n)
}"""
BERT_AFTER = """\
q0 = MatMul (x, wq)
q = Add (q0, bq)
k = MatMul (x, wk)
v0 = MatMul (x, wv)
v = Add (bv, v0)
c = Attention <q_num_heads: int = 2, kv_num_heads: int = 2> (q, k, v, mask)
o = MatMul (c, wo)
o1 = Add (o, bo)
r = Add (o1, x)
n = LayerNormalization <axis: int = -1> (r, scale)
h0 = MatMul (n, up)
h1 = Add (h0, b1)
h = Gelu (h1)
d = MatMul (h, down)
d1 = Add (d, b2)
y = Add (d1, n)
b1 [16]; b2 [16]; bo [16]; bq [8]; bv [8]; down [16, 16]; scale [16]; up [16, 16]; wk [16, 8]; \
wo [8, 16]; wq [16, 8]; wv [16, 8]"""

GPT2 = """(float[B,S,16] x, float[16,16] wq, float[16,16] wk, float[16,16] wv, float[16] bias,
  float[16,16] wo, float[16,24] up, float[24,16] down) => (float[B,S,16] y) {
    q0 = MatMul(x, wq)
    q = Add(q0, bias)
    k0 = MatMul(x, wk)
    k = Add(k0, bias)
    v = MatMul(x, wv)
    c = Attention <is_causal: int = 1, scale: float = 0.3, q_num_heads: int = 4,
                   kv_num_heads: int = 4>(q, k, v)
    o = MatMul(c, wo)
    r = Add(o, x)
    r1 = Add(r, bias)
    h0 = MatMul(r1, up)
    h = Gelu <approximate: string = "tanh">(h0)
    d = MatMul(h, down)
    y = Add(r, d)
}"""  # one bias of two projections and of the residual, as equal constants are merged
GPT2_AFTER = """\
q0 = MatMul (x, wq)
q = Add (q0, bias_kept)
k0 = MatMul (x, wk)
k = Add (k0, bias_kept)
v = MatMul (x, wv)
c = Attention <is_causal: int = 1, scale: float = 0.3, q_num_heads: int = 2, kv_num_heads: int = 2>\
 (q, k, v)
o = MatMul (c, wo)
r = Add (o, x)
r1 = Add (r, bias)
h0 = MatMul (r1, up)
h = Gelu <approximate: string = "tanh"> (h0)
d = MatMul (h, down)
y = Add (r, d)
bias [16]; bias_kept [8]; down [16, 16]; up [16, 16]; wk [16, 8]; wo [8, 16]; wq [16, 8]; \
wv [16, 8]"""

LLAMA = """(float[B,S,16] x, int64[B,S] ids, float[8,2] cos, float[8,2] sin, float[16,16] wq,
  float[16,8] wk, float[16,8] wv, int64[4] split, float[16,16] wo, float[16,32] gate,
  float[16,32] up, float[32] each, float[32,16] down) => (float[B,S,16] y, int64[1] batch) {
    q = MatMul(x, wq)
    q4 = Reshape(q, split)
    qt = Transpose <perm: ints = [0,2,1,3]>(q4)
    batch = Shape <start: int = 0, end: int = 1>(qt)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    qr = RotaryEmbedding <num_heads: int = 4>(q, cos, sin, ids)
    kr = RotaryEmbedding <num_heads: int = 2>(k, cos, sin, ids)
    c = Attention <is_causal: int = 1, q_num_heads: int = 4, kv_num_heads: int = 2>(qr, kr, v)
    o = MatMul(c, wo)
    r = Add(o, x)
    g = MatMul(r, gate)
    s = Sigmoid(g)
    a = Mul(g, s)
    u = MatMul(r, up)
    m = Mul(a, u)
    h = Div(m, each)
    d = MatMul(h, down)
    y = Add(d, r)
}"""
LLAMA_AFTER = """\
q = MatMul (x, wq)
q4 = Reshape (q, split)
qt = Transpose <perm: ints = [0, 2, 1, 3]> (q4)
batch = Shape <start: int = 0, end: int = 1> (qt)
k = MatMul (x, wk)
v = MatMul (x, wv)
qr = RotaryEmbedding <num_heads: int = 2> (q, cos, sin, ids)
kr = RotaryEmbedding <num_heads: int = 1> (k, cos, sin, ids)
c = Attention <is_causal: int = 1, q_num_heads: int = 2, kv_num_heads: int = 1> (qr, kr, v)
o = MatMul (c, wo)
r = Add (o, x)
g = MatMul (r, gate)
s = Sigmoid (g)
a = Mul (g, s)
u = MatMul (r, up)
m = Mul (a, u)
h = Div (m, each)
d = MatMul (h, down)
y = Add (d, r)
cos [8, 2]; down [16, 16]; each [16]; gate [16, 16]; sin [8, 2]; up [16, 16]; wk [16, 4]; \
wo [8, 16]; wq [16, 8]; wv [16, 4]"""

MULTI_QUERY = (
    LLAMA.replace("kv_num_heads: int = 2", "kv_num_heads: int = 1")
    .replace("RotaryEmbedding <num_heads: int = 2>", "RotaryEmbedding <num_heads: int = 1>")
    .replace("float[16,8] wk", "float[16,4] wk")
    .replace("float[16,8] wv", "float[16,4] wv")
)

QWEN = """(float[B,S,16] x, float[B,1,S,S] mask, int64[B,S] ids, float[8,2] cos, float[8,2] sin,
  float[16,16] wq, float[16,8] wk, float[16,8] wv, float[4] qn, int64[4] split, int64[4] pair,
  int64[3] join, float[16,16] wo) => (float[B,S,16] y) {
    q = MatMul(x, wq)
    q4 = Reshape(q, split)
    qn4 = RMSNormalization <axis: int = -1>(q4, qn)
    qt = Transpose <perm: ints = [0,2,1,3]>(qn4)
    qr = RotaryEmbedding(qt, cos, sin, ids)
    k = MatMul(x, wk)
    k4 = Reshape(k, pair)
    kt = Transpose <perm: ints = [0,2,1,3]>(k4)
    kr = RotaryEmbedding(kt, cos, sin, ids)
    v = MatMul(x, wv)
    v4 = Reshape(v, pair)
    vt = Transpose <perm: ints = [0,2,1,3]>(v4)
    c4 = Attention(qr, kr, vt, mask)
    ct = Transpose <perm: ints = [0,2,1,3]>(c4)
    c = Reshape(ct, join)
    o = MatMul(c, wo)
    y = Add(o, x)
}"""

T5 = """(float[B,S,16] x, int64[S,S] ids, bool[B,1,1,S] mask, float[4,4] table, float minus,
  int64[1] zero, float[16,16] wq, float[16,16] wk, float[16,16] wv, float[16,16] wo)
  => (float[B,S,16] y) {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    rows = Gather(table, ids)
    turned = Transpose <perm: ints = [2,0,1]>(rows)
    bias = Unsqueeze(turned, zero)
    both = Where(mask, bias, minus)
    c = Attention <scale: float = 1.0, q_num_heads: int = 4, kv_num_heads: int = 4>(q, k, v, both)
    o = MatMul(c, wo)
    y = Add(o, x)
}"""

STRETCHED = """(float[B,S,16] x, float[B,1,S,S] mask, float[4,1,1] four, float[16,16] wq,
  float[16,16] wk, float[16,16] wv, float[16,16] wo) => (float[B,S,16] y) {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    size = Shape(four)
    wide = Expand(mask, size)
    c = Attention <q_num_heads: int = 4, kv_num_heads: int = 4>(q, k, v, wide)
    o = MatMul(c, wo)
    y = Add(o, x)
}"""
TARGETS["four_heads"] = [1, 4, 1, 1]
STRETCHED = STRETCHED.replace("float[4,1,1] four", "int64[4] four_heads").replace(
    "    size = Shape(four)\n    wide = Expand(mask, size)", "    wide = Expand(mask, four_heads)"
)


@pytest.mark.parametrize(
    ("text", "after"),
    [
        pytest.param(BERT, BERT_AFTER, id="bert"),
        pytest.param(GPT2, GPT2_AFTER, id="gpt2"),
        pytest.param(LLAMA, LLAMA_AFTER, id="llama"),
        pytest.param(MULTI_QUERY, None, id="all heads share one key head"),
        pytest.param(QWEN, None, id="rank 4, a norm in each head"),
        pytest.param(T5, None, id="a bias for each head"),
        pytest.param(STRETCHED, None, id="a mask stretched over heads"),
    ],
)
def test_pruned_is_the_graph_with_those_rows_zero(text: str, after: str | None) -> None:
    model = build(text)
    scores, before = scores_of(model), signature(model)
    want, whole, pruned = without(model, scores, 0.5), picture(model), model.clone()
    passes = [PruneHeads(0.5, scores), PruneFeedForward(0.5, scores)]

    outcomes = [p(pruned) for p in passes]

    assert sum(o.hits for o in outcomes) == len(scores)
    assert not any(o.notes for o in outcomes)
    assert picture(model) == whole, "the graph that was copied has changed"
    assert signature(pruned) == before
    common.CheckerPass(full_check=True)(pruned)
    for size in (5, 1):
        feeds = feeds_of(model, S=size)
        for name, array in run(want, feeds).items():
            np.testing.assert_allclose(run(pruned, feeds)[name], array, rtol=1e-5, atol=1e-5)
    assert np.abs(run(pruned, feeds_of(model))["y"] - run(model, feeds_of(model))["y"]).max() > 0.1

    text_after = picture(pruned)
    if after is not None:
        assert text_after == after
    for p, first in zip(passes, outcomes, strict=True):  # twice is not half of a half
        second = p(pruned)
        assert not second.modified
        assert len(second.notes) == first.hits
        assert all("it was pruned already" in note for note in second.notes)
    assert picture(pruned) == text_after


def test_a_bias_for_each_head_is_gathered_and_a_stretched_mask_is_not() -> None:
    for text, gathers, mask in ((T5, 2, "both_kept"), (STRETCHED, 0, "mask")):
        model = build(text)
        PruneHeads(0.5, scores_of(model))(model)
        ops = [node.op_type for node in model.graph]
        attention = next(n for n in model.graph if n.op_type == "Attention")
        assert ops.count("Gather") == gathers
        assert attention.inputs[3].name == mask
        assert "Expand" not in ops


def measured(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> Importance:
    importance = Importance(model)
    probe = give_out(model, importance.taps)
    for batch in feeds:
        importance.see(run(probe, batch))
    return importance


@pytest.mark.parametrize("bias", [True, False])
def test_a_unit_that_is_constant_goes_without_a_trace(bias: bool) -> None:
    text = BERT
    if not bias:  # then a bias is added, before what reads the product
        text = text.replace("o1 = Add(o, bo)", "o1 = Identity(o)").replace(
            "d1 = Add(d, b2)", "d1 = Identity(d)"
        )
    model = build(text)
    weights = model.graph.initializers
    for name, still in (("wv", slice(4, 8)), ("up", slice(8, 24))):
        array = weights[name].const_value.numpy().copy()
        array[:, still] = 0.0  # the second head gives its bias, and half of the columns theirs
        weights[name].const_value = ir.tensor(array, name=name)
    scores = measured(model, [feeds_of(model, seed=s) for s in (3, 4)]).scores()
    assert scores["c"].units.argmin() == 1
    assert scores["c"].units[1] < 1e-6 < scores["c"].units[0]
    assert set(np.argsort(scores["h"].units)[:16]) == set(range(8, 24))

    pruned = model.clone()
    assert PruneHeads(0.25, scores)(pruned).hits == 1
    assert PruneFeedForward(0.5, scores)(pruned).hits == 1
    assert pruned.graph.initializers["wo"].shape == [12, 16]
    ops = [node.op_type for node in pruned.graph]
    assert ops.count("Add") - sum(n.op_type == "Add" for n in model.graph) == (0 if bias else 2)
    feeds = feeds_of(model, seed=9, B=3, S=7)
    np.testing.assert_allclose(run(pruned, feeds)["y"], run(model, feeds)["y"], atol=1e-5)
    common.CheckerPass(full_check=True)(pruned)


ALONE = """(float[B,S,8] x, float[8,16] up, float[16,8] down) => (float[B,S,8] y) {
    u = MatMul(x, up)
    h = Tanh(u)
    y = MatMul(h, down)
}"""


def test_the_score_is_what_is_lost() -> None:
    model = build(ALONE)
    feeds = [feeds_of(model, seed=s, S=s) for s in (3, 4, 6)]
    score = measured(model, feeds).scores()["h"]
    for column in (0, 7):
        only = Score(np.where(np.arange(16) == column, 0.0, 1.0), score.mean)
        pruned = model.clone()
        gone = choose([only.units], 1 / 16)[0]
        assert column not in gone
        site = all_sites(pruned)[0]
        assert PruneFeedForward(1 / 16, {"h": only})(pruned).hits == 0, "15 is no multiple of 16"
        prune(pruned, read_columns, {"h": only}, 1 / 16, scope="layer")
        assert site.name == "h"
        apart = [run(pruned, f)["y"] - run(model, f)["y"] for f in feeds]
        loss = np.concatenate([a.reshape(-1, 8) for a in apart])
        np.testing.assert_allclose(loss.mean(0), 0.0, atol=1e-5)  # the mean is made up for
        np.testing.assert_allclose(np.sqrt((loss**2).sum(1).mean()), score.units[column], rtol=1e-4)
        assert [v.name for v in pruned.graph.outputs] == ["y"]  # though a bias comes after it now


def test_scores_of_heads_by_batches_and_masks() -> None:
    rng = np.random.default_rng(0)
    model = build(LLAMA)
    importance = Importance(model)
    assert importance.taps == ["c", "h"]
    c, h = rng.normal(100.0, 1.0, (6, 5, 16)), rng.normal(3.0, 1.0, (6, 5, 32))
    mask = rng.random((6, 5)) > 0.3
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        importance.see({"c": c[rows], "h": h[rows]}, mask[rows])
    scores = importance.scores()
    for name, array, weight in (("c", c, "wo"), ("h", h, "down")):
        w = model.graph.initializers[weight].const_value.numpy().astype(np.float64)
        seen, score = array[mask], scores[name]
        np.testing.assert_allclose(score.mean, seen.mean(0), rtol=1e-12)
        units = len(score.units)
        apart = (seen - seen.mean(0)).reshape(len(seen), units, -1)
        given = np.einsum("nuw,uwo->nuo", apart, w.reshape(units, -1, 16))
        want = np.sqrt((given**2).sum(2).mean(0))
        np.testing.assert_allclose(score.units, want, rtol=1e-5)
    assert len(scores["c"].units) == 2, "two groups of two heads"


def test_masks_by_tap_and_bad_ones() -> None:
    importance = Importance(build(BERT))
    arrays = {"c": np.ones((2, 3, 16)), "h": np.ones((2, 4, 32))}
    with pytest.raises(InputError, match=r"shape \(2, 3\) does not fit 'h'"):
        importance.see(arrays, np.ones((2, 3)))
    with pytest.raises(InputError, match="no value 'h'"):
        importance.see({"c": arrays["c"]})
    with pytest.raises(UsageError, match="no calibration data was seen for 'c'"):
        Importance(build(BERT)).scores()
    importance = Importance(build(BERT))
    importance.see(arrays, {"c": np.zeros((2, 3))})
    with pytest.raises(UsageError, match="for 'c'"):
        importance.scores()


def bert(*changes: tuple[str, str]) -> str:
    text = BERT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


CACHE = bert(
    ("mask)", "mask, past, past_v)"),
    ("bool[B,1,S,S] mask", "bool[B,1,S,P] mask, float[B,4,T,4] past, float[B,4,T,4] past_v"),
    ("c = Attention", "c, present, present_v = Attention"),
    ("(float[B,S,16] y)", "(float[B,S,16] y, float[B,4,U,4] present, float[B,4,U,4] present_v)"),
)
OUTSIDE = """(float[B,S,16] x, float[B,4,T,4] past, float[16,16] wq, float[16,16] wk,
  float[16,16] wv, int64[4] split, int64[3] join, float[16,16] wo) => (float[B,S,16] y) {
    q = MatMul(x, wq)
    q4 = Reshape(q, split)
    qt = Transpose <perm: ints = [0,2,1,3]>(q4)
    k = MatMul(x, wk)
    k4 = Reshape(k, split)
    kt = Transpose <perm: ints = [0,2,1,3]>(k4)
    all = Concat <axis: int = 2>(past, kt)
    v = MatMul(x, wv)
    v4 = Reshape(v, split)
    vt = Transpose <perm: ints = [0,2,1,3]>(v4)
    more = Concat <axis: int = 2>(past, vt)
    c4 = Attention(qt, all, more)
    ct = Transpose <perm: ints = [0,2,1,3]>(c4)
    c = Reshape(ct, join)
    y = MatMul(c, wo)
}"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CACHE, "it reads a cache of past keys and values"),
        (OUTSIDE, "which joins them with input 'past' of the graph"),
        (bert(("k = MatMul(x, wk)", "k = MatMul(x, wq)")), "weight 'wq' is shared, 2 nodes read"),
        (bert(("y = Add(d1, n)", "d2 = Add(d1, n)  y = MatMul(d2, wo)")), "weight 'wo' is shared"),
        (
            bert(("(float[B,S,16] y)", "(float[B,S,16] y, float[B,S,16] k)")),
            "'k' is an output of the graph",
        ),
        (
            bert(("(float[B,S,16] y)", "(float[B,S,16] y, float[16,16] wk)")),
            "weight 'wk' is an output of the graph",
        ),
        (
            bert(("y = Add(d1, n)", "y = Add(d1, v)")),
            "'y' is an output of the graph",
        ),
        (
            bert(("bool[B,1,S,S] mask", "bool[B,H,S,S] mask")),
            "axis 1 of mask 'mask' is H; there are 4 heads",
        ),
        (
            bert(("o = MatMul(c, wo)", "c1 = Softmax(c)  o = MatMul(c1, wo)")),
            "channels cannot be followed through Softmax",
        ),
        (
            bert(("o = MatMul(c, wo)", "c1 = LayerNormalization(c, scale)  o = MatMul(c1, wo)")),
            "is over the channels themselves",
        ),
        (
            bert(("y = Add(d1, n)", "e = MatMul(c, bo2)  d2 = Add(d1, n)  y = Add(d2, e)"))
            .replace("float[16] b2", "float[16] b2, float[16,16] bo2"),
            "2 MatMuls read its output",
        ),
        (
            bert(("k = MatMul(x, wk)", "k0 = MatMul(x, wk)  z = Shape(k0)  k = Reshape(k0, z)")),
            "the target of Reshape",
        ),
    ],
)  # fmt: skip
def test_heads_that_stay(text: str, reason: str) -> None:
    model = build(text)
    scores = {"c": Score(np.arange(4.0), np.zeros(16))}
    untouched = picture(model)
    outcome = PruneHeads(0.5, scores)(model)
    assert outcome.hits == 0
    assert not outcome.modified
    assert reason in outcome.notes[0]
    assert outcome.notes[0].startswith("Attention '")
    assert picture(model) == untouched


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            bert(("float[32,16] down", "float[32,8] down"), ("d1 = Add(d, b2)", "y = Identity(d)"))
            .replace("    y = Add(d1, n)\n", "").replace("[B,S,16] y", "[B,S,8] y"),
            "comes from 16 channels and this goes to 8",
        ),
        (
            bert(("(float[B,S,16] y)", "(float[B,S,16] y, float[B,S,32] h1)")),
            "'h1' is an output of the graph",
        ),
        (
            bert(("y = Add(d1, n)", "e = MatMul(h, down2)  d2 = Add(d1, n)  y = Add(d2, e)"))
            .replace("float[16] b2", "float[16] b2, float[32,16] down2"),
            "2 MatMuls read its columns",
        ),
        (
            bert(("h = Gelu(h1)", "h2 = Gelu(h1)  h3 = Softmax(h1)  h = Mul(h2, h3)")),
            "channels cannot be followed through Softmax",
        ),
        (
            bert(("h = Gelu(h1)", "h = Gelu(h1)  z = Shape(h)"), ("16] y)", "16] y, int64[3] z)")),
            "Shape 'of_z' reads how many channels 'h' has",
        ),
        (
            bert(("y = Add(d1, n)", "e = MatMul(d1, up)  f = Relu(e)  g = MatMul(f, down)"
                  "  y = Add(g, n)")),
            "weight 'down' is shared, 2 nodes read it",
        ),
    ],
)  # fmt: skip
def test_columns_that_stay(text: str, reason: str) -> None:
    model = build(text)
    scores = {name: Score(np.arange(32.0), np.zeros(32)) for name in ("h", "f")}
    untouched = picture(model)
    outcome = PruneFeedForward(0.5, scores)(model)
    assert outcome.hits == 0
    assert not outcome.modified
    assert reason in outcome.notes[0]
    assert outcome.notes[0].startswith("MatMul '")
    assert picture(model) == untouched


def test_what_the_scores_must_be() -> None:
    model, fine = build(BERT), Score(np.arange(4.0), np.zeros(16))
    for scores, fraction, reason in (
        ({}, 0.5, "there are no scores for 'c'"),
        (
            {"c": Score(np.arange(3.0), np.zeros(12))},
            0.5,
            "there are 4 and 16: it was pruned already",
        ),
        (
            {"c": Score(np.arange(4.0), np.zeros(12))},
            0.5,
            "4 heads and 12 channels, and there are 4",
        ),
        ({"c": Score(np.array([0, 1, np.nan, 3]), np.zeros(16))}, 0.5, "are not finite"),
        ({"c": fine}, 0.2, "all 4 heads stay"),
    ):
        outcome = PruneHeads(fraction, scores)(model)
        assert (outcome.hits, outcome.modified) == (0, False)
        assert reason in outcome.notes[0]
    assert not PruneHeads(0.0, {"c": fine})(model).notes
    for fraction in (-0.1, 1.0):
        with pytest.raises(UsageError, match="no fraction"):
            PruneHeads(fraction, {})
    newer = build(BERT)
    newer.opset_imports[""] = 26
    assert "the opset is 26" in PruneHeads(0.5, {"c": fine})(newer).notes[0]


def test_which_units_stay() -> None:
    a, b = np.array([4.0, 1.0, 3.0, 2.0]), np.array([0.04, 0.01, 0.039, 0.038])
    assert [k.tolist() for k in choose([a, b], 0.5)] == [[0, 2], [0, 2]]
    assert [k.tolist() for k in choose([a], 0.999)] == [[0]]
    ranked = choose([a, b], 0.25, scope="global")  # only b has two far below the others
    assert [k.tolist() for k in ranked] == [[0, 2, 3], [0, 2, 3]]
    assert [len(k) for k in choose([a, np.ones(4)], 0.6, scope="global")] == [2, 2]
    assert [len(k) for k in choose([np.arange(100.0)], 0.25, multiple=16)] == [80]
    assert [len(k) for k in choose([np.arange(10.0)], 0.25, multiple=16)] == [8]
    assert choose([], 0.5, scope="global") == []


def test_masks_of_two_in_four() -> None:
    model, twin = build(BERT), build(BERT)
    outcome = MaskWeights(pattern="2:4")(model)
    assert outcome.hits == 6
    for name, value in model.graph.initializers.items():
        old = twin.graph.initializers[name].const_value.numpy()
        new = value.const_value.numpy()
        if old.ndim < 2:
            assert (old == new).all()
            continue
        groups = new.reshape(-1, 4, new.shape[1])  # along K, the axis of the sum
        assert ((groups == 0).sum(1) == 2).all()
        assert (new[new != 0] == old[new != 0]).all()
        before = np.sort(np.abs(old.reshape(groups.shape)), axis=1)
        np.testing.assert_array_equal(np.sort(np.abs(groups), axis=1)[:, 2:], before[:, 2:])
    again = MaskWeights(pattern="2:4")(model)
    assert (again.hits, again.modified) == (0, False)
    assert signature(model) == signature(twin)
    run(model, feeds_of(model))


def test_masks_by_activations() -> None:
    model = build(ALONE)
    norms = InputNorms(model)
    assert norms.taps == ["x", "h"]
    arrays = {"x": np.full((2, 3, 8), 2.0), "h": np.ones((2, 3, 16))}
    arrays["x"][..., 3] = 1e4  # one loud channel: its weights are the last to go
    norms.see(arrays)
    norms.see(arrays, np.ones((2, 3)))
    sizes = norms.norms()
    np.testing.assert_allclose(sizes["x"], [2, 2, 2, 1e4, 2, 2, 2, 2])
    old = model.graph.initializers["up"].const_value.numpy()
    plain = model.clone()
    assert MaskWeights(0.75, norms=sizes)(model).hits == 2
    up = model.graph.initializers["up"].const_value.numpy()
    assert (up[3] == old[3]).all()
    assert ((up == 0).sum(0) == 6).all()  # of 8, for each output
    MaskWeights(0.75)(plain)
    assert (plain.graph.initializers["up"].const_value.numpy()[3] == 0).any()
    assert not MaskWeights(0.75, norms=sizes)(model).modified


def test_weights_that_are_not_masked() -> None:
    text = """(float[B,S,6] x, float[6,8] a, float[8,8] w, float[8] b) => (float[B,S,8] y) {
        h = MatMul(x, a)
        i = MatMul(h, w)
        y = MatMul(i, w)
    }"""
    model = build(text)
    untouched = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}
    outcome = MaskWeights(pattern="2:4")(model)
    assert outcome.hits == 0
    assert ["weight 'w' is shared" in note for note in outcome.notes] == [True, True, False]
    assert "K is 6, which 4 does not divide" in outcome.notes[2]
    for name, array in untouched.items():
        assert (model.graph.initializers[name].const_value.numpy() == array).all()
    assert "no finite norms of its 6 channels" in MaskWeights(norms={})(model).notes[2]
    with pytest.raises(UsageError, match="has a sparsity"):
        MaskWeights(0.6, pattern="2:4")
