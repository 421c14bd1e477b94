"""Counterexamples that a reviewer found by hand in clean/ and lower/, one small test for each."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
from onnxpress.optimizers.clean.fold_slices_of_weights import FoldSlicesOfWeights
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.clean.remove_nan_guards import RemoveNanGuards
from onnxpress.optimizers.clean.remove_no_ops import RemoveNoOps
from onnxpress.optimizers.clean.split_packed import SplitPacked
from onnxpress.optimizers.lower.expand_attention_mask import ExpandAttentionMask
from onnxpress.optimizers.lower.fuse_embedding import FuseEmbedding
from onnxpress.optimizers.lower.pack_attention import PackAttention
from onnxpress.optimizers.lower.soften_attention_mask import SoftenAttentionMask
from onnxpress.optimizers.outcome import Outcome

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4)).astype(np.float32)
LOW = "-3.4028234663852886e38"
WEIGHTS = ", ".join(
    f"float[4,4] {name} = {{{','.join(str(round(n, 2)) for n in RNG.standard_normal(16))}}}"
    for name in ("wq", "wk", "wv")
)


def graph(text: str, opset: int = 23) -> ir.Model:
    model = ir.from_onnx_text(HEAD.replace("23", str(opset)) + text)
    InferShapes()(model)
    return model


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, ["CPUExecutionProvider"]).run(None, feeds)


def agrees(
    model: ir.Model, rewrite: ir.passes.InPlacePass, feeds: dict[str, np.ndarray]
) -> Outcome:
    """What `rewrite` returns, after a look that the numbers, shapes and names are those before."""
    want = run(model, feeds)
    outcome = rewrite(model)
    common.RemoveUnusedNodesPass()(model)
    common.CheckerPass(full_check=True)(model)
    for a, b in zip(run(model, feeds), want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert rewrite(model).hits == 0
    return outcome


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)]


# ---- split_packed --------------------------------------------------------------------------------


def packed(branch: str, last: str) -> str:
    return f"""() => (float[p,q] {branch}_y) {{
        {branch}_r = Reshape(x, s)  {branch}_a = Transpose<perm=[1,0,2]>({branch}_r)
        {branch}_b = Gather<axis=0>({branch}_a, i)  {branch}_y = {last}({branch}_b) }}"""


@pytest.mark.parametrize("c", [True, False])
def test_each_branch_of_an_if_gets_a_split_of_its_own(c):
    model = graph(
        f"""g (bool c, float[n,24] x) => (float[p,q] y)
        <int64[3] s = {{0,3,8}}, int64 i = {{0}}> {{
        y = If(c)
        <then_branch = t {packed("t", "Neg")}, else_branch = e {packed("e", "Relu")}> }}"""
    )
    x = RNG.standard_normal((5, 24)).astype(np.float32)
    assert agrees(model, SplitPacked(), {"c": np.array(c), "x": x}).hits == 2
    assert ops(model).count("Split") == 2


def test_split_packed_leaves_old_opsets_alone():
    model = graph(
        """g (float[n,24] x) => (float[n,8] y) <int64[3] s = {0,3,8}, int64 i = {0}> {
        r = Reshape(x, s)  a = Transpose<perm=[1,0,2]>(r)
        b = Gather<axis=0>(a, i)  y = Neg(b) }""",
        opset=12,
    )
    x = RNG.standard_normal((5, 24)).astype(np.float32)
    outcome = agrees(model, SplitPacked(), {"x": x})
    assert (outcome.hits, outcome.modified) == (0, False)
    assert "the opset is 12" in outcome.notes[0]


# ---- remove_no_ops -------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
def test_a_slice_of_an_axis_that_is_computed_stays(axis):
    model = graph(
        """g (float[4,8] x, int64[1] ax) => (float[p,q] y) <int64[1] o = {0}, int64[1] e = {4}> {
        s = Slice(x, o, e, ax)  y = Neg(s) }"""
    )
    feeds = {"x": RNG.standard_normal((4, 8)).astype(np.float32), "ax": np.array([axis])}
    assert agrees(model, RemoveNoOps(), feeds).hits == 0


def test_merged_axes_take_no_name_that_is_there():
    model = graph(
        """g (float[2,3] x) => (float[1,2,3,1] y) <int64[1] zero = {0}, int64[1] last = {-1}> {
        b_axes = Relu(x)  a = Unsqueeze(b_axes, zero)  b = Unsqueeze(a, last)  y = Neg(b) }"""
    )
    assert agrees(model, RemoveNoOps(), {"x": X[0, :2, :3]}).hits == 1


# ---- fold_slices_of_weights ----------------------------------------------------------------------


def test_views_of_weights_take_no_name_that_is_there():
    model = graph(
        """g (float[4,2] x) => (float[2,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}, int64[1] o = {0},
        int64[1] e = {2}> {
        w_a = Relu(x)  a = Slice(w, o, e)  b = Slice(w_a, o, e)  y = Add(a, b) }"""
    )
    feeds = {"x": RNG.standard_normal((4, 2)).astype(np.float32)}
    assert agrees(model, FoldSlicesOfWeights(), feeds).hits == 1


def test_one_number_of_a_weight_keeps_rank_0():
    model = graph(
        """g (float[2,3] x) => (float[2,3] y, float z) <float[3] w = {1, 2, 3}, int64 i = {1}> {
        a = Gather(w, i)  y = Mul(x, a)  z = Neg(a) }"""
    )
    assert agrees(model, FoldSlicesOfWeights(), {"x": X[0, :2, :3]}).hits == 1


# ---- remove_nan_guards ---------------------------------------------------------------------------

GUARD = "p = Softmax(s)  n = IsNaN(p)  w = Where(n, zero, p)  y = Relu(w)"


def test_the_third_input_of_gemm_may_be_a_mask():
    model = graph(
        f"""g (float[2,3] q, float[3,2] k, float[2,2] m) => (float[2,2] y) <float zero = {{0}}> {{
        s = Gemm(q, k, m)  {GUARD} }}"""
    )
    masked = np.array([[-np.inf, -np.inf], [0, 0]], np.float32)
    feeds = {"q": X[0, :2, :3], "k": X[1, :3, :2], "m": masked}
    outcome = agrees(model, RemoveNanGuards(), feeds)
    assert outcome.hits == 0
    assert "may be infinite" in outcome.notes[0]


def test_a_bias_of_gemm_is_a_mask_of_known_numbers():
    model = graph(
        f"""g (float[2,3] q, float[3,2] k) => (float[2,2] y)
        <float zero = {{0}}, float[2] m = {{-9, 2}}> {{ s = Gemm<beta=-0.5>(q, k, m)  {GUARD} }}"""
    )
    assert agrees(model, RemoveNanGuards(), {"q": X[0, :2, :3], "k": X[1, :3, :2]}).hits == 1


def test_a_number_over_the_scores_is_no_scaling():
    model = graph(
        f"""g (float[2,3] q, float[3,2] k) => (float[2,2] y)
        <float zero = {{0}}, float one = {{1}}> {{ m = MatMul(q, k)  s = Div(one, m)  {GUARD} }}"""
    )
    feeds = {"q": np.zeros((2, 3), np.float32), "k": X[1, :3, :2]}
    assert agrees(model, RemoveNanGuards(), feeds).hits == 0


def test_a_zero_that_raises_the_rank_is_no_guard():
    model = graph(
        f"""g (float[2,3] q, float[3,2] k) => (float[1,1,1,2,2] y)
        <float[1,1,1,1,1] zero = {{0}}> {{ s = MatMul(q, k)  {GUARD} }}"""
    )
    assert agrees(model, RemoveNanGuards(), {"q": X[0, :2, :3], "k": X[1, :3, :2]}).hits == 0


# ---- pack_attention ------------------------------------------------------------------------------

PROJECT = "mq = MatMul(x, wq)  q = Add(mq, b)  k = MatMul(x, wk)  v = MatMul(x, wv)"
ATTEND = "Attention<q_num_heads=2, kv_num_heads=2>(q, k, v)"


def test_packed_weights_take_no_name_that_is_there():
    model = graph(
        f"""g (float[2,3,4] x) => (float[2,3,4] y) <{WEIGHTS}, float[4] b = {{1,2,3,4}},
        float[4] wq_qkv = {{1,1,2,2}}, float[4] wq_qkv_bias = {{3,2,2,1}}> {{
        {PROJECT}  a = {ATTEND}  c = Add(a, wq_qkv)  y = Add(c, wq_qkv_bias) }}"""
    )
    assert agrees(model, PackAttention(), {"x": X}).hits == 1


def test_a_bias_of_one_number_is_not_packed():
    model = graph(
        f"""g (float[2,3,4] x) => (float[2,3,4] y) <{WEIGHTS}, float[1] b = {{2}}> {{
        {PROJECT}  y = {ATTEND} }}"""
    )
    assert agrees(model, PackAttention(), {"x": X}).hits == 0


def test_a_bias_that_comes_in_is_not_taken_for_zeros():
    model = graph(
        f"""g (float[2,3,4] x, float[4] b) => (float[2,3,4] y) <{WEIGHTS}> {{
        {PROJECT}  y = {ATTEND} }}"""
    )
    bias = model.graph.inputs[1]  # with a default, as old files have it
    bias.const_value = ir.tensor(np.zeros(4, np.float32), name="b")
    model.graph.register_initializer(bias)
    assert agrees(model, PackAttention(), {"x": X, "b": np.arange(4, dtype=np.float32)}).hits == 0


# ---- soften_attention_mask, expand_attention_mask ------------------------------------------------

Q = RNG.standard_normal((2, 2, 3, 4)).astype(np.float32)
KEEP = np.array([[True, True, False]] * 3).reshape(1, 1, 3, 3)


def test_softened_masks_take_no_name_that_is_there():
    model = graph(
        f"""g (float[2,2,3,4] x, bool[1,1,3,3] keep) => (float[2,2,3,4] y)
        <float zero = {{0}}, float low = {{{LOW}}}, float m_soft_value = {{3}}> {{
        q = Add(x, m_soft_value)  m = Where(keep, zero, low)  y = Attention(q, q, q, m) }}"""
    )
    assert agrees(model, SoftenAttentionMask(), {"x": Q, "keep": KEEP}).hits == 1


def test_a_softened_mask_keeps_its_rank():
    model = graph(
        f"""g (float[2,2,3,4] q, bool[3,3] keep) => (float[2,2,3,4] y)
        <float zero = {{0}}, float[1,1,1,1] low = {{{LOW}}}> {{
        m = Where(keep, zero, low)  y = Attention(q, q, q, m) }}"""
    )
    assert agrees(model, SoftenAttentionMask(), {"q": Q, "keep": KEEP[0, 0]}).hits == 1
    mask = model.graph.outputs[0].producer().inputs[3]
    assert mask.shape == ir.Shape([1, 1, 3, 3])
    mask.shape = None
    InferShapes()(model)
    assert mask.shape == ir.Shape([1, 1, 3, 3])


@pytest.mark.parametrize("c", [True, False])
def test_each_branch_of_an_if_gets_a_soft_mask_of_its_own(c):
    branches = ", ".join(
        f"{b}_branch = {b} () => (float[2,2,3,4] {b}_y) {{ {b}_y = Attention(q, q, q, m) }}"
        for b in ("then", "else")
    )
    model = graph(
        f"""g (bool c, float[2,2,3,4] q, bool[1,1,3,3] keep) => (float[2,2,3,4] y)
        <float zero = {{0}}, float low = {{{LOW}}}> {{
        m = Where(keep, zero, low)  y = If(c) <{branches}> }}"""
    )
    feeds = {"c": np.array(c), "q": Q, "keep": KEEP}
    assert agrees(model, SoftenAttentionMask(), feeds).hits == 2


def test_the_target_of_an_expand_is_no_input_that_a_caller_sets():
    model = graph(
        """g (float[2,2,3,4] q, float[2,1,1,3] m, int64[2] s) => (float[2,2,3,4] y, int64[2] t) {
        y = Attention(q, q, q, m)  t = Neg(s) }"""
    )
    given = model.graph.inputs[2]
    given.const_value = ir.tensor(np.array([3, 1]), name="s")
    model.graph.register_initializer(given)
    assert ExpandAttentionMask()(model).hits == 1
    feeds = {"q": Q, "m": np.zeros((2, 1, 1, 3), np.float32), "s": np.array([7, 7])}
    np.testing.assert_array_equal(run(model, feeds)[1], [-7, -7])


# ---- fuse_embedding ------------------------------------------------------------------------------

EMBED = """<float[5,4] words = {1,2,3,4,5,6,7,8,9,0,1,2,3,4,5,6,7,8,9,1},
    float[2,4] types = {1,0,1,0,1,2,3,1}, float[1,3,4] rows = {1,2,3,4,5,6,7,8,9,0,1,2},
    float[4] a = {1,2,3,4}, float[4] b = {4,3,2,1}, int64[1] zero = {0}, int64[1] one = {1}> {
    w = Gather(words, ids)  t = Gather(types, seg)  l = Shape<start=1, end=2>(ids)
    p = Slice(rows, zero, l, one)  u = Add(w, t)  s = Add(u, p)"""
IDS = {"ids": np.array([[1, 2], [3, 0]]), "seg": np.array([[0, 1], [1, 1]])}


@pytest.mark.parametrize(
    ("output", "rest"),
    [
        ("float[1,3,4] rows", "y = LayerNormalization(s, a, b)"),
        ("float[1,seq,4] z", "y = LayerNormalization(s, a, b)  z = Neg(p)"),
        ("float[batch,seq,1] z", "y, z = LayerNormalization(s, a, b)"),
    ],
    ids=["the table is an output", "another reads the positions", "another reads the mean"],
)
def test_an_embedding_of_which_others_read_a_part_stays(output, rest):
    model = graph(
        f"g (int64[batch,seq] ids, int64[batch,seq] seg) => (float[batch,seq,4] y, {output}) "
        f"{EMBED}  {rest} }}"
    )
    assert agrees(model, FuseEmbedding(), IDS).hits == 0
