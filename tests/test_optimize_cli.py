"""optimize, diff, inspect --fusions and --passes: what a user of the optimizer sees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxpress
import pytest
from click.testing import CliRunner, Result
from onnxpress import artifact
from onnxpress.cli import main
from onnxpress.errors import GateError, OutputError, SourceError, UsageError
from onnxpress.optimizers import pipeline
from onnxpress.optimizers.observers import LARGEST, compare, runs_from_environment, verify
from onnxpress.optimizers.outcome import Miss, Outcome
from onnxpress.press import diff
from onnxpress.press import verify as verify_artifact

from . import onnx_models
from .onnx_models import normal

GELU = """g (float[N,T,8] x, float[8,8] w) => (float[N,T,8] y) {
    h = MatMul(x, w)  i = Identity(h)
    r = Constant<value_float=1.4142135>()  d = Div(i, r)  e = Erf(d)
    one = Constant<value_float=1.0>()  a = Add(e, one)  m = Mul(i, a)
    half = Constant<value_float=0.5>()  y = Mul(m, half) }"""


def save(path: Path, text: str = GELU, *, seed: int = 1, opset: int = 17, **weights) -> Path:
    model = onnx_models.graph(text, weights or {"w": normal(seed, 8, 8)}, opset=opset)
    ir.save(model, path)
    return path


@pytest.fixture
def gelu(tmp_path) -> Path:
    return save(tmp_path / "gelu.onnx")


def call(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(w) for w in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def good(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def bad(code: int, *words: object) -> str:
    result = call(*words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("rror: ") == 1
    return result.stderr


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "measured.json"}


class Pass(ir.passes.InPlacePass):
    """A pass of a test's own: does `edit` to the model, and says `said`."""

    def __init__(self, edit=lambda model: None, **said):
        self.edit, self.said = edit, said

    def call(self, model):
        self.edit(model)
        return Outcome(model, True, **self.said)


@pytest.fixture
def passes(monkeypatch):
    """Puts other passes in the place of the pipeline's."""

    def passes(**named):
        made = [type(name, (Pass,), {})(**kw) for name, kw in named.items()]
        monkeypatch.setattr(pipeline, "passes", lambda *_, **__: made)

    return passes


# optimize ----------------------------------------------------------------------------------------


def test_an_onnx_file_becomes_an_artifact(gelu, tmp_path):
    out = tmp_path / "out"
    said = good("optimize", gelu, "-o", out, "--target", "cpu")
    assert "points against the adopted file" in said
    m = artifact.read_manifest(out)
    assert m.target["provider"] == "cpu"
    assert m.source["kind"] == "onnx"
    assert m.parity["passed"]
    assert "Identity" not in m.ops
    assert {"fold_constants", "remove_no_ops"} <= {p["name"] for p in m.passes if p["changed"]}
    assert next(p for p in m.passes if p["name"] == "remove_no_ops")["hits"] >= 1
    x = normal(3, 2, 5, 8)
    want = onnxpress.Session(gelu, optimize=False).run({"x": x})["y"]
    np.testing.assert_allclose(onnxpress.load(out).run({"x": x})["y"], want, atol=1e-5)
    assert all(f.passed for f in verify_artifact(out))


def test_the_same_input_gives_the_same_bytes(gelu, tmp_path):
    for name in "ab":
        onnxpress.optimize(gelu, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    times = json.loads((tmp_path / "a" / "measured.json").read_text())["passes"]
    assert [t["name"] for t in times] == [
        p["name"] for p in artifact.read_manifest(tmp_path / "a").passes
    ]


@pytest.mark.parametrize("make", [onnx_models.embedder, onnx_models.generator])
def test_an_artifact_stays_what_it_was(make, tmp_path):
    given = make(tmp_path / "a")
    m = onnxpress.optimize(given, tmp_path / "b")
    before = artifact.read_manifest(given)
    for name in ("task", "settings", "kv", "inputs", "outputs"):
        assert getattr(m, name) == getattr(before, name), name
    for name in ("spec", "kind", "weights_sha256"):
        assert m.source[name] == before.source[name]
    assert before.sha256[:12] in m.source["notes"][-1]
    assert m.parity["reference"] == "the artifact before"
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (
        given / "tokenizer.json"
    ).read_bytes()
    tasks = [onnxpress.load(d) for d in (given, tmp_path / "b")]
    if m.task == "embed":
        np.testing.assert_allclose(*(t.embed(["the cat"]) for t in tasks), atol=1e-6)
    else:
        a, b = (t.generate(["the cat sat"], max_new_tokens=5) for t in tasks)
        assert a == b


def test_weights_under_another_name_are_not_copied_along(tmp_path):
    with artifact.stage(tmp_path / "a") as staging:
        model = onnx_models.graph(GELU, {"w": normal(1, 8, 8)})
        ir.save(model, staging.path / "model.onnx", external_data="theirs.bin",
                size_threshold_bytes=0)  # fmt: skip
        staging.write("labels.txt", "kept")
        signature = {"inputs": onnx_models.specs(model.graph.inputs),
                     "outputs": onnx_models.specs(model.graph.outputs)}  # fmt: skip
        source = {"spec": "theirs", "kind": "hand", "weights_sha256": ""}
        manifest = artifact.Manifest(task="tensors", source=source, target={}, **signature)
        staging.publish(manifest)
    m = onnxpress.optimize(tmp_path / "a", tmp_path / "b")
    assert "labels.txt" in m.files
    assert "theirs.bin" not in m.files


def test_drift_that_was_allowed_once_stays_said(tmp_path, gelu):
    onnxpress.optimize(gelu, tmp_path / "a")
    parity = {**artifact.read_manifest(tmp_path / "a").parity, "allowed_drift": True,
              "passed": False, "worst": "output y was off"}  # fmt: skip
    onnx_models.edit_manifest(tmp_path / "a", parity=parity)
    again = onnxpress.optimize(tmp_path / "a", tmp_path / "b").parity
    assert again["allowed_drift"]
    assert again["worst"] == "output y was off"


def test_what_onnxruntime_may_not_optimize_stays_so(tmp_path):
    given = onnx_models.publish(
        tmp_path / "a", onnx_models.add_model(), runtime={"optimize": False}
    )
    assert onnxpress.optimize(given, tmp_path / "b").runtime["optimize"] is False


def test_until_and_skip(gelu, tmp_path):
    m = onnxpress.optimize(gelu, tmp_path / "a", until="fold_constants", skip=["inline_functions"])
    assert m.passes[-1]["name"] == "fold_constants"
    assert "inline_functions" not in [p["name"] for p in m.passes]
    assert "Identity" in m.ops or len(m.passes) == 1
    words = (
        "optimize",
        gelu,
        "-o",
        tmp_path / "b",
        "--skip",
        "inline_functions",
        "--skip",
        "remove_noops",
    )
    said = bad(2, *words)
    assert "no pass named remove_noops" in said
    assert "remove_no_ops" in said.split("hint:")[1]
    assert not (tmp_path / "b").exists()


def test_a_pass_that_breaks_the_graph_is_refused_or_allowed(gelu, tmp_path, passes):
    def break_it(model):
        model.graph[-1].op_type = "Add"

    passes(Break={"edit": break_it})
    said = bad(3, "optimize", gelu, "-o", tmp_path / "out")
    assert "the optimized graph does not compute what the adopted file computes" in said
    assert not (tmp_path / "out").exists()
    said = good("optimize", gelu, "-o", tmp_path / "out", "--allow-drift")
    assert "drift was allowed" in said


# Of these the graph holds the first; its node has no name.
MISSES = (Miss("Gelu", "Erf ''", "the factor is 0.7"), Miss("Gelu", "Erf 'f'", "two readers"))


@pytest.mark.parametrize("command", ["optimize", "press"])
def test_require_fused_lists_what_is_not(command, gelu, tmp_path, passes):
    more = ["--no-measure"] if command == "press" else []
    good(command, gelu, "-o", tmp_path / "fused", "--require-fused", *more)
    passes(LiftGelu={"misses": MISSES})
    said = bad(3, command, gelu, "-o", tmp_path / "out", "--require-fused")
    assert "2 layers stay unfused\n" in said
    assert "Gelu: Erf '': the factor is 0.7\n" in said
    assert "Gelu: Erf 'f': two readers\n" in said
    assert not (tmp_path / "out").exists()


def test_require_fused_counts_layers_that_no_pass_saw(gelu, tmp_path):
    with pytest.raises(GateError, match="1 layer stays unfused") as caught:
        onnxpress.optimize(gelu, tmp_path / "out", until="inline_functions", require_fused=True)
    assert "no pass that lifts to Gelu ran" in caught.value.what


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_other_targets_are_checked_on_the_cpu(target, gelu, tmp_path):
    m = onnxpress.optimize(gelu, tmp_path / "out", target=target)
    assert m.target["provider"] == target
    assert m.parity["passed"]
    assert not any("not checked" in n for n in m.source["notes"])


def test_an_op_without_a_cpu_kernel_is_named_and_not_checked(gelu, tmp_path, passes):
    def lower(model):
        last = model.graph[-1]
        bias = ir.Value(name="bias", const_value=ir.tensor(normal(5, 8), name="bias"))
        model.graph.register_initializer(bias)
        last.replace_input_with(1, bias)
        last.domain, last.op_type = "com.microsoft", "BiasSplitGelu"
        model.opset_imports["com.microsoft"] = 1

    passes(Lower={"edit": lower})
    said = good("optimize", gelu, "-o", tmp_path / "out", "--target", "cuda")
    assert "not checked, for the CPU cannot run it" in said
    assert "BiasSplitGelu" in said
    m = artifact.read_manifest(tmp_path / "out")
    assert m.parity is None
    assert [s.name for s in m.inputs] == ["x"]
    assert m.inputs[0].shape == ("N", "T", 8)
    assert "has no provider 'cuda'" in good("inspect", tmp_path / "out")
    assert "does not open the graph" in bad(2, "optimize", gelu, "-o", tmp_path / "b")


def test_a_file_that_onnxruntime_does_not_run_is_held_against_onnx_itself(tmp_path):
    """A mask without a row for each query: right in ONNX, refused by the kernel, mended here."""
    text = """g (float[B,S,8] x, bool[B,1,1,S] mask) => (float[B,S,8] y)
        { y = Attention<q_num_heads=2, kv_num_heads=2>(x, x, x, mask) }"""
    file = save(tmp_path / "mask.onnx", text, opset=23, _=normal(0, 1))
    m = onnxpress.optimize(file, tmp_path / "out")
    assert m.parity["reference"] == "onnx's evaluator on the adopted file"
    assert m.parity["passed"]
    assert m.ops["Expand"] == 1


def test_sizes_that_an_exporter_failed_to_tie(tmp_path):
    text = """g (float[s1,s2,8] x, float[s3,s4,8] z) => (float[s1,s2,8] y) { y = Add(x, z) }"""
    file = save(tmp_path / "tie.onnx", text, _=normal(0, 1))
    m = onnxpress.optimize(file, tmp_path / "out")
    assert m.inputs[1].shape == ("s1", "s2", 8)
    assert len(m.parity["points"]) >= 8


# Bad input -----------------------------------------------------------------------------------


def bad_inputs(tmp: Path) -> dict[str, tuple[Path, Path, str]]:
    (tmp / "folder").mkdir()
    (tmp / "text.onnx").write_text("this is no protobuf")
    (tmp / "empty.onnx").write_bytes(b"")
    (tmp / "weights.bin").write_bytes(b"1")
    (tmp / "taken").mkdir()
    (tmp / "taken" / "cat.jpg").write_text("cat")
    a = onnx_models.publish(tmp / "a", onnx_models.add_model())
    out = tmp / "out"
    return {
        "missing": (tmp / "nothing.onnx", out, "no such file"),
        "no directory": (tmp / "nothing", out, "no such file"),
        "no artifact": (tmp / "folder", out, "is no artifact: it has no manifest.json"),
        "no ONNX": (tmp / "text.onnx", out, "cannot be read"),
        "empty": (tmp / "empty.onnx", out, "holds no graph"),
        "another file": (tmp / "weights.bin", out, "does not end in .onnx"),
        "itself": (a, tmp / "folder" / ".." / "a", "the output is the input"),
        "its graph": (a / "model.onnx", a, "the output is the input"),
        "taken": (a, tmp / "taken", "the output exists and is no"),
    }


@pytest.mark.parametrize(
    "kind",
    ["missing", "no directory", "no artifact", "no ONNX", "empty", "another file", "itself",
     "its graph", "taken"],
)  # fmt: skip
def test_bad_input_is_2_and_leaves_nothing(kind, tmp_path):
    source, out, said = bad_inputs(tmp_path)[kind]
    before = sorted(p.name for p in tmp_path.iterdir())
    told = bad(2, "optimize", source, "-o", out, "--force")
    assert said in told
    assert "where: " in told
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert artifact.read_manifest(tmp_path / "a")


def test_damage_is_5_and_force_is_asked_for(tmp_path):
    a = onnx_models.publish(tmp_path / "a", onnx_models.decoder())
    assert "add --force" in bad(2, "optimize", a, "-o", shutil.copytree(a, tmp_path / "b"))
    data = bytearray((a / "model.onnx.data").read_bytes())
    data[-1] ^= 1
    (a / "model.onnx.data").write_bytes(data)
    assert "sha256 differs" in bad(5, "optimize", a, "-o", tmp_path / "c")


def test_what_python_callers_get_wrong(gelu, tmp_path):
    with pytest.raises(UsageError, match="no target 'tpu'") as caught:
        onnxpress.optimize(gelu, tmp_path / "out", target="tpu")
    assert "tensorrt" in caught.value.hint
    with pytest.raises(SourceError, match="no such file"):
        onnxpress.optimize("encoder-tiny", tmp_path / "out")
    with pytest.raises(OutputError, match="the output is the input"):
        onnxpress.optimize(gelu, gelu)


# inspect -----------------------------------------------------------------------------------------


@pytest.fixture
def explained(gelu, tmp_path, passes) -> Path:
    passes(LiftGelu={"hits": 1, "misses": MISSES, "notes": ("one was odd",)}, Tidy={})
    onnxpress.optimize(gelu, tmp_path / "explained")
    return tmp_path / "explained"


def test_inspect_fusions(explained):
    rows = [" ".join(line.split()) for line in good("inspect", explained, "--fusions").splitlines()]
    assert rows == [
        "layer fused lifted missed",
        "Gelu 0 1 2",
        "",
        "missed node reason",
        "Gelu Erf '' the factor is 0.7",
        "Gelu Erf 'f' two readers",
    ]
    missed = [{"node": m.node, "reason": m.reason} for m in MISSES]
    assert json.loads(good("inspect", explained, "--fusions", "--json")) == {
        "fusions": [{"kind": "Gelu", "fused": 0, "lifted": 1, "missed": missed}]
    }


def test_inspect_passes(explained):
    header, first, second = good("inspect", explained, "--passes").splitlines()
    assert header.split() == ["pass", "changed", "hits", "ms", "ops", "notes"]
    name, changed, hits, ms, *notes = first.split()
    assert (name, changed, hits, notes) == ("lift_gelu", "yes", "1", ["one", "was", "odd"])
    assert float(ms) >= 0
    assert second.startswith("tidy")
    told = json.loads(good("inspect", explained, "--passes", "--fusions", "--json"))
    assert set(told) == {"passes", "fusions"}
    assert [p["hits"] for p in told["passes"]] == [1, 0]
    assert all(p["ms"] >= 0 for p in told["passes"])


@pytest.mark.parametrize(
    "measured",
    [
        None,
        "[]",
        "{",
        '{"passes": [{"name": "x", "ms": 1}]}',
        '{"passes": [{"name": "lift_gelu"}]}',
    ],
)
def test_times_that_are_not_there(explained, measured):
    """Nobody vouches for measured.json, and an export has none."""
    file = explained / "measured.json"
    file.unlink() if measured is None else file.write_text(measured)
    told = json.loads(good("inspect", explained, "--passes", "--json"))
    assert [p["ms"] for p in told["passes"]] == [None, None]
    assert "lift_gelu" in good("inspect", explained, "--passes")


def test_artifacts_of_older_versions_open(explained):
    raw = json.loads((explained / "manifest.json").read_text())
    del raw["fusions"]
    for p in raw["passes"]:
        del p["hits"]
    onnx_models.write_manifest(explained, raw)
    onnxpress.load(explained)
    assert "not recorded" in good("inspect", explained, "--fusions")
    assert "lift_gelu" in good("inspect", explained, "--passes")
    assert json.loads(good("inspect", explained, "--fusions", "--json")) == {"fusions": None}


def test_a_graph_without_layers_says_so(tmp_path):
    given = onnx_models.publish(tmp_path / "a", onnx_models.add_model())
    onnxpress.optimize(given, tmp_path / "b")
    assert "no layer of a kind that is fused" in good("inspect", tmp_path / "b", "--fusions")


# diff --------------------------------------------------------------------------------------------


def test_diff_of_a_graph_and_what_became_of_it(gelu, tmp_path):
    onnxpress.optimize(gelu, tmp_path / "b")
    out = good("diff", gelu, tmp_path / "b")
    assert [line.split()[:4] for line in out.splitlines() if line.startswith("Identity")] == [
        ["Identity", "1", "0", "-1"]
    ]
    assert "signature  the same" in out
    assert "1 the same" in out
    assert "max |A - B|" in out
    told = json.loads(good("diff", gelu, tmp_path / "b", "--json"))
    assert set(told) == {"ops", "signature", "weights", "numerics"}
    found = told["numerics"]
    assert found["not_compared"] is None
    points = [p["point"] for p in found["points"]]
    assert len(points) == 8
    assert "N=1 T=1" in points
    assert all(p["outputs"]["y"]["max_abs"] < 1e-5 for p in found["points"])


def test_diff_of_a_graph_with_itself(gelu):
    found = diff(gelu, gelu)
    assert not any(row["difference"] for row in found.ops)
    assert found.signature == []
    assert found.weights == {
        "only_a": [], "only_b": [], "changed": [], "renamed": [], "same": 1,
        "bytes_a": 256, "bytes_b": 256,
    }  # fmt: skip
    assert {p["outputs"]["y"]["max_abs"] for p in found.numerics["points"]} == {0.0}


def test_diff_of_weights(tmp_path):
    text = """g (float[N,8] x, float[8,8] v, float[8,8] w) => (float[N,8] y)
        { h = MatMul(x, v)  y = MatMul(h, w) }"""
    a = save(tmp_path / "a.onnx", text, v=normal(1, 8, 8), w=normal(2, 8, 8))
    b = save(tmp_path / "b.onnx", text, v=normal(1, 8, 8), w=normal(3, 8, 8))
    found = diff(a, b)
    assert found.weights["same"] == 1
    (changed,) = found.weights["changed"]
    assert changed["name"] == "w"
    assert changed["a"] != changed["b"]
    worst = found.numerics["points"][0]["outputs"]["y"]
    assert worst["max_abs"] > 0.1
    assert worst["relative"] > 0.01
    text = text.replace("float[8,8] w", "float[8,8] renamed").replace("(h, w)", "(h, renamed)")
    c = save(tmp_path / "c.onnx", text, v=normal(4, 8, 8), renamed=normal(2, 8, 8))
    found = diff(a, c).weights
    assert found["renamed"] == [{"a": "w", "b": "renamed"}]
    assert [c["name"] for c in found["changed"]] == ["v"]
    wide = save(tmp_path / "d.onnx", text.replace("8,8] v", "8,9] v").replace("8,8] r", "9,8] r"),
                v=normal(1, 8, 9), renamed=normal(2, 9, 8))  # fmt: skip
    found = diff(a, wide).weights
    assert found["changed"] == [{"name": "v", "a": "float[8, 8]", "b": "float[8, 9]"}]
    assert (found["only_a"], found["only_b"]) == (["w"], ["renamed"])


def test_diff_of_signatures(gelu, tmp_path):
    other = save(tmp_path / "b.onnx", GELU.replace("float[N,T,8] x", "float[A,B,8] x, int64[N] z"))
    found = diff(gelu, other)
    assert found.signature == [{"side": "input", "name": "z", "a": None, "b": "z: int64[N]"}]
    assert found.numerics == {"points": [], "not_compared": "the signatures differ"}
    assert "input only in B: z: int64[N]" in good("diff", gelu, other)
    fixed = save(tmp_path / "c.onnx", GELU.replace("float[N,T,8] x", "float[2,T,8] x"))
    out = good("diff", gelu, fixed)
    assert "input changed: x: float32[N, T, 8] -> x: float32[2, T, 8]" in out
    assert "not compared: the signatures differ" in out


def test_diff_with_a_graph_that_does_not_run(gelu, tmp_path):
    wrong = save(tmp_path / "b.onnx", GELU.replace("Identity(h)", "Foo(h)"))
    found = diff(gelu, wrong)
    assert "B cannot be opened" in found.numerics["not_compared"]
    assert {r["op"]: r["difference"] for r in found.ops}["Foo"] == 1
    assert call("diff", wrong, gelu).exit_code == 0
    weights = {"_": np.array([3, 8], np.int64)}
    text = "g (float[N,8] x, int64[2] _) => (float[N,8] y) { y = %s }"
    a = save(tmp_path / "any.onnx", text % "Identity(x)", **weights)
    b = save(tmp_path / "three.onnx", text % "Reshape(x, _)", **weights)
    assert "B does not run at" in diff(a, b).numerics["not_compared"]


def test_diff_of_values_that_are_no_numbers(tmp_path):
    text = "g (float[N,8] x) => (float[N,8] y) { z = Sub(x, x)  y = %s }"
    nan = save(tmp_path / "a.onnx", text % "Div(z, z)", _=normal(0, 1))
    zero = save(tmp_path / "b.onnx", text % "Mul(z, x)", _=normal(0, 1))
    assert diff(nan, zero).numerics["points"][0]["outputs"]["y"]["max_abs"] == "inf"
    assert diff(nan, nan).numerics["points"][0]["outputs"]["y"]["max_abs"] == 0.0


@pytest.mark.parametrize("kind", ["missing", "no directory", "no artifact", "no ONNX", "empty"])
def test_diff_of_bad_input_is_2(kind, gelu, tmp_path):
    path, _, _ = bad_inputs(tmp_path)[kind]
    for words in ((path, gelu), (gelu, path)):
        assert f"where: {path}" in bad(2, "diff", *words)


# ONNXPRESS_VERIFY --------------------------------------------------------------------------------


def scaled(model: ir.Model) -> None:
    """Multiply the graph's first weight by 1.01."""
    value = next(iter(model.graph.initializers.values()))
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=value.name)


def test_verify_names_the_pass_that_changed_the_numbers(gelu, tmp_path, passes, monkeypatch):
    passes(Honest={}, Scale={"edit": scaled}, After={})
    monkeypatch.setenv("ONNXPRESS_VERIFY", "1")
    with pytest.raises(
        ir.passes.PostconditionError, match=r"pass 1, scale, changed what .*: output y differs by 0"
    ):
        onnxpress.optimize(gelu, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    passes(Honest={})
    onnxpress.optimize(gelu, tmp_path / "out")


@pytest.mark.parametrize("external", [False, True])
def test_verify_takes_every_pass_of_ours(external, tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXPRESS_VERIFY", "1")
    model = onnx_models.graph(GELU, {"w": normal(1, 8, 8)})
    more = {"external_data": "w.bin", "size_threshold_bytes": 0} if external else {}
    ir.save(model, tmp_path / "gelu.onnx", **more)
    onnxpress.optimize(tmp_path / "gelu.onnx", tmp_path / "out")


def test_verify_waits_until_the_graph_runs(tmp_path, monkeypatch, capsys):
    text = """g (float[B,S,8] x, bool[B,1,1,S] mask) => (float[B,S,8] y)
        { y = Attention<q_num_heads=2, kv_num_heads=2>(x, x, x, mask) }"""
    file = save(tmp_path / "mask.onnx", text, opset=23, _=normal(0, 1))
    monkeypatch.setenv("ONNXPRESS_VERIFY", "1")
    onnxpress.optimize(file, tmp_path / "a")
    assert "not compared" not in capsys.readouterr().err
    monkeypatch.setenv("ONNXPRESS_DEBUG", "1")
    onnxpress.optimize(file, tmp_path / "b")
    assert "not compared until it runs: ONNX Runtime refused" in capsys.readouterr().err


def observed(*values: np.ndarray | Exception) -> None:
    """Let `compare` see a graph give the first of these, and after each pass the next."""
    given = iter(values)

    def run(model, feeds):
        value = next(given)
        if isinstance(value, Exception):
            raise value
        return [{"y": value}]

    observe = compare(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), run, [{}])
    for index, name in list(enumerate(["lift", "fuse", "mend"]))[-len(values) + 1 :]:
        observe(pipeline.Step(index, name, True, 0.0, {}), None, None)


ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (ONES, ONES + np.float32(1e-5), ""),
        (ONES, ONES + np.float32(1e-3), "differs by 0.001"),
        (ONES * 1e-6, ONES * 2e-6, ""),
        (ONES, ONES[:1], r"float32\[1, 3\], it was float32\[2, 3\]"),
        (ONES, ONES.astype(np.float64), "float64"),
        (ONES, ONES * np.nan, "differs by inf"),
        (ONES * np.nan, ONES, ""),
        (ONES * np.inf, ONES, "not infinite where it was"),
        (ONES * np.inf, -ONES * np.inf, "not infinite where it was"),
        (ONES.astype(np.int64), ONES.astype(np.int64) * 2, "differs in 6 of 6 values"),
        (ONES.astype(np.float16), (ONES * 1.002).astype(np.float16), ""),
        (ONES, onnxpress.errors.ProviderError("no kernel"), ""),
        (onnxpress.errors.InputError("bad mask"), ONES, ""),
        (ONES[:0], ONES[:0], ""),
    ],
)
def test_what_a_pass_may_change(before, after, said):
    if not said:
        observed(before, after)
        return
    with pytest.raises(ir.passes.PostconditionError, match=f"pass 2, mend, .*{said}"):
        observed(before, after)


def test_a_graph_that_does_not_run_for_a_while_is_compared_later():
    fails = onnxpress.errors.InputError("mask dimension -2")
    observed(ONES, fails, ONES, fails)
    observed(fails, fails, ONES, ONES)
    with pytest.raises(
        ir.passes.PostconditionError, match=r"pass 1, fuse or pass 2, mend, .* differs by 1"
    ):
        observed(ONES, ONES, fails, ONES * 2)


def test_large_models_are_not_run_after_every_pass(capsys):
    graph = ir.Graph([], [], nodes=[])
    data = ir.ExternalTensor("w", 0, LARGEST + 4, ir.DataType.FLOAT,
                             shape=ir.Shape([LARGEST // 4 + 1]), name="w")  # fmt: skip
    graph.register_initializer(ir.Value(name="w", const_value=data))
    model, env = ir.Model(graph, ir_version=10), {"ONNXPRESS_VERIFY": "1"}
    assert runs_from_environment(model, None, list, env) == []
    assert "too many to run" in capsys.readouterr().err
    assert runs_from_environment(model, None, list, {}) == []
    assert capsys.readouterr().err == ""


def test_the_checker_leaves_the_model_alone(tmp_path):
    model = onnx_models.graph(GELU, {"w": normal(1, 8, 8)})
    ir.save(model, tmp_path / "a.onnx", external_data="w.bin", size_threshold_bytes=0)
    model = ir.load(tmp_path / "a.onnx")
    verify(pipeline.Step(0, "x", True, 0.0, {}), None, model)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert [v.name for v in model.graph.inputs] == ["x"]
