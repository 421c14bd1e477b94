"""The whole road, as Python callers take it: every kind of source, verify, and bench."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxpress
import pytest
from onnxpress import artifact
from onnxpress.errors import ArtifactError, GateError, SourceError, UsageError
from onnxpress.press import bench, verify

from . import factories, onnx_models

FACTORY = f"{factories.__file__}:two_outputs"


@pytest.fixture
def onnx_file(tmp_path) -> Path:
    """A graph as another exporter writes it: opset 17, dimensions of its own names."""
    model = onnx_models.graph(
        """g (float[N,T,8] x, float[8,4] w) => (float[N,T,4] y)
        { h = MatMul(x, w)  zero = Sub(h, h)  s = Add(h, zero)  y = Relu(s) }""",
        {"w": onnx_models.normal(1, 8, 4)},
        opset=17,
    )
    ir.save(model, tmp_path / "theirs.onnx")
    return tmp_path / "theirs.onnx"


# Manifest --------------------------------------------------------------------------------------


def test_press_returns_the_manifest_that_is_published(encoder_tiny, tmp_path):
    got = onnxpress.press(FACTORY, tmp_path / "out", measure=False)
    assert got == artifact.read_manifest(tmp_path / "out")
    m = artifact.read_manifest(encoder_tiny)
    assert m.task == "tensors"
    assert m.source["spec"] == "encoder-tiny"
    assert m.source["kind"] == "model"
    assert len(m.source["weights_sha256"]) == 64
    assert m.target == {"provider": "cpu", "precision": "fp32", "opset": 23}
    kept = ["BiasGeluFusion", "SkipLayerNormFusion"]
    assert m.runtime == {"onnxruntime": artifact.ORT_RANGE, "disabled_optimizers": kept}
    assert {"torch", "onnx-ir", "onnxruntime", "onnxpress"} <= set(m.tools)
    assert [s.name for s in m.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert all(s.shape == ("batch", "sequence") for s in m.inputs)
    assert m.ops["Attention"] == 2
    nodes = len(list(artifact.open_model(encoder_tiny).graph.all_nodes()))
    assert sum(m.ops.values()) == nodes - m.ops["If"]  # an Attention in both branches is one
    assert {"fold_constants", "infer_shapes"} <= {p["name"] for p in m.passes}
    assert set(m.files) == {"model.onnx", "model.onnx.data"}
    assert len(m.parity["points"]) >= 8


def test_measured_times_lie_beside_the_manifest(encoder_tiny):
    measured = json.loads((encoder_tiny / "measured.json").read_text())
    assert {"onnxpress", "torch"} <= set(measured["rows"][0]["ms"])
    assert measured["rows"][0]["speedup"] > 0
    assert "measured.json" not in artifact.read_manifest(encoder_tiny).files


def test_progress_tells_the_steps_in_order(tmp_path):
    said = []
    onnxpress.press(FACTORY, tmp_path / "out", measure=False, progress=said.append)
    steps = [s for s in said if not s.startswith(" ")]
    assert [s.split()[0] for s in steps] == [
        "read", "capture", "optimize", "write", "check", "publish",
    ]  # fmt: skip
    assert len(said) - len(steps) >= 8


def test_export_is_portable(tmp_path):
    m = onnxpress.export(FACTORY, tmp_path / "out")
    assert m.target["provider"] == "any"
    assert not [op for op in m.ops if "::" in op]
    assert not (tmp_path / "out" / "measured.json").exists()


# Sources ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recurrent-tiny", "encoder-decoder-tiny"])
def test_models_of_ours_press(name, tmp_path):
    m = onnxpress.press(name, tmp_path / "out", measure=False)
    assert m.parity["passed"]
    assert m.source["kind"] == "model"
    batch, length = m.inputs[0].shape
    assert batch == "batch"
    assert length == "sequence"


def test_an_onnx_file_is_adopted_as_it_is(onnx_file, tmp_path):
    m = onnxpress.export(str(onnx_file), tmp_path / "out")
    assert m.source["kind"] == "onnx"
    assert m.source["weights_sha256"] == artifact.sha256(onnx_file)
    assert m.target["opset"] == 17
    assert m.passes == []
    assert m.parity["reference"] == "the adopted file"
    assert m.inputs[0].shape == ("N", "T", 8)
    assert {f.check: f.passed for f in verify(tmp_path / "out")}["parity"] is True


def test_an_onnx_file_can_be_pressed(onnx_file, tmp_path):
    m = onnxpress.press(str(onnx_file), tmp_path / "out")
    assert m.parity["passed"]
    assert len(m.parity["points"]) >= 8
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    want = onnxpress.Session(onnx_file, optimize=False).run({"x": x})["y"]
    np.testing.assert_allclose(onnxpress.load(tmp_path / "out").run({"x": x})["y"], want, atol=1e-5)


def test_a_target_that_there_is_not(refused):
    e = refused(FACTORY, UsageError, target="tpu")
    assert "'tpu'" in e.what
    assert "cpu, openvino, cuda, tensorrt" in e.hint


def test_shapes_are_for_engines(refused):
    e = refused(FACTORY, UsageError, target="cuda", shapes={"batch": (1, 8, 32)})
    assert "shapes have no use with the target cuda" in e.what


def test_tasks_that_a_source_cannot_have(refused):
    for spec in (FACTORY, "encoder-tiny"):
        e = refused(spec, SourceError, task="embed")
        assert "task is tensors" in e.what
        assert "--task" in e.hint
    assert "unknown task" in refused(FACTORY, SourceError, task="sing").what


# Verify ----------------------------------------------------------------------------------------

CODE = """
def build():
    torch.manual_seed({})
    return nn.Linear(4, 3), (torch.randn(2, 4),)
"""


def parity_of(*args, **options):
    *_, found = verify(*args, **options)
    assert found.check == "parity"
    return found


def test_verify_with_the_source_at_hand(encoder_tiny):
    said = []
    found = verify(encoder_tiny, progress=said.append)
    assert [(f.check, f.passed) for f in found] == [
        ("files", True), ("signature", True), ("parity", True),
    ]  # fmt: skip
    assert "points against torch" in found[-1].detail
    assert any("check against" in s for s in said)


def test_verify_without_its_source_and_with_another(tmp_path, write):
    spec = write(CODE.format(0))
    out = tmp_path / "out"
    onnxpress.press(spec, out, measure=False)
    assert parity_of(out, source=spec).passed
    file = Path(spec.removesuffix(":build"))
    moved = file.rename(tmp_path / "moved.py")
    with pytest.raises(SourceError, match="no such file"):
        verify(out, source=spec)
    assert parity_of(out, source=f"{moved}:build").passed
    file.write_text(moved.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    with pytest.raises(GateError, match="weights are not those"):
        verify(out, source=spec)


def test_verify_of_data_that_is_gone_or_another(onnx_file, tmp_path):
    out = tmp_path / "out"
    onnxpress.export(str(onnx_file), out)
    assert parity_of(out).passed
    good = onnx_file.read_bytes()
    model = ir.load(onnx_file)
    model.graph.name = "another"
    ir.save(model, onnx_file)
    other = parity_of(out)
    assert other.passed is None
    assert "other weights by now" in other.detail
    onnx_file.unlink()
    gone = parity_of(out)
    assert gone.passed is None
    assert "the source is not at hand: there is no such file" in gone.detail
    onnx_file.write_bytes(good)
    assert parity_of(out).passed


@pytest.mark.parametrize("kind", ["factory", "model", "onnx", "huggingface"])
def test_verify_runs_no_code_that_an_artifact_names(tmp_path, write, kind):
    """Whatever kind of source its manifest claims: artifacts come from anyone."""
    spec = write(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef build(): ...\n")
    path = onnx_models.publish(tmp_path / "a", onnx_models.add_model())
    source = {"spec": spec, "kind": kind, "weights_sha256": ""}
    onnx_models.edit_manifest(path, source=source)
    found = parity_of(path)
    assert found.passed is None
    assert "name it with --source" in found.detail
    with pytest.raises(UsageError, match="may come from anyone"):
        bench(path, against="torch")
    assert not (tmp_path / "ran").exists()


def test_verify_sees_another_computation_on_the_same_weights(tmp_path, write):
    spec = write(CODE.format(0))
    onnxpress.press(spec, tmp_path / "out", measure=False)
    file = Path(spec.removesuffix(":build"))
    code = "class Twice(nn.Linear):\n    def forward(self, input):\n        " \
           "return 2 * super().forward(input)\n"  # fmt: skip
    text = file.read_text().replace("return nn.Linear", "return Twice")
    file.write_text(text.replace("def build", f"{code}\ndef build"))
    with pytest.raises(GateError, match="does not compute what torch"):
        verify(tmp_path / "out", source=spec)


def test_verify_of_damage(encoder_tiny, tmp_path):
    copy = Path(shutil.copytree(encoder_tiny, tmp_path / "copy"))
    (copy / "model.onnx").write_bytes(b"x")
    with pytest.raises(ArtifactError):
        verify(copy)


# Bench -----------------------------------------------------------------------------------------


def test_bench_times_every_shape_against_torch(encoder_tiny):
    found = bench(encoder_tiny, against="torch", batch=[1, 2], length=[4], threads=1)
    assert [(r["batch"], r["sequence"]) for r in found["rows"]] == [(1, 4), (2, 4)]
    for row in found["rows"]:
        assert set(row["ms"]) == {"onnxpress", "torch"}
        assert row["speedup"] == pytest.approx(row["ms"]["torch"] / row["ms"]["onnxpress"], rel=0.1)
    assert found["rounds"] == 9
    assert found["threads"] == 1
    json.dumps(found)


def test_bench_without_the_source(encoder_tiny):
    found = bench(encoder_tiny, batch=[1], length=[4])
    assert set(found["rows"][0]["ms"]) == {"onnxpress"}
    assert "speedup" not in found["rows"][0]


def test_bench_refuses_what_it_cannot_do(encoder_tiny, onnx_file, tmp_path):
    with pytest.raises(UsageError, match="against 'jax'"):
        bench(encoder_tiny, against="jax")
    with pytest.raises(UsageError, match="rounds are too few"):
        bench(encoder_tiny, rounds=3)
    with pytest.raises(SourceError):
        bench(encoder_tiny, against="torch", source=f"{tmp_path}/gone.py:build")
    onnxpress.export(str(onnx_file), tmp_path / "out")
    with pytest.raises(UsageError, match="no PyTorch to compare with"):
        bench(tmp_path / "out", against="torch")


def test_bench_past_what_the_model_takes_is_the_users_mistake(encoder_tiny):
    with pytest.raises(UsageError):
        bench(encoder_tiny, batch=[1], length=[100_000])


def test_what_a_model_does_not_take_is_not_measured(write, tmp_path):
    """A vocabulary of 50 and 40 positions: neither ids nor lengths of our own choice."""
    spec = write(
        """
        class M(nn.Module):
            def __init__(self):
                super().__init__()
                self.e, self.p = nn.Embedding(50, 8), nn.Embedding(40, 8)

            def forward(self, ids):
                return self.e(ids) + self.p(torch.arange(ids.shape[1]))

        def build():
            return M(), (torch.randint(0, 50, (2, 5)),)
        """
    )
    onnxpress.press(spec, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "measured.json").read_text())["rows"]
    assert [(r["batch"], r["sequence"]) for r in rows] == [(1, 16)]
