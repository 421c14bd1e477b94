"""Tables of embeddings in int8: the graph, its numbers, and the tables that are left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.precision.quantize_embeddings import QuantizeEmbeddings, quantize_rows

HEAD = '<ir_version: 10, opset_import: ["" : 23]>\n'
IDS = np.array([[0, 299, 5], [-1, 17, 0]])


def model_of(text: str, **tables: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(HEAD + text)
    for name, array in tables.items():
        value = next(
            v for n in model.graph for v in n.inputs if v is not None and v.name == name
        )  # the text names it, and leaves it undefined
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        model.graph.register_initializer(value)
    InferShapes()(model)
    return model


def table(rows: int = 300, width: int = 128, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, width)) * rng.uniform(0.01, 3, (rows, 1))).astype(np.float32)


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


LOOKUP = "g (int64[batch,seq] ids) => (float[batch,seq,D] y) { y = Gather(words, ids) }"
GOLDEN = """
   y_int8 = Gather <axis: int = 0> (words_int8, ids)
   y_int8_float = Cast <to: int = 1> (y_int8)
   y_scales = Gather <axis: int = 0> (words_scales, ids)
   y_scales_float = Cast <to: int = 1> (y_scales)
   y_blocks = Mul (y_int8_float, y_scales_float)
   y = Reshape (y_blocks, y_shape)
"""


def test_the_graph_that_is_written():
    model = model_of(LOOKUP, words=table())
    before = [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
    want = run(model, ids=IDS)[0]
    outcome = QuantizeEmbeddings()(model)
    assert outcome.modified
    assert (outcome.hits, outcome.notes) == (1, ())
    for node in model.graph:
        node.name = ""
    body = ir.to_onnx_text(model, exclude_initializers=True).split("{")[1].split("}")[0]
    assert [line.split(" = ", 1)[1].strip() for line in body.strip().splitlines()] == [
        line.split(" = ", 1)[1].strip() for line in GOLDEN.strip().splitlines()
    ]
    held = {k: (v.dtype.name, tuple(v.shape)) for k, v in model.graph.initializers.items()}
    assert held == {
        "words_int8": ("INT8", (300, 2, 64)),
        "words_scales": ("BFLOAT16", (300, 2, 1)),
        "y_shape": ("INT64", (3,)),
    }
    after = [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]
    assert after == before
    common.CheckerPass(full_check=True)(model)
    got = run(model, ids=IDS)[0]
    assert got.shape == want.shape == (2, 3, 128)
    for block, exact in zip(np.split(got, 2, -1), np.split(want, 2, -1), strict=True):
        step = np.abs(exact).max(-1, keepdims=True) / 127
        assert (np.abs(block - exact) <= step * 0.76).all()  # a half, and a quarter by the scale
    again = ir.to_onnx_text(model)
    assert QuantizeEmbeddings()(model).hits == 0
    assert ir.to_onnx_text(model) == again


@pytest.mark.parametrize(
    ("width", "blocks"), [(64, 1), (384, 6), (80, 2), (100, 2), (67, 1), (8, 1)]
)
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_widths_and_ranks(width, blocks, rank):
    shape = ",".join("abc"[:rank])
    text = f"g (int64[{shape}] ids) => (y) {{ y = Gather<axis=-2>(words, ids) }}"
    text = text.replace("(y)", f"(float[{shape + ',' if rank else ''}{width}] y)")
    if not rank:
        text = text.replace("int64[]", "int64")
    model = model_of(text, words=table(width=width))
    ids = np.full([2, 0, 3] if rank == 3 else [2, 4][:rank], 7)  # none at all in one of them
    want = run(model, ids=ids)[0]
    assert QuantizeEmbeddings()(model).hits == 1
    assert ("Reshape" in ops(model)) == (blocks > 1)
    assert model.graph.initializers["words_int8"].shape.numpy() == (
        (300, blocks, width // blocks) if blocks > 1 else (300, width)
    )
    got = run(model, ids=ids)[0]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=float(np.abs(table(width=width)).max()) / 127)


@given(st.integers(0, 2**31), st.sampled_from([1e-40, 1e-30, 1e-3, 1.0, 1e30, 1e38]))
def test_rows_of_any_size(seed, size):
    rows = table(20, 32, seed) / 40 * np.float32(size)
    rows[3] = 0
    integers, scales = quantize_rows(rows, 16)
    assert integers.min() >= -127
    steps = scales.astype(np.float32)
    assert np.isfinite(steps).all()
    assert (steps >= np.finfo(np.float32).tiny).all()
    back = (integers * steps).reshape(rows.shape)
    assert np.isfinite(back).all()
    largest = np.abs(rows).reshape(20, 2, 16).max(-1).repeat(16, 1)
    assert (np.abs(back - rows) <= np.maximum(largest / 127 * 0.76, 1.2e-38)).all()
    assert not back[3].any()


def test_chunks_are_one_table():
    rows = table(9000, 16)
    whole = quantize_rows(rows, 16)
    assert (whole[0][4090:4100] == quantize_rows(rows[4090:4100], 16)[0]).all()
    assert quantize_rows(np.where(np.arange(9000)[:, None] == 8999, np.nan, rows), 16) is None


def test_two_lookups_share_a_table_and_a_subgraph_is_reached():
    text = """g (int64[n] ids, bool c) => (float[n,64] y, float[n,64] z) {
        y = Gather(words, ids)
        z = If(c) <then_branch = t () => (float[n,64] a) { a = Gather(words, ids) },
                   else_branch = e () => (float[n,64] b) { b = Identity(y) }>
    }"""
    model = model_of(text, words=table(width=64))
    feeds = {"ids": IDS[0], "c": np.array(True)}
    want = run(model, **feeds)
    assert QuantizeEmbeddings()(model).hits == 2
    assert set(model.graph.initializers) == {"words_int8", "words_scales"}
    common.CheckerPass(full_check=True)(model)
    for got, exact in zip(run(model, **feeds), want, strict=True):
        np.testing.assert_allclose(got, exact, atol=0.08)


REFUSED = {
    "a tied head": (
        """g (int64[n] ids, float[n,64] x) => (float[n,64] y, float[n,300] z) {
        y = Gather(words, ids)  t = Transpose(words)  z = MatMul(x, t) }""",
        table(width=64),
        "Transpose",
    ),
    "columns are taken": (
        "g (int64[n] ids) => (float[300,n] y) { y = Gather<axis=1>(words, ids) }",
        table(width=64),
        "does not look up rows",
    ),
    "an output": (
        """g (int64[n] ids) => (float[n,64] y, float[300,64] words) { y = Gather(words, ids) }""",
        table(width=64),
        "an output of the graph",
    ),
    "halves": (
        "g (int64[n] ids) => (float16[n,64] y) { y = Gather(words, ids) }",
        table(width=64).astype(np.float16),
        "FLOAT16, not FLOAT",
    ),
    "rank 3": (
        "g (int64[n] ids) => (float[n,2,64] y) { y = Gather(words, ids) }",
        table(width=128).reshape(300, 2, 64),
        "its rank is 3",
    ),
    "no numbers": (
        "g (int64[n] ids) => (float[n,64] y) { y = Gather(words, ids) }",
        np.where(np.arange(300)[:, None] == 299, np.inf, table(width=64)).astype(np.float32),
        "NaN or infinity",
    ),
    "few rows": (
        "g (int64[n] ids) => (float[n,64] y) { y = Gather(words, ids) }",
        table(255, 64),
        "fewer than 256 rows that stay in float: 1",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_tables_that_stay_in_float(why):
    text, words, said = REFUSED[why]
    model = model_of(text, words=words)
    before = ir.to_onnx_text(model)
    outcome = QuantizeEmbeddings()(model)
    assert not outcome.modified
    assert outcome.hits == 0
    assert said in outcome.notes[0]
    assert len(outcome.notes) == 1
    assert ir.to_onnx_text(model) == before


def test_the_user_may_skip_a_table_or_take_smaller_ones():
    model = model_of(LOOKUP, words=table())
    assert QuantizeEmbeddings(skip=["words"])(model).hits == 0
    assert QuantizeEmbeddings(min_rows=301)(model).hits == 0
    assert QuantizeEmbeddings(min_rows=300)(model).hits == 1


def test_a_lowered_graph_and_an_old_one_are_left_alone():
    text = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
    g (int32[n,s] ids) => (float[n,s,64] y) {
        y, m = com.microsoft.EmbedLayerNormalization(ids, , words, rows, , scale, shift) }"""
    model = ir.from_onnx_text(text)
    outcome = QuantizeEmbeddings()(model)
    assert not outcome.hits
    assert "EmbedLayerNormalization" in outcome.notes[0]
    model = model_of(LOOKUP, words=table())
    model.opset_imports[""] = 12
    outcome = QuantizeEmbeddings()(model)
    assert not outcome.hits
    assert "opset is 12" in outcome.notes[0]
