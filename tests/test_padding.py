"""Masks that pad on the right, as numbers of tokens: the form that keeps flash attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxpress
import onnxruntime as rt
import pytest
import transformers
from onnxpress import errors
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.lower.pack_attention import PackAttention, padded_right
from onnxpress.press import verify
from onnxpress.runtime.signature import check_padding

from .test_huggingface import TINY, save

BODY = """
mq = MatMul(x, wq)  q = Add(mq, b)  k = MatMul(x, wk)  v = MatMul(x, wv)
{mask}
y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v, m)
"""
MASKS = {
    "where of the view": "u = Unsqueeze(seen, axes) w = Where(u, zero, low) m = Expand(w, rows)",
    "view of the where": "w = Where(seen, zero, low) u = Unsqueeze(w, axes) m = Expand(u, rows)",
    "bools": "u = Unsqueeze(seen, axes) m = Expand(u, rows)",
}


def graph(mask: str) -> ir.Model:
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> str:
        numbers = ",".join(f"{n:.4f}" for n in rng.standard_normal(shape).reshape(-1))
        return f"float[{','.join(map(str, shape))}] {{}} = {{{{{numbers}}}}}"

    weights = ", ".join(weight(8, 8).format(n) for n in ("wq", "wk", "wv"))
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 23]>
g (float[batch,5,8] x, int64[batch,5] attention_mask) => (float[batch,5,8] y)
<{weights}, {weight(8).format("b")}, float zero = {{0}},
 float low = {{-3.4028234663852886e+38}}, int64[2] axes = {{1,2}}, int64[2] rows = {{5,1}}>
{{ seen = Cast<to=9>(attention_mask) {BODY.format(mask=mask)} }}"""
    )
    InferShapes()(model)
    return model


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = rt.SessionOptions()
    options.graph_optimization_level = rt.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    session = rt.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("form", MASKS)
def test_lengths_see_what_the_mask_lets_see(form):
    before, after = graph(MASKS[form]), graph(MASKS[form])
    done = PackAttention(right=True)(after)
    assert done.hits == 1
    assert [n.op_type for n in after.graph if n.domain == "com.microsoft"] == ["Attention"]
    assert padded_right(after) == ("attention_mask",)
    assert padded_right(before) == ()
    rng = np.random.default_rng(1)
    for lengths in ([5, 5], [5, 1], [3], [1, 2, 4, 5]):
        mask = (np.arange(5) < np.array(lengths)[:, None]).astype(np.int64)
        x = rng.standard_normal((len(lengths), 5, 8)).astype(np.float32)
        feeds = {"x": x, "attention_mask": mask}
        np.testing.assert_allclose(run(after, feeds), run(before, feeds), atol=2e-6)
    assert not PackAttention(right=True)(after).hits


def test_a_mask_that_may_pad_anywhere_keeps_its_node():
    model = graph(MASKS["bools"])
    done = PackAttention()(model)
    assert not done.hits
    assert "may pad anywhere" in done.notes[0]


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[1, 1, 1], [0, 1, 1]], "row 1 .* has a token behind its padding"),
        ([[1, 0, 1]], "row 0 .* has a token behind its padding"),
        ([[1, 1, 0], [1, 0, 0], [0, 0, 0]], "row 2 .* has no token"),
    ],
)
def test_other_padding_is_refused(mask, said):
    with pytest.raises(errors.InputError, match=said) as e:
        check_padding("attention_mask", np.array(mask))
    assert "padding_side='right'" in str(e.value.hint)


def test_right_padding_is_fine():
    check_padding("attention_mask", np.array([[1, 1, 1], [1, 0, 0]]))
    check_padding("attention_mask", np.ones((0, 3), np.int64))


def test_an_artifact_says_so_and_its_session_looks(tmp_path):
    source = str(save(tmp_path / "m", transformers.BertModel(transformers.BertConfig(**TINY))))
    out = tmp_path / "out"
    manifest = onnxpress.press(source, out, target="cuda", measure=False)
    assert manifest.runtime["padding"] == {"attention_mask": "right"}
    assert manifest.ops["com.microsoft::Attention"] == 2
    assert not any("left" in p["point"] for p in (manifest.parity or {})["points"])
    task = onnxpress.load(out, provider="cpu")
    both = task.embed(["good a bad", "a"])
    np.testing.assert_allclose(both[1], task.embed(["a"])[0], atol=1e-5)
    session = task.session
    feeds = {s.name: np.ones((1, 3), np.int64) for s in session.inputs}
    session.run(feeds)
    feeds["attention_mask"] = np.array([[0, 1, 1]])
    with pytest.raises(errors.InputError, match="behind its padding"):
        session.run(feeds)
    assert all(f.passed for f in verify(out, source=source))


@pytest.mark.parametrize(
    "seen",
    [
        "one = Cast<to=9>(attention_mask) seen = Not(one)",
        "one = Cast<to=9>(attention_mask) seen = And(one, one)",
        "seen = Equal(attention_mask, pad)",
    ],
)
def test_what_is_more_than_not_0_keeps_its_node(seen):
    """The session looks at what is 0 in an input: padding that is anything else stays a mask."""
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
g (float[batch,5,4] x, int64[batch,5] attention_mask) => (float[batch,5,4] y)
<float[4,4] wq = {{1,2,3,4,5,6,7,8,8,7,6,5,4,3,2,1}},
 float[4,4] wk = {{1,0,3,4,5,6,7,8,8,7,6,5,4,3,2,1}},
 float[4,4] wv = {{0,2,3,4,5,6,7,8,8,7,6,5,4,3,2,1}}, int64 pad = {{1}},
 int64[2] axes = {{1,2}}, int64[2] rows = {{5,1}}>
{{ {seen} q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)
   u = Unsqueeze(seen, axes) m = Expand(u, rows)
   y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v, m) }}"""
    model = ir.from_onnx_text(text)
    InferShapes()(model)
    done = PackAttention(right=True)(model)
    assert not done.hits
    assert "not 0 in one input" in done.notes[0]
