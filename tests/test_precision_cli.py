"""Precision on the command line: options, exit codes, and what the tables say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnxpress import artifact
from onnxpress.cli import main
from onnxpress.press import change
from onnxpress.runtime import load

from . import planted

MODULE = """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(64)
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
            with torch.no_grad():
                self.norm.weight[7] *= 100
                self.up.weight[:, 7] /= 100

        def forward(self, x):
            return self.down(nn.functional.gelu(self.up(self.norm(x))))

    def build():
        torch.manual_seed(0)
        return Net(), (torch.randn(2, 64),)
"""


def call(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(w) for w in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def good(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    planted.texts(path / "c.txt", 40, 0)
    planted.texts(path / "e.txt", 24, 1)
    planted.arrays(path / "c", 40, 0)  # of fewer rows the ranges are too narrow
    planted.arrays(path / "e", 4, 100)
    planted.embedder(path / "rare", rare=2)
    planted.tensors(path / "tensors")
    return path


@pytest.fixture(scope="module")
def int8(folder) -> tuple[Path, str]:
    """An artifact, and what was printed when it was made."""
    files = "--calibration", folder / "c.txt", "--eval", folder / "e.txt"
    words = "optimize", folder / "rare", "-o", folder / "int8", "--precision", "int8"
    return folder / "int8", good(*words, *files, "--no-measure")


def bad(code: int, out: Path, *words: object) -> str:
    """Standard error of a refusal that left nothing behind."""
    result = call(*words, "-o", out / "new" / "a")
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not (out / "new").exists() or not list((out / "new").iterdir())
    return result.stderr


def test_what_is_published_is_told(int8):
    _, told = int8
    assert "precision  int8: 1 - cosine " in told
    assert "budget 0.005; passed" in told
    assert "judged on  24 examples" in told
    assert "in float   2 of 10 layers" in told
    rows = {line.split()[0].lstrip("*") or line.split()[1]: line for line in told.splitlines()}
    assert "candidate" in told
    assert any(line.lstrip().startswith("* int8") and "yes" in line for line in rows.values())


def test_inspect_says_layer_by_layer(int8):
    path, _ = int8
    told = good("inspect", path, "--precision")
    lines = told.splitlines()
    layers = lines[next(i for i, line in enumerate(lines) if line.startswith("layer")) :]
    kept = [line for line in layers if " fp32 " in line]
    assert len(kept) == 2
    assert all("by itself: 2 layers are in float for a budget of 0.005" in line for line in kept)
    assert sum(" int8 " in line for line in layers) == 8
    found = json.loads(good("inspect", path, "--precision", "--json"))["precision"]
    manifest = artifact.read_manifest(path).precision
    assert {**found, "candidates": None} == {**manifest, "candidates": None}
    assert [c["ms"] for c in found["candidates"]] == [{}, {}]
    assert "precision  int8" in good("inspect", path)


def test_inspect_of_what_was_not_changed(folder):
    assert "as it was exported" in good("inspect", folder / "rare", "--precision")
    found = json.loads(good("inspect", folder / "rare", "--precision", "--json"))
    assert found == {"precision": None}


def test_the_table_has_times(folder, monkeypatch, tmp_path):
    def timed(sessions, reference, shapes):
        ms = {"fp32": 8.0, "int8": 2.5, "int8-dynamic": 4.0, "fp16": 9.0}
        return [{"batch": 1, "sequence": 16, "ms": {name: ms[name] for name in sessions}}]

    monkeypatch.setattr(change, "time_sessions", timed)
    monkeypatch.setattr(change, "time_against", lambda *a, **b: {})
    files = "--calibration", folder / "c.txt", "--eval", folder / "e.txt"
    out = tmp_path / "auto"
    told = good("optimize", folder / "rare", "-o", out, "--precision", "auto", *files)
    for text in (told, good("inspect", out, "--precision")):
        assert "1x16 ms" in text
        row = next(line for line in text.splitlines() if line.startswith("* "))
        assert row.split()[1] == "int8"
        assert "2.5" in row.split()
    found = json.loads(good("inspect", out, "--precision", "--json"))["precision"]
    assert {c["name"]: c["ms"] for c in found["candidates"]}["fp16"] == {"1x16": 9.0}
    assert '"ms"' not in (out / "manifest.json").read_text()  # no clock in what is hashed
    # measured.json is nobody's word: what it should not hold does no harm.
    for content in ("[]", "{", '{"candidates": [1]}', '{"candidates": [{"name": "int8"}]}'):
        (out / "measured.json").write_text(content)
        assert "* int8" in good("inspect", out, "--precision")


@pytest.mark.parametrize(
    ("code", "words", "said"),
    [
        (3, ["--precision", "int8", "--max-drift", "0"], "int8 is past the budget"),
        (3, ["--prune", "ffn:0.25", "--max-drift", "1e-6"], "fp32 pruned is past the budget"),
        (2, ["--precision", "int8", "--max-drift", "nan"], "--max-drift is nan"),
        (2, ["--precision", "int8", "--max-drift", "-1"], "--max-drift is -1.0"),
        (2, ["--precision", "int8", "--max-drift", "few"], "'few' is not a valid float"),
        (2, ["--precision", "int3"], "'int3' is not one of"),
        (2, ["--precision", "int8", "--calibrator", "mean"], "'mean' is not one of"),
        (2, ["--precision", "bf16"], "ONNX Runtime has no bf16 kernels"),
        (2, ["--precision", "int8", "--target", "cuda"], "no kernel for integer activations"),
        (2, ["--precision", "int8", "--until", "lift_gelu"], "--until"),
        (2, ["--prune", "everything"], "'everything'"),
        (2, ["--precision", "auto"], "nothing is measured"),
    ],
)
def test_refusals(folder, tmp_path, code, words, said):
    files = "--calibration", folder / "c.txt", "--eval", folder / "e.txt"
    assert said in bad(code, tmp_path, "optimize", folder / "rare", "--no-measure", *files, *words)


def test_refusals_of_examples(folder, tmp_path):
    rare = "optimize", folder / "rare", "--no-measure"
    told = bad(2, tmp_path, *rare, "--calibration", folder / "c.txt")
    assert "--calibration has no use without a change of precision" in told
    told = bad(2, tmp_path, *rare, "--precision", "int8", "--calibration", folder / "none.txt")
    assert "none.txt" in told
    same = "--calibration", folder / "c.txt", "--eval", folder / "c.txt"
    assert "would prove nothing" in bad(2, tmp_path, *rare, "--precision", "int8", *same)
    tensors = "optimize", folder / "tensors", "--no-measure", "--precision", "int8"
    assert "--calibration" in bad(2, tmp_path, *tensors)
    told = bad(2, tmp_path, *tensors, "--calibration", folder / "c.txt")
    assert "c.txt:1" in told
    assert "the inputs are x: float32[batch, 64]" in told


def test_allowed_drift_is_told_each_time(folder, tmp_path):
    files = "--calibration", folder / "c.txt", "--eval", folder / "e.txt"
    words = "--precision", "int8", "--max-drift", "0", "--allow-drift", "--no-measure"
    told = good("optimize", folder / "rare", "-o", tmp_path / "a", *files, *words)
    assert "DRIFT ALLOWED: the mean 1 - cosine is" in told
    assert "DRIFT ALLOWED" in good("inspect", tmp_path / "a")


def test_press_from_pytorch_and_verify(folder, write, tmp_path):
    source, out = write(MODULE), tmp_path / "a"
    files = "--calibration", folder / "c", "--eval", folder / "e"
    words = "--precision", "int8", "--max-drift", "0.05", "--no-measure"
    told = good("press", source, "-o", out, *words, *files)
    assert "in float   0 of 2 layers" in told
    manifest = artifact.read_manifest(out)
    assert [layer["name"] for layer in manifest.precision["layers"]] == ["up", "down"]
    x = np.load(folder / "e" / "0.npz")["x"]
    assert next(iter(load(out).run({"x": x}).values())).shape == (4, 64)
    told = good("verify", out, "--source", source)
    row = next(line for line in told.splitlines() if line.startswith("drift"))
    assert row.split()[1] == "ok"
    assert "4 examples against torch" in row
    assert "not made" in good("verify", out)


def test_verify_says_when_the_examples_changed(folder, write, tmp_path):
    source, out = write(MODULE), tmp_path / "a"
    for name, count, seed in (("c", 8, 0), ("e", 4, 100)):
        planted.arrays(tmp_path / name, count, seed)
    files = "--calibration", tmp_path / "c", "--eval", tmp_path / "e"
    good("press", source, "-o", out, "--precision", "int8-dynamic", *files, "--no-measure")
    planted.arrays(tmp_path / "other", 1, 50)
    (tmp_path / "other" / "0.npz").rename(tmp_path / "e" / "9.npz")
    told = good("verify", out, "--source", source)
    row = next(line for line in told.splitlines() if line.startswith("drift"))
    assert "not made" in row
    assert "others by now" in row
