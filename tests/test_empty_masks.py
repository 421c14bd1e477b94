"""Attention without a mask that hides nothing: the same numbers, and the same graph again."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
from onnxpress.optimizers import TARGETS, count_ops, optimize
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.clean.merge_mask_branches import MergeMaskBranches
from onnxpress.optimizers.explain import explain
from onnxpress.optimizers.lower.skip_empty_masks import SkipEmptyMasks
from onnxpress.optimizers.pipeline import Change, lowered, pass_name, passes
from onnxpress.optimizers.precision.convert_floats import ConvertFloats

CPU = TARGETS["cpu"]
PLAIN = dataclasses.replace(CPU, skips_empty_masks=False)
HEAD = '<ir_version: 10, opset_import: ["" : 23]>'
HEADS = {
    "alike": "q_num_heads = 4, kv_num_heads = 4",
    "grouped": "q_num_heads = 4, kv_num_heads = 2",
}
MASKS = {
    "choice": "c = Cast<to = 9>(seen)  w = Where(c, zero, low)  mask = Unsqueeze(w, axes)",
    "lowest": "c = Cast<to = 9>(seen)  w = Where(c, zero, lowest)  mask = Unsqueeze(w, axes)",
    "bools": "c = Cast<to = 9>(seen)  mask = Unsqueeze(c, axes)",
    "product": """f = Cast<to = 1>(seen)  n = Sub(one, f)  u = Unsqueeze(n, axes)
                  mask = Mul(u, lowest)""",
}


def layers(mask: str, heads: str = "alike", more: str = "") -> ir.Model:
    """Two layers that share a mask of padding, as an exporter leaves them."""
    settings, size = HEADS[heads] + more, 32 if heads == "alike" else 16
    return ir.from_onnx_text(f"""{HEAD}
        g (float[batch,seq,32] x, int64[batch,seq] seen) => (float[batch,seq,32] y)
        <float zero = {{0}}, float one = {{1}}, float low = {{-3.3e38}},
         float lowest = {{-3.4028234663852886e38}}, int64[2] axes = {{1, 2}},
         int64[1] start = {{0}}, int64[1] end = {{{size}}}, int64[1] last = {{2}}> {{
            {MASKS[mask]}
            k = Slice(x, start, end, last)
            a = Attention<{settings}>(x, k, k, mask)
            y = Attention<{settings}>(a, k, k, mask)
        }}""")


def seen(which: str) -> np.ndarray:
    found = np.ones((3, 7), np.int64)
    if which != "all real":
        found[1, 4:] = 0
    if which == "a row of pads":
        found[2] = 0
    return found


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(
        None, feeds
    )[0]


def texts(model: ir.Model) -> str:
    return ir.to_onnx_text(model)


@pytest.mark.parametrize("which", ["all real", "padded", "a row of pads"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
def test_the_numbers_are_those_of_the_mask(mask, heads, which):
    plain, skipping = layers(mask, heads), layers(mask, heads)
    optimize(plain, PLAIN)
    optimize(skipping, CPU)
    assert "If" not in count_ops(plain)
    assert count_ops(skipping)["If"] == 2
    x = np.random.default_rng(0).standard_normal((3, 7, 32)).astype(np.float32)
    feeds = {"x": x, "seen": seen(which)}
    want, found = run(plain, feeds), run(skipping, feeds)
    if which == "all real":
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(found, want)


def test_the_branch_without_a_mask_is_taken_where_there_is_nothing_to_hide():
    model = layers("choice")
    optimize(model, CPU)
    for node in model.graph:
        if node.op_type == "If":  # a branch that shows that it was taken
            (attention,) = node.attributes["then_branch"].as_graph()
            attention.attributes["scale"] = ir.AttrFloat32("scale", 9.0)
    plain = layers("choice")
    optimize(plain, PLAIN)
    x = np.random.default_rng(0).standard_normal((3, 7, 32)).astype(np.float32)
    for which in ("all real", "padded"):
        feeds = {"x": x, "seen": seen(which)}
        assert np.allclose(run(model, feeds), run(plain, feeds)) == (which == "padded")


def test_causal_attention_stays_causal():
    models = [layers("choice", more=", is_causal = 1") for _ in range(2)]
    for model, target in zip(models, (PLAIN, CPU), strict=True):
        optimize(model, target)
    x = np.random.default_rng(0).standard_normal((3, 7, 32)).astype(np.float32)
    for which in ("all real", "padded"):
        feeds = {"x": x, "seen": seen(which)}
        np.testing.assert_allclose(*(run(m, feeds) for m in models), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [np.nan, -1e-38, 1.0, -0.0, 0.0])
def test_what_of_floats_hides_nothing_is_0_alone(number):
    def graph():
        return ir.from_onnx_text(f"""{HEAD}
            g (float[b,4,3,8] q, float[b,1,1,3] m) => (float[b,4,3,8] y) <int64[2] s = {{3, 1}}> {{
                mask = Expand(m, s)  y = Attention(q, q, q, mask) }}""")

    model = graph()
    InferShapes()(model)
    assert SkipEmptyMasks()(model).hits == 1
    condition = next(n for n in model.graph if n.op_type == "If").inputs[0]
    model.graph.outputs.append(condition)
    feeds = {"q": np.ones((2, 4, 3, 8), np.float32), "m": np.zeros((2, 1, 1, 3), np.float32)}
    feeds["m"][1, 0, 0, 2] = number
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, providers=["CPUExecutionProvider"])
    y, empty = session.run(None, feeds)
    assert empty == (number == 0)
    np.testing.assert_allclose(y, run(graph(), feeds), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
@pytest.mark.parametrize("mask", ["choice", "product"])
def test_the_condition_of_an_empty_batch_is_computed(mask, shape):
    model = layers(mask)
    optimize(model, CPU)
    condition = next(n for n in model.graph if n.op_type == "If").inputs[0]
    model.graph.outputs[:] = [condition]
    MergeMaskBranches()(model)  # the Attention kernel refuses empty batches, mask or not
    common.RemoveUnusedNodesPass()(model)
    feeds = {"x": np.zeros((*shape, 32), np.float32), "seen": np.ones(shape, np.int64)}
    assert run(model, feeds).tolist() is True


SOFTENED = pytest.mark.xfail(strict=True, reason="soften_attention_mask softens what is soft")


@pytest.mark.parametrize(
    "mask", [pytest.param(m, marks=SOFTENED if "lowest" in MASKS[m] else ()) for m in MASKS]
)
def test_what_was_lowered_is_lowered_to_the_same(mask):
    model = layers(mask)
    optimize(model, CPU)
    text = texts(model)
    again = ir.from_proto(ir.to_proto(model))
    optimize(again, CPU)
    assert texts(again) == text
    common.CheckerPass(full_check=True)(again)


@pytest.mark.parametrize("mask", MASKS)
def test_a_mask_is_skipped_the_second_time_too(mask):
    model = layers(mask)
    optimize(model, CPU)
    optimize(model, CPU)
    assert (count_ops(model)["If"], count_ops(model)["Attention"]) == (2, 2)


@pytest.mark.parametrize("target", ["plain", "cuda", "tensorrt"])
def test_other_targets_get_what_they_get_of_the_plain_graph(target):
    wanted = TARGETS.get(target, PLAIN)
    lowered_before, plain = layers("choice"), layers("choice")
    optimize(lowered_before, CPU)
    optimize(plain, PLAIN)
    steps = optimize(lowered_before, wanted)
    optimize(plain, wanted)
    assert texts(lowered_before) == texts(plain)
    assert next(s for s in steps if s.name == "merge_mask_branches").hits == 2
    assert "skip_empty_masks" not in [pass_name(p) for p in passes(wanted)]


def test_it_is_the_last_to_lower_after_changes_of_type():
    change = Change(lowered=[ConvertFloats("fp16")])
    names = [pass_name(p) for p in lowered(CPU, change)]
    assert names.index("skip_empty_masks") == names.index("convert_floats") + 1
    model = layers("choice")
    optimize(model, PLAIN)
    for p in lowered(CPU, change):
        p(model)
    kinds = {v.dtype for n in model.graph if n.op_type == "If" for v in (*n.outputs, *n.inputs[1:])}
    assert kinds == {ir.DataType.FLOAT16}


def test_a_layer_in_two_forms_is_one():
    model = layers("choice")
    steps = optimize(model, CPU)
    assert count_ops(model)["Attention"] == 2
    assert {f.kind: f.fused for f in explain(model, steps)} == {"Attention": 2}
    step = next(s for s in steps if s.name == "skip_empty_masks")
    assert step.ops == {"Cast": 2, "If": 2, "ReduceMin": 1}


def test_names_in_branches_are_no_others():
    model = layers("choice")
    model.graph.inputs[1].name = "y_masked"
    model.graph.inputs[0].name = "y_unmasked"
    optimize(model, CPU)
    names = [v.name for v in model.graph.inputs] + [
        v.name for n in ir.traversal.RecursiveGraphIterator(model.graph) for v in n.outputs
    ]
    assert len(names) == len(set(names))
    MergeMaskBranches()(model)
    assert count_ops(model)["Attention"] == 2
    assert "If" not in count_ops(model)
