"""benchmarks/gpu_proof.py in small on the CPU: all of it but CUDA's calls."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxpress
import pytest

BENCHMARKS = Path(onnxpress.__file__).parent / "benchmarks"
SECTIONS = "roofline,numerics,capture,encoders,decoders"


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a file of benchmarks/, where they import each other by bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_rehearsal(tmp_path: Path) -> None:
    script = BENCHMARKS / "gpu_proof.py"
    command = [sys.executable, str(script), "--rehearse", "--here", "--modes", ""]
    command += ["--only", SECTIONS, "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said == json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    assert said["failed"] == []
    assert set(SECTIONS.split(",")) <= set(said)
    llama = said["numerics"]["llama-small cuda-fp16"]["total at the capacity"]
    assert llama["same_tokens"] == llama["tokens"]
    race = said["decoders"]["llama-1b decode 2x32"]
    assert race["onnxpress binding"]["tokens_per_s"] > 0
    assert race["torch eager"]["of_bandwidth"] > 0


def test_a_step_that_fails_costs_no_other(tmp_path: Path, beside: Any) -> None:
    place, proof = beside("gpu_place"), beside("gpu_proof")
    report = place.Report(tmp_path / "part.json", minutes=1)
    assert report.do("bad", lambda: 1 / 0) is None
    assert report.do("good", lambda: {"passed": True})
    assert report.do("wrong", lambda: {"passed": False})
    rows = json.loads(report.path.read_text())
    assert "ZeroDivisionError" in rows["bad"]["error"]
    assert proof._failed({"section": rows}) == ["section / bad", "section / wrong"]
    late = place.Report(tmp_path / "late.json", minutes=0)
    assert late.do("late", lambda: {"passed": True}) is None
    assert "skipped" in late.rows["late"]


def test_weights_are_traced_to_parameters(beside: Any) -> None:
    graphs = beside("gpu_graphs")
    rng = np.random.default_rng(0)
    names = {"q.weight": (4, 6), "k.weight": (2, 6), "q.bias": (4,), "k.bias": (2,)}
    known = {n: rng.normal(size=shape).astype(np.float32) for n, shape in names.items()}
    made = {
        "packed": np.concatenate([known["q.weight"].T, known["k.weight"].T], 1),
        "bias": np.concatenate([known["q.bias"], np.zeros(3, np.float32)]),
        "table": np.arange(8, dtype=np.float32),
    }
    values = []
    for name, array in made.items():
        values.append(ir.Value(name=name, const_value=ir.tensor(array.astype(np.float16))))
    graph = ir.Graph([], [], nodes=[], initializers=values)
    found = graphs.trace(ir.Model(graph, ir_version=10), known)
    assert [p["of"] for p in found["packed"]] == ["q.weight", "k.weight"]
    assert all(p["transposed"] for p in found["packed"])
    assert found["bias"][1] == {"zeros": "the rest"}
    assert "table" not in found


def test_a_weight_that_is_half_known_is_refused(beside: Any) -> None:
    graphs = beside("gpu_graphs")
    known = {"a.bias": np.arange(1, 4, dtype=np.float32)}
    value = ir.Value(name="w", const_value=ir.tensor(np.array([1, 2, 3, 9], np.float32)))
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=10)
    with pytest.raises(SystemExit, match="nobody knows"):
        graphs.trace(model, known)
