"""The pipeline, its observers, and what single passes promise beyond the golden texts."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxpress.errors import UsageError
from onnxpress.optimizers import TARGETS, Step, count_ops, optimize
from onnxpress.optimizers import pipeline as pipeline_module
from onnxpress.optimizers.clean.fold_constants import FoldConstants
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.dims import same_dim
from onnxpress.optimizers.lower.expand_attention_mask import ExpandAttentionMask
from onnxpress.optimizers.observers import dump, from_environment, log, verify
from onnxpress.optimizers.pipeline import pass_name, passes

CPU = TARGETS["cpu"]

# Two layers, each of which builds the mask anew, as torch exports nn.TransformerEncoder.
TWO_LAYERS = """
<ir_version: 10, opset_import: ["" : 23, "unused" : 1]>
g (float[batch,4,seq,8] x, bool[batch,seq] pad) => (float[batch,4,seq,8] y)
<int64[4] heads = {1, 4, 1, 1}, int64[4] again = {1, 4, 1, 1}> {
    axes = Constant<value_ints=[1, 2]>()
    one = Unsqueeze(pad, axes)
    wide = Expand(one, heads)
    a = Attention(x, x, x, wide)
    axes2 = Constant<value_ints=[1, 2]>()
    one2 = Unsqueeze(pad, axes2)
    wide2 = Expand(one2, again)
    b = Attention(a, a, a, wide2)
    dead = Relu(b)
    y = Identity(b)
}
"""


def two_layers() -> ir.Model:
    return ir.from_onnx_text(TWO_LAYERS)


def run(model: ir.Model, **feeds: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


def attention(q, k, v, mask):
    """Attention with numpy's broadcasting: the semantics that the mask has in ONNX."""
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


# The pipeline ---------------------------------------------------------------------------------


def test_layers_end_up_with_one_mask_and_the_result_is_right():
    model = two_layers()
    steps = optimize(model, CPU)

    assert count_ops(model) == {
        "Attention": 2, "Cast": 2, "Concat": 1, "Expand": 1, "If": 2, "ReduceMin": 1, "Shape": 1,
        "Unsqueeze": 1,
    }  # fmt: skip
    assert [s.index for s in steps] == list(range(len(passes(CPU))))
    assert [s.name for s in steps] == [pass_name(p) for p in passes(CPU)]
    totals = {op: sum(s.ops.get(op, 0) for s in steps) for s in steps for op in s.ops}
    assert totals["Constant"] == -2
    assert totals["Expand"] == -1
    assert "unused" not in model.opset_imports

    x = np.random.default_rng(0).standard_normal((2, 4, 5, 8)).astype(np.float32)
    pad = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    want = x
    for _ in range(2):
        want = attention(want, want, want, pad[:, None, None])
    np.testing.assert_allclose(run(model, x=x, pad=pad), want, rtol=1e-5, atol=1e-6)


def test_a_second_run_changes_nothing():
    model = two_layers()
    optimize(model, CPU)
    text = ir.to_onnx_text(model)
    changed = [step.name for step in optimize(model, CPU) if step.changed]
    assert changed == ["merge_mask_branches", "skip_empty_masks"]  # each takes the other back
    assert ir.to_onnx_text(model) == text


def test_names_of_dimensions_survive():
    model = two_layers()
    optimize(model, CPU)
    shapes = {v.name: str(v.shape) for node in model.graph for v in node.outputs}
    assert shapes["a"] == "[batch,4,seq,8]"
    assert str(model.graph.outputs[0].shape) == "[batch,4,seq,8]"
    expand = next(n for n in model.graph if n.op_type == "Expand")
    assert str(expand.outputs[0].shape) == "[batch,1,seq,seq]"


def test_a_target_that_broadcasts_masks_gets_no_expand():
    target = dataclasses.replace(CPU, broadcasts_attention_mask=True)
    assert "expand_attention_mask" not in [pass_name(p) for p in passes(target)]
    model = two_layers()
    optimize(model, target)
    assert "Shape" not in count_ops(model)


def test_until_stops_after_the_first_pass_of_that_name():
    model = two_layers()
    steps = optimize(model, CPU, until="infer_shapes")
    assert steps[-1].name == "infer_shapes"
    assert [s.name for s in steps].count("infer_shapes") == 1
    assert "Identity" in count_ops(model)


def test_skip_leaves_out_every_pass_of_that_name():
    model = two_layers()
    steps = optimize(model, CPU, skip=["infer_shapes", "merge_equal_nodes"])
    assert not {"infer_shapes", "merge_equal_nodes"} & {s.name for s in steps}
    assert steps[-1].index == len(passes(CPU)) - 2  # those that run keep their number
    assert count_ops(model)["Unsqueeze"] == 2


@pytest.mark.parametrize("ask", [{"until": "fold"}, {"skip": ["fold", "inline"]}])
def test_a_pass_that_is_not_there_is_a_usage_error_with_the_names(ask):
    model = two_layers()
    before = ir.to_onnx_text(model)
    with pytest.raises(UsageError, match="no pass named fold") as caught:
        optimize(model, CPU, **ask)
    assert "fold_constants, lift_constants_to_initializers" in str(caught.value)
    assert ir.to_onnx_text(model) == before


class Rename(ir.passes.InPlacePass):
    def call(self, model):
        model.graph.outputs[0].name = "z"
        return ir.passes.PassResult(model, modified=True)


class Retype(ir.passes.InPlacePass):
    def call(self, model):
        model.graph.inputs[0].shape = ir.Shape(["batch", "seq"])
        return ir.passes.PassResult(model, modified=True)


class DropOutput(ir.passes.InPlacePass):
    def call(self, model):
        model.graph.outputs.pop()
        return ir.passes.PassResult(model, modified=True)


class Crash(ir.passes.InPlacePass):
    def call(self, model):
        raise KeyError("of the pass")


@pytest.mark.parametrize("bad", [Rename, Retype, DropOutput])
def test_a_pass_that_changes_the_signature_is_caught(monkeypatch, bad):
    monkeypatch.setattr(pipeline_module, "passes", lambda *_, **__: [InferShapes(), bad()])
    with pytest.raises(ir.passes.PostconditionError, match=f"pass {pass_name(bad())} changed the"):
        optimize(two_layers(), CPU)


def test_a_pass_that_raises_is_named(monkeypatch):
    monkeypatch.setattr(pipeline_module, "passes", lambda *_, **__: [InferShapes(), Crash()])
    with pytest.raises(KeyError) as caught:
        optimize(two_layers(), CPU)
    assert caught.value.__notes__ == ["raised by pass 1, crash"]


# Observers ------------------------------------------------------------------------------------


def test_observers_see_every_step_and_the_path_stays_the_same(tmp_path, capsys):
    seen: list[Step] = []

    def watch(step, p, model):
        assert pass_name(p) == step.name
        seen.append(step)
        return "ignored"

    watched, alone = two_layers(), two_layers()
    steps = optimize(watched, CPU, observers=[watch, log(3), dump(tmp_path), verify])
    assert seen == steps

    def facts(steps):
        return [(s.index, s.name, s.changed, s.ops, s.notes) for s in steps]

    assert facts(optimize(alone, CPU)) == facts(steps)
    assert ir.to_onnx_text(alone) == ir.to_onnx_text(watched)

    changed = [f"{s.index:02d}_{s.name}.txt" for s in steps if s.changed]
    assert sorted(p.name for p in tmp_path.iterdir()) == changed
    assert "Attention" in (tmp_path / changed[0]).read_text()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(steps)
    assert any("expand_attention_mask" in line and "Expand+1" in line for line in lines)


def test_verify_names_the_pass_that_broke_the_graph(monkeypatch):
    class Break(ir.passes.InPlacePass):
        def call(self, model):
            next(n for n in model.graph if n.op_type == "Relu").op_type = "NoSuchOp"
            return ir.passes.PassResult(model, modified=True)

    monkeypatch.setattr(pipeline_module, "passes", lambda *_, **__: [Break()])
    with pytest.raises(Exception, match="NoSuchOp") as caught:
        optimize(two_layers(), CPU, observers=[verify])
    assert "found after pass 0, break" in caught.value.__notes__


def test_the_environment_chooses_observers(tmp_path, capsys):
    assert from_environment({}) == []
    assert from_environment({"ONNXPRESS_DEBUG": "0", "ONNXPRESS_VERIFY": "0"}) == []
    every = {"ONNXPRESS_DEBUG": "1", "ONNXPRESS_DUMP": str(tmp_path), "ONNXPRESS_VERIFY": "1"}
    assert len(from_environment(every)) == 3
    optimize(two_layers(), CPU, observers=from_environment({"ONNXPRESS_DEBUG": "1"}))
    assert "Expand" not in capsys.readouterr().err  # level 1 has names and times only
    with pytest.raises(UsageError, match="ONNXPRESS_DEBUG is 'yes'"):
        from_environment({"ONNXPRESS_DEBUG": "yes"})


# Passes ---------------------------------------------------------------------------------------


def test_counts_reach_into_subgraphs_and_name_domains():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (bool c, float[4] x) => (float[4] y) {
            a = com.microsoft.QuickGelu(x)
            y = If(c) <then_branch = t () => (float[4] p) { p = Relu(a) },
                       else_branch = e () => (float[4] n) { n = Neg(a) }>
        }""")
    assert count_ops(model) == {"If": 1, "Neg": 1, "Relu": 1, "com.microsoft::QuickGelu": 1}


def test_of_two_branches_the_one_with_most_of_an_op_counts():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 23]>
        g (bool c, float[4] x) => (float[4] y) {
            z = Relu(x)
            y = If(c) <then_branch = t () => (float[4] p) { o = Relu(z)  p = Relu(o) },
                       else_branch = e () => (float[4] n) { m = Neg(z)  n = Relu(m) }>
        }""")
    assert count_ops(model) == {"If": 1, "Neg": 1, "Relu": 3}


def test_sizes_without_a_name_prove_nothing():
    unknown, named = ir.SymbolicDim(None), ir.SymbolicDim("seq")
    assert same_dim(3, 3)
    assert same_dim(named, ir.SymbolicDim("seq"))
    assert not same_dim(unknown, unknown)
    assert not same_dim(unknown, named)
    assert not same_dim(None, None)
    assert not same_dim(3, named)


def test_every_value_is_typed_and_what_cannot_be_is_told():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 23, "far.away" : 1]>
        g (float[batch,8] x) => (float[batch,8] y) {
            a = Relu(x)
            b = far.away.Thing(a)
            y = Neg(b)
        }""")
    outcome = InferShapes()(model)
    a = model.graph[0].outputs[0]
    assert (a.dtype, str(a.shape)) == (ir.DataType.FLOAT, "[batch,8]")
    assert "no type for output 'b'" in outcome.notes[0]


def test_weights_on_disk_are_not_read(tmp_path):
    """2 GiB of a sparse file, tied and transposed, in a process that may grow by 100 MB."""
    script = """if True:
        import resource
        import onnx_ir as ir
        from onnxpress.optimizers import TARGETS, count_ops, optimize

        n, f32 = 16384, ir.TensorType(ir.DataType.FLOAT)  # 1 GiB for each weight
        open("w", "wb").truncate(2 * 4 * n * n)
        weights = []
        for i in range(2):
            data = ir.ExternalTensor(
                "w", i * 4 * n * n, 4 * n * n, ir.DataType.FLOAT,
                shape=ir.Shape([n, n]), name=f"w{i}", base_dir=".",
            )
            weights.append(ir.Value(name=data.name, const_value=data, shape=data.shape, type=f32))
        x = ir.Value(name="x", type=f32, shape=ir.Shape(["batch", n]))
        tied = ir.node("Transpose", [weights[0]], attributes={"perm": [1, 0]})
        turned = ir.node("Transpose", [weights[1]], attributes={"perm": [1, 0]})
        a = ir.node("MatMul", [x, weights[0]])
        b = ir.node("MatMul", [a.outputs[0], turned.outputs[0]])
        c = ir.node("MatMul", [b.outputs[0], tied.outputs[0]])
        y = c.outputs[0]
        y.name, y.type, y.shape = "y", f32, ir.Shape(["batch", n])
        graph = ir.Graph([x], [y], nodes=[tied, turned, a, b, c], initializers=weights,
                         opset_imports={"": 23}, name="g")
        model = ir.Model(graph, ir_version=10)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        steps = optimize(model, TARGETS["cpu"])
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 100_000, f"grew by {grown} kB"
        # The tied weight would be stored twice; the other's Transpose is a view of the file.
        assert count_ops(model) == {"MatMul": 3, "Transpose": 1}, count_ops(model)
        print(*(note for step in steps for note in step.notes))
    """
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "folding it adds 1,073,741,824 bytes" in done.stdout


def test_folding_keeps_within_its_budget():
    text = """
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[8,8] x) => (float[8,8] y) <float one = {1}, int64[2] s = {8, 8}> {
            big = Expand(one, s)  z = Neg(big)  y = Add(x, z)
        }"""
    model = ir.from_onnx_text(text)
    assert FoldConstants(budget=255)(model).hits == 0
    assert FoldConstants(budget=2048)(model).hits == 1
    assert count_ops(model) == {"Add": 1}


SPLIT = """<ir_version: 10, opset_import: ["" : {opset}]>
g ({inputs}) => (float[n,3] y) {weights} {{
    q = SplitToSequence<axis=0{more}>(x, s)
    i = Constant<value = int64 {{1}}>()  y = SequenceAt(q, i)
}}"""
SPLITS = {
    "equal parts": {"opset": 18, "weights": "<int64 s = {2}>"},
    "uneven parts": {"opset": 17, "weights": "<int64[2] s = {1, 3}>"},
    "as opset 18 has them": {"opset": 17, "weights": "<int64 s = {2}>"},
    "keepdims is 0": {"opset": 18, "weights": "<int64[2] s = {1, 3}>", "more": ", keepdims=0"},
    "the size of its parts is not known": {"opset": 18, "inputs": "float[4,3] x, int64 s"},
    "it has n parts": {"opset": 18, "inputs": "float[4,3] x, int64[n] s"},
    "folding writes opset 13": {"opset": 12, "weights": "<int64[2] s = {1, 3}>"},
}


@pytest.mark.parametrize("why", SPLITS)
def test_parts_that_are_a_sequence_are_split_where_that_is_right(why):
    given = {"inputs": "float[4,3] x", "weights": "", "more": "", **SPLITS[why]}
    model = ir.from_onnx_text(SPLIT.format(**given))
    feeds = {"x": np.arange(12, dtype=np.float32).reshape(4, 3)}
    if " s" in given["inputs"]:
        feeds["s"] = np.array([1, 3] if "[n]" in given["inputs"] else 2)
    want = run(model, **feeds)
    outcome = FoldConstants()(model)
    split = why in ("equal parts", "uneven parts")
    assert ("Split" in count_ops(model)) == outcome.modified == split
    assert split or why in outcome.notes[0]
    np.testing.assert_array_equal(run(model, **feeds), want)
    assert not FoldConstants()(model).modified


def test_folding_that_fails_half_way_leaves_a_whole_graph():
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[4,3] x, bool c) => (int64[1] y) <int64[1] far = {7}, int64[1] near = {1}> {
            n = Shape(x)  r = Relu(x)  m = Shape(r)
            y = If(c) <then_branch = a () => (int64[1] p) { p = Gather<axis=0>(m, near) },
                       else_branch = b () => (int64[1] q) { q = Gather<axis=0>(m, far) }>
        }""")
    outcome = FoldConstants()(model)
    assert outcome.modified
    assert "Gather" in outcome.notes[0]
    assert "index out of range" in outcome.notes[0]
    feeds = {"x": np.zeros((4, 3), np.float32), "c": np.array(True)}
    assert run(model, **feeds).tolist() == [3]
    text = ir.to_onnx_text(model)
    again = FoldConstants()(model)
    assert again.notes
    assert not again.modified
    assert ir.to_onnx_text(model) == text


class Warn(ir.passes.InPlacePass):
    def call(self, model):
        logging.getLogger("onnx_ir.passes.common").warning("a value of mine")
        raise KeyError("of the pass")


def test_warnings_of_the_libraries_are_silent_while_a_pass_runs(monkeypatch, caplog):
    monkeypatch.setattr(pipeline_module, "passes", lambda target, **_: [Warn()])
    with pytest.raises(KeyError):
        optimize(two_layers(), CPU)
    assert not caplog.records
    logging.getLogger("onnx_ir.passes.common").warning("afterwards")
    assert [r.getMessage() for r in caplog.records] == ["afterwards"]


def test_initializers_that_are_inputs_may_leave_the_signature(monkeypatch):
    model = ir.from_onnx_text("""
        <ir_version: 3, opset_import: ["" : 17]>
        g (float[4] x, float[4] w) => (float[4] y) <float[4] w = {1, 2, 3, 4}> { y = Add(x, w) }""")
    assert len(model.graph.inputs) == 2
    optimize(model, CPU)
    assert [v.name for v in model.graph.inputs] == ["x"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_mask_that_broadcasts_gives_what_numpy_gives(data):
    draw = data.draw
    batch, heads, seq, keys = (draw(st.integers(1, 3), label=n) for n in ("B", "H", "S", "K"))
    rank = draw(st.integers(1, 4), label="mask rank")
    shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, seq)] + [keys]
    shape = shape[-rank:]
    boolean = draw(st.booleans(), label="bool mask")
    flat = draw(st.booleans(), label="Q, K, V of rank 3")
    static = draw(st.booleans(), label="static shapes")
    opset = draw(st.sampled_from([23, 24]))

    rng = np.random.default_rng(draw(st.integers(0, 99)))
    q = rng.standard_normal((batch, heads, seq, 4)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, heads, keys, 4)).astype(np.float32)
    mask = rng.random(shape) > 0.5 if boolean else rng.standard_normal(shape).astype(np.float32)
    if boolean:
        mask[..., 0] = True
    want = attention(q, k, v, mask)

    def lay(x):
        return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(batch, -1, heads * 4) if flat else x

    def dims(x, names):
        return ",".join(map(str, x.shape)) if static else ",".join(names)

    axes = ("bsx", "bkx") if flat else ("bhsd", "bhkd")
    counted = f"<q_num_heads={heads}, kv_num_heads={heads}>" if flat else ""
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : {opset}]>
        g (float[{dims(lay(q), axes[0])}] q, float[{dims(lay(k), axes[1])}] k,
           float[{dims(lay(v), axes[1])}] v,
           {"bool" if boolean else "float"}[{dims(mask, [f"m{i}" for i in range(rank)])}] mask)
          => (float[{dims(lay(q), axes[0])}] y) {{ y = Attention {counted} (q, k, v, mask) }}""")
    assert not ExpandAttentionMask()(model).notes or (static and shape[-1] == 1)
    got = run(model, q=lay(q), k=lay(k), v=lay(v), mask=mask)
    np.testing.assert_allclose(got, lay(want), rtol=1e-4, atol=1e-5)


def test_the_folder_loads_neither_torch_nor_onnxruntime():
    code = (
        "import sys, onnxpress.optimizers as o; "
        "print(sorted({'torch', 'onnxruntime', 'transformers'} & set(sys.modules)), o.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    folder = Path(pipeline_module.__file__).parent
    assert max(len(p.read_text().splitlines()) for p in folder.glob("*.py")) <= 400
