"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnxpress import artifact
from onnxpress.cli import main

from . import factories, onnx_models
from .onnx_models import WORDS

LINEAR = f"{factories.__file__}:linear"
COMMANDS = (
    "export",
    "press",
    "optimize",
    "run",
    "verify",
    "inspect",
    "diff",
    "bench",
    "doctor",
)


def call(*words: object, stdin: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(main, [str(w) for w in words], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def good(*words: object, **more) -> Result:
    result = call(*words, **more)
    assert result.exit_code == 0, result.output
    return result


def lines_of_json(result: Result) -> list:
    return [json.loads(line) for line in result.stdout.splitlines()]


def bad(code: int, *words: object, **more) -> str:
    """What stands on standard error; nothing may stand on standard output, and no traceback."""
    result = call(*words, **more)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("error: ") + result.stderr.count("Error: ") == 1
    return result.stderr


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    return lambda build, **more: build(tmp_path_factory.mktemp("artifact") / "a", **more)


@pytest.fixture(scope="module")
def embedder(make) -> Path:
    return make(onnx_models.embedder)


@pytest.fixture(scope="module")
def generator(make) -> Path:
    return make(onnx_models.generator)


@pytest.fixture(scope="module")
def tensors(make) -> Path:
    return make(lambda path: onnx_models.publish(path, onnx_models.add_model()))


@pytest.fixture(scope="module")
def linear(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("linear") / "out"
    good("press", LINEAR, "-o", out)
    return out


# Help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS)], ids=" ".join)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command, flag):
    out = good(*command, flag).stdout
    assert out.startswith("Usage: ")
    if command:
        assert "Options:" in out
    else:
        assert all(f"\n  {c} " in out for c in COMMANDS)


def test_version():
    assert "0.1.0" in good("--version").stdout


@pytest.mark.parametrize(
    "words",
    [
        ("fly",),
        ("press",),
        ("press", LINEAR),
        ("export", LINEAR, "-o", "x", "--task", "sing"),
        ("bench", "x", "--batch", "0"),
        ("bench", "x", "--batch", "1,a"),
        ("bench", "x", "--rounds", "3"),
        ("run", "x", "--threads", "0"),
        ("run", "x", "--unheard-of"),
    ],
    ids=" ".join,
)
def test_usage_is_2(words):
    assert "Usage: " in bad(2, *words)


def shell(*words: object, env=None, **more) -> subprocess.CompletedProcess:
    """The command as a shell starts it."""
    command = [Path(sys.executable).parent / "onnxpress", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(env or {})}, **more
    )


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_shell_completion(name):
    done = shell(env={"_ONNXPRESS_COMPLETE": f"{name}_source"})
    assert "_ONNXPRESS_COMPLETE" in done.stdout
    assert "onnxpress" in done.stdout


def test_completion_completes():
    words = {"COMP_WORDS": "onnxpress pr", "COMP_CWORD": "1"}
    done = shell(env={"_ONNXPRESS_COMPLETE": "bash_complete", **words})
    assert done.stdout.strip() == "plain,press"


def test_python_dash_m():
    command = [sys.executable, "-m", "onnxpress", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Usage: onnxpress" in done.stdout


# export, press ---------------------------------------------------------------------------------


def test_press_tells_progress_and_the_result(tmp_path):
    out = tmp_path / "out"
    result = good("press", LINEAR, "-o", out, "--no-measure")
    assert f"{out}: tensors, " in result.stdout
    assert "points against torch 2." in result.stdout
    steps = [line.split(" s  ")[1] for line in result.stderr.splitlines()]
    assert steps[1:3] == ["capture the graph", "optimize for cpu"]
    assert steps[-1] == "publish"
    assert not (out / "measured.json").exists()


def test_export_with_json(tmp_path):
    result = good("export", LINEAR, "-o", tmp_path / "out", "--json")
    (told,) = lines_of_json(result)
    assert told["directory"] == str(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {k: v for k, v in told.items() if k != "directory"} == written


def test_what_is_there_is_kept_without_force(linear, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(linear, out)
    said = bad(2, "press", LINEAR, "-o", out)
    assert "the output exists" in said
    assert f"where: {out}" in said
    assert "--force" in said
    good("press", LINEAR, "-o", out, "--force", "--no-measure")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    assert "is no onnxpress artifact" in bad(
        2, "press", LINEAR, "-o", tmp_path / "photos", "--force"
    )
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "cat"


DRIFTING = """
class Drift(nn.Module):
    def forward(self, x):
        # torch.export sees one computation, PyTorch runs the other.
        return x + (0.0 if torch.compiler.is_exporting() else 0.01)

def build():
    return Drift(), (torch.randn(2, 4),)
"""


def test_a_gate_is_3_and_drift_can_be_allowed(write, tmp_path):
    spec, out = write(DRIFTING), tmp_path / "out"
    result = call("press", spec, "-o", out)
    assert result.exit_code == 3
    assert "does not compute what torch" in result.stderr
    assert "differs by 0.01" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not out.exists()
    result = good("press", spec, "-o", out, "--allow-drift", "--no-measure")
    assert "drift was allowed: output output of shape" in result.stdout
    assert "DRIFT ALLOWED" in good("inspect", out).stdout
    assert "drift" in good("verify", out, "--source", spec).stdout


# run -------------------------------------------------------------------------------------------


def test_run_embeds_texts(embedder):
    out = good("run", embedder, "the cat", "a dog ran").stdout
    assert "'the cat'  (8) " in out
    assert "cosine similarity" in out
    rows = lines_of_json(good("run", embedder, "the cat", "a dog ran", "--json"))
    assert [r["text"] for r in rows] == ["the cat", "a dog ran"]
    assert np.linalg.norm(rows[0]["embedding"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "the cat"}\n{"text": "a dog", "id": 7}\n',
        '"the cat"\n"a dog"\n',
        "the cat\n\n  \na dog",
        "\ufeffthe cat\r\na dog\r\n",
    ],
    ids=["objects", "strings", "lines", "windows"],
)
def test_run_reads_files_and_standard_input(embedder, tmp_path, content):
    want = lines_of_json(good("run", embedder, "the cat", "a dog", "--json"))
    file = tmp_path / "input.jsonl"
    file.write_bytes(content.encode())
    assert lines_of_json(good("run", embedder, "--input", file, "--json")) == want
    for dash in (("-",), ("--input", "-")):
        assert lines_of_json(good("run", embedder, *dash, "--json", stdin=content)) == want


def test_run_classifies(make):
    rows = lines_of_json(good("run", make(onnx_models.classifier), "the cat", "a", "--json"))
    assert {r["label"] for r in rows} <= {"good", "bad", "ugly"}
    assert all(0 < r["score"] <= 1 for r in rows)


def test_run_answers(make):
    path = make(onnx_models.answerer, start="red", end="house")
    words = ("run", path, "--question", "who", "the cat ran to the red house")
    assert "'red house'" in good(*words).stdout
    (row,) = lines_of_json(good(*words, "--json"))
    assert row["answer"] == "red house"
    assert "needs a question" in bad(2, "run", path, "the cat ran to the red house")


def test_run_generates(generator):
    words = ("run", generator, "the cat sat", "--max-new-tokens", "5")
    (row,) = lines_of_json(good(*words, "--json"))
    assert row["text"] == "the cat sat"
    assert len(row["generated"].split()) <= 5
    assert repr(row["generated"]) in good(*words).stdout


def test_run_next_word(generator, embedder):
    rows = lines_of_json(good("run", generator, "--next-word", "the cat sat on", "--json"))
    assert len(rows) == 5
    assert set(rows[0]) == {"word", "id", "probability"}
    likely = [r["probability"] for r in rows]
    assert likely == sorted(likely, reverse=True)
    assert rows[0]["word"] in good("run", generator, "--next-word", "the cat sat on").stdout
    assert "--next-word is for generate models" in bad(2, "run", embedder, "--next-word", "x")


def test_run_translates(make):
    (row,) = lines_of_json(good("run", make(onnx_models.translator), "the cat", "--json"))
    assert row["text"] == "the cat"
    assert "translation" in row


def test_run_takes_arrays_as_json(tensors):
    record = '{"x": [[1, 2, 3, 4]], "m": [[1, 0]]}'
    (row,) = lines_of_json(good("run", tensors, "-", "--json", stdin=record))
    assert row == {"y": [[2.0, 4.0, 6.0, 8.0]], "z": [[2, 0]]}
    assert "y: float32[1, 4]" in good("run", tensors, "-", stdin=record).stdout


def test_run_takes_npz(tensors, tmp_path):
    file = tmp_path / "in.npz"
    np.savez(file, x=np.ones((2, 4), np.float32), m=np.ones((2, 3), np.int64))
    (row,) = lines_of_json(good("run", tensors, "--input", file, "--json"))
    assert row["y"] == [[2.0] * 4] * 2


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ('{"x": [[1, 2, 3, 4]]}', "'m' is missing"),
        ('{"x": [[1, 2]], "m": [[1]]}', "must be 4"),
        ('{"x": [["a"]], "m": [[1]]}', "besides numbers"),
        ('{"x": [[1, 2], [3]], "m": [[1]]}', "besides numbers"),
        ('{"x": {"a": 1}, "m": [[1]]}', "besides numbers"),
        ("some text", "no object of arrays"),
        ("{nonsense", "is no JSON"),
        ('"half', "is no JSON"),
    ],
)
def test_arrays_that_do_not_fit(tensors, record, said):
    assert said in bad(2, "run", tensors, "-", stdin=record)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04half"])
def test_npz_that_is_damaged(tensors, tmp_path, content):
    (tmp_path / "in.npz").write_bytes(content)
    assert "cannot be read" in bad(2, "run", tensors, "--input", tmp_path / "in.npz")


def test_npz_that_is_npy(tensors, tmp_path):
    np.save(tmp_path / "in.npy", np.ones(3))
    (tmp_path / "in.npy").rename(tmp_path / "in.npz")
    assert "cannot be read" in bad(2, "run", tensors, "--input", tmp_path / "in.npz")


def test_npz_with_pickles_is_refused(tensors, tmp_path):
    np.savez(tmp_path / "in.npz", x=np.array([{"a": 1}], dtype=object))
    assert "cannot be read" in bad(2, "run", tensors, "--input", tmp_path / "in.npz")


def test_input_that_is_not_utf8_names_the_line(embedder, tmp_path):
    data = b"fine\nstill fine\nGr\xf6\xdfe\n"
    (tmp_path / "latin1.txt").write_bytes(data)
    said = bad(2, "run", embedder, "--input", tmp_path / "latin1.txt")
    assert "not UTF-8: byte 0xf6" in said
    assert "latin1.txt:3" in said
    assert "iconv" in said
    assert "standard input:3" in bad(2, "run", embedder, "-", stdin=data)


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_input(embedder, tmp_path, content):
    (tmp_path / "empty").write_text(content)
    assert "the input is empty" in bad(2, "run", embedder, "--input", tmp_path / "empty")
    assert "the input is empty" in bad(2, "run", embedder, "-", stdin=content)


def test_input_that_is_not_there(embedder, tmp_path):
    assert "nothing to run" in bad(2, "run", embedder)
    assert "not both" in bad(2, "run", embedder, "text", "--input", "x")
    assert "No such file" in bad(2, "run", embedder, "--input", tmp_path / "nothing")
    assert "directory" in bad(2, "run", embedder, "--input", tmp_path)
    assert "has no text" in bad(2, "run", embedder, "-", stdin='{"txt": "x"}')


def test_an_empty_text_is_a_text(embedder):
    (row,) = lines_of_json(good("run", embedder, "", "--json"))
    assert row["text"] == ""
    assert len(row["embedding"]) == 8


def test_long_text_warns_once_or_is_refused(embedder):
    long = " ".join(WORDS)
    result = good("run", embedder, long, long, "short", "--json")
    assert result.stderr.count("warning: ") == 1
    assert "2 of 3 texts were cut to 12 tokens" in result.stderr
    assert len(lines_of_json(result)) == 3
    said = bad(2, "run", embedder, long, "--no-truncate")
    assert "the model takes 12" in said


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_4(embedder, name):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine has the provider")
    said = bad(4, "run", embedder, "x", "--provider", name)
    assert "hint:" in said


def test_a_provider_that_nobody_knows_is_2(embedder):
    assert "abacus" in bad(2, "run", embedder, "x", "--provider", "abacus")


# verify, inspect, bench, doctor ------------------------------------------------------------------


def test_verify(linear):
    out = good("verify", linear, "--source", LINEAR).stdout
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["files", "ok"], ["signature", "ok"], ["parity", "ok"],
    ]  # fmt: skip
    (found,) = lines_of_json(good("verify", linear, "--json"))
    assert [f["passed"] for f in found] == [True, True, None]


def test_verify_where_the_source_is_gone_or_another(write, tmp_path):
    code = "torch.manual_seed({})\ndef build():\n    return nn.Linear(4, 3), torch.ones(2, 4)\n"
    spec, out = write(code.format(0)), tmp_path / "out"
    good("press", spec, "-o", out, "--no-measure")
    write(code.format(1))
    assert "not made" in good("verify", out).stdout  # it is code, and was not named
    assert "weights are not those" in call("verify", out, "--source", spec).stderr
    assert call("verify", out, "--source", spec).exit_code == 3
    Path(spec.removesuffix(":build")).unlink()
    assert "not made" in good("verify", out).stdout
    assert call("verify", out, "--source", spec).exit_code == 2


DAMAGE = {
    "byte flipped": lambda p: flip(p / "model.onnx"),
    "file missing": lambda p: (p / "model.onnx").unlink(),
    "file cut": lambda p: os.truncate(p / "model.onnx", 10),
    "newer format": lambda p: (p / "manifest.json").write_text('{"format": 99}'),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "no JSON": lambda p: (p / "manifest.json").write_text("{"),
}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("command", ["run", "verify", "inspect", "bench"])
def test_damage_is_5(embedder, tmp_path, kind, command):
    copy = Path(shutil.copytree(embedder, tmp_path / "copy"))
    DAMAGE[kind](copy)
    if kind == "byte flipped" and command in ("inspect", "bench"):
        return  # they check sizes only, and say what they see
    text = ["a cat"] if command == "run" else []
    result = call(command, copy, *text)
    assert result.exit_code == 5, result.output
    assert "Traceback" not in result.stderr
    assert str(copy) in result.stderr
    assert result.stdout == ""


def test_inspect(linear, embedder):
    out = good("inspect", linear).stdout
    for words in ("task       tensors", "input: float32[batch, 4]", "CPUExecutionProvider",
                  "parity     8 points", "fold_constants", "Gemm"):  # fmt: skip
        assert words in out
    (told,) = lines_of_json(good("inspect", linear, "--json"))
    assert told["task"] == "tensors"
    assert told["ops"] == artifact.read_manifest(linear).ops
    assert sum(told["placement"].values()) >= 1
    assert "task       embed" in good("inspect", embedder).stdout  # made by hand, no parity


def test_bench_ends_in_json(linear):
    result = good("bench", linear, "--batch", "1,2", "--length", "3", "--against", "torch",
                  "--source", LINEAR)  # fmt: skip
    *table, last = result.stdout.splitlines()
    told = json.loads(last)
    assert [r["batch"] for r in told["rows"]] == [1, 2]
    assert table[0].split() == ["batch", "onnxpress", "ms", "torch", "ms", "speedup"]
    assert len(table) == 3
    only = good("bench", linear, "--batch", "1", "--json").stdout
    assert len(only.splitlines()) == 1
    json.loads(only)


def test_doctor():
    out = good("doctor").stdout
    assert "works    onnxruntime" in out
    assert "provider cpu" in out
    (told,) = lines_of_json(good("doctor", "--json"))
    assert {"name", "works", "detail", "fix"} == set(told[0])
    for check in told:
        assert check["works"] or check["fix"]


# Errors ------------------------------------------------------------------------------------------


def test_a_traceback_only_with_debug(tmp_path):
    done = shell("run", tmp_path / "nothing", "x")
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: this is no onnxpress artifact")
    assert f"where: {tmp_path}/nothing" in done.stderr
    done = shell("--debug", "run", tmp_path / "nothing", "x")
    assert done.returncode not in (0, 5)
    assert "Traceback" in done.stderr
    assert "ArtifactError" in done.stderr


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = shell("press", "nothing.py:build", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-2:] == [
        "error: there is no such file",
        "  where: nothing.py",
    ]
    assert not list(tmp_path.iterdir())


def test_a_bad_id_is_said_in_our_words_alone(tmp_path):
    """ONNX Runtime's own log line does not stand beside our error."""
    model = onnx_models.graph(
        "g (int64[n] x, float[4,2] t) => (float[n,2] y) { y = Gather(t, x) }",
        {"t": onnx_models.normal(1, 4, 2)},
    )
    path = onnx_models.publish(tmp_path / "a", model)
    done = shell("run", path, "-", input='{"x": [9]}')
    assert done.returncode == 2
    assert done.stderr.startswith("error: ONNX Runtime refused these inputs")
    assert done.stdout == ""


def test_output_into_a_pipe_that_closes(generator):
    command = f"{Path(sys.executable).parent}/onnxpress inspect {generator} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("task")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
