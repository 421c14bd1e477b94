"""What an artifact is guarded against: other people's folders, edits by hand, sudden ends."""

from __future__ import annotations

import copy as copies
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnxpress import artifact
from onnxpress.artifact import MANIFEST, MODEL, Manifest, TensorSpec, stage
from onnxpress.cli import build, main, texts
from onnxpress.errors import ArtifactError, InputError, OutputError
from onnxpress.press import verify

from . import onnx_models


def manifest() -> Manifest:
    x = TensorSpec("x", "float32", ("batch", 4))
    return Manifest(
        task="tensors",
        source={"spec": "tests", "kind": "hand", "weights_sha256": ""},
        target={},
        inputs=(x,),
        outputs=(x,),
    )


def publish(out: Path, text: str = "graph", *, force: bool = False, then=lambda: None) -> None:
    with stage(out, force=force) as staging:
        staging.write(MODEL, text)
        then()
        staging.publish(manifest())


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Path:
    return onnx_models.embedder(tmp_path_factory.mktemp("embedder") / "a")


@pytest.fixture
def copy(embedder, tmp_path) -> Path:
    return Path(shutil.copytree(embedder, tmp_path / "copy"))


# What is there is not ours to delete -----------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_meanwhile_is_not_deleted(tmp_path, force):
    out = tmp_path / "later"

    def thesis():
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")

    with pytest.raises(OutputError):
        publish(out, force=force, then=thesis)
    assert (out / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["later"]


def test_of_two_presses_to_one_place_the_second_is_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="the output exists"):
        publish(out, "second", then=lambda: publish(out, "first"))
    assert (out / MODEL).read_text() == "first"
    publish(out, "third", force=True, then=lambda: publish(out, "fourth", force=True))
    assert (out / MODEL).read_text() == "third"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_appears_after_the_last_look_is_not_deleted(tmp_path, monkeypatch):
    """Between check_output and the rename: it is the rename itself that refuses."""
    out = tmp_path / "out"
    monkeypatch.setattr(artifact, "check_output", lambda *_, **__: None)
    with pytest.raises(OutputError, match="taken meanwhile"):
        publish(out, then=lambda: (out / "photos").mkdir(parents=True))
    assert (out / "photos").is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_is_refused_before_the_work(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to("empty")
    with pytest.raises(OutputError):
        artifact.check_output(tmp_path / "out")


def test_force_takes_no_folder_that_has_another_manifest(tmp_path):
    out = tmp_path / "extension"
    out.mkdir()
    (out / MANIFEST).write_text('{"manifest_version": 3, "name": "my extension"}')
    (out / "background.js").write_text("work")
    with pytest.raises(OutputError, match="no artifact that can be read") as caught:
        publish(out, force=True)
    assert "remove it yourself" in caught.value.hint
    assert (out / "background.js").exists()


@pytest.mark.parametrize("name", ["notes.txt", "folder", ".git"])
def test_force_takes_no_artifact_that_holds_more(tmp_path, name):
    out = tmp_path / "out"
    publish(out, "old")
    (out / "measured.json").write_text("[]")
    (out / name).mkdir()
    with pytest.raises(OutputError, match=f"holds {name}, which is not of the artifact"):
        publish(out, "new", force=True)
    assert (out / MODEL).read_text() == "old"
    (out / name).rmdir()
    publish(out, "new", force=True)
    assert (out / MODEL).read_text() == "new"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_says_who_may_read(tmp_path, mask):
    before = os.umask(mask)
    try:
        publish(tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


# The manifest ----------------------------------------------------------------------------------


def test_a_setting_that_was_changed_is_noticed(copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"pooling": "mean"', '"pooling": "cls"'))
    for read in (artifact.read_manifest, verify):
        with pytest.raises(ArtifactError, match="changed after it was published"):
            read(copy)
    (copy / MANIFEST).write_text(json.dumps(json.loads(text)))  # other spaces, the same content
    artifact.read_manifest(copy)


def test_the_hash_is_that_of_the_text_without_its_line(copy):
    command = f"grep -v '^  \"sha256\": ' '{copy / MANIFEST}' | sha256sum"
    printed = subprocess.run(command, shell=True, capture_output=True, text=True).stdout
    assert printed.split()[0] == artifact.read_manifest(copy).sha256


def paths(value, at=()):
    """Every place in nested JSON."""
    yield at
    lists = dict(enumerate(value)) if isinstance(value, list) else {}
    for key, inner in (value if isinstance(value, dict) else lists).items():
        yield from paths(inner, (*at, key))


def mutants(raw):
    for *above, last in (p for p in paths(raw) if p):
        for new in (None, 0, "x", [], {}, "\ud800", "removed"):
            mutant = copies.deepcopy(raw)
            holder = mutant
            for key in above:
                holder = holder[key]
            if new == "removed":
                del holder[last]
            else:
                holder[last] = new
            yield (*above, last), new, mutant


def test_no_field_of_another_kind_is_a_traceback(copy, encoder_tiny, tmp_path):
    """Mistyped, missing: refused, or an artifact that inspect can show."""
    full = json.loads((encoder_tiny / MANIFEST).read_text())
    full["kv"] = json.loads(
        (onnx_models.generator(tmp_path / "g") / MANIFEST).read_text()  # the kinds of all fields
    )["kv"]
    full["settings"] = {
        "eos_token_ids": [1], "labels": ["a"], **artifact.read_manifest(copy).settings,
    }  # fmt: skip
    full["files"] = artifact.read_manifest(copy).files
    full["passes"], full["parity"]["points"] = full["passes"][:1], full["parity"]["points"][:1]
    refused = 0
    for place, new, mutant in mutants(full):
        try:
            onnx_models.write_manifest(copy, mutant)
        except UnicodeEncodeError:
            continue
        if artifact._complaint(json.loads((copy / MANIFEST).read_text())):
            refused += 1
            with pytest.raises(ArtifactError, match="manifest"):
                artifact.read_manifest(copy)
            continue
        assert artifact.read_manifest(copy).task == mutant["task"]
        result = CliRunner().invoke(main, ["inspect", str(copy)])
        assert result.exit_code in (0, 5), (place, new, result.exception)
    assert refused > 300


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("task",), None),
        (("inputs", 0, "name"), 3),
        (("inputs", 0, "dtype"), None),
        (("inputs", 0, "shape", 0), 1.5),
        (("inputs", 0, "shape", 0), True),
        (("files", MODEL, "bytes"), "12"),
        (("files", MODEL, "sha256"), None),
        (("settings", "pooling"), 3),
        (("settings", "max_length"), "12"),
        (("source", "spec"), 3),
        (("passes",), {}),
        (("kv",), []),
        (("ops",), {"Add": "2"}),
        (("format",), True),
        (("format",), 0),
        (("extra",), 1),
    ],
    ids=str,
)
def test_a_field_of_another_kind_is_named(copy, place, value):
    raw = json.loads((copy / MANIFEST).read_text())
    holder = raw
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    onnx_models.write_manifest(copy, raw)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged") as caught:
        artifact.read_manifest(copy)
    assert str([p for p in place if isinstance(p, str)][-1]) in caught.value.what


@pytest.mark.parametrize("text", ['{"task": "\\ud800"}', "[" * 100_000, '{"a":' * 100_000])
def test_a_manifest_that_python_cannot_take(copy, text):
    (copy / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read"):
        artifact.read_manifest(copy)


def test_what_cannot_be_read_is_not_published(tmp_path):
    with stage(tmp_path / "out") as staging:
        staging.write(MODEL, "graph")
        with pytest.raises(ArtifactError, match="task"):
            staging.publish(artifact.replace(manifest(), task=None))
    assert not list(tmp_path.iterdir())


# The command line ------------------------------------------------------------------------------


def test_a_parity_without_outputs_is_printed(capsys):
    parity = {"max_abs": {}, "points": [], "reference": "torch", "allowed_drift": False}
    source = {**manifest().source, "notes": []}
    build.published(artifact.replace(manifest(), source=source, parity=parity), "out", False)
    assert "max |difference| 0.0" in capsys.readouterr().out


def test_only_a_newline_ends_a_line(tmp_path):
    odd = [f"one{c}text" for c in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"]
    odd.append("a \r b")
    file = tmp_path / "in.txt"
    file.write_bytes("\r\n".join(odd).encode() + b"\r\n")
    assert texts.records((), str(file)) == odd
    file.write_text(json.dumps({"text": odd[0]}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert texts.records((), str(file)) == [{"text": odd[0]}]


def feeds(dtype: str, value: object) -> np.ndarray:
    spec = TensorSpec("ids", dtype, ("a",))
    return texts.feeds([{"ids": [1]}, {"ids": value}], [spec])[1]["ids"]


@pytest.mark.parametrize(
    ("dtype", "value", "said"),
    [
        ("int64", [1.9], "whole numbers, not 1.9"),
        ("int64", [float("nan")], "whole numbers"),
        ("int64", [float("inf")], "whole numbers"),
        ("int64", [2**63], "too large for int64"),
        ("int64", [1e19], "too large for int64"),
        ("int32", [2**31], "too large for int32"),
        ("uint8", [-1], "below what it holds"),
        ("int64", [True], "besides numbers: true"),
        ("int64", ["1"], 'besides numbers: "1"'),
        ("int64", [None], "besides numbers: null"),
        ("int64", [[1], [1, 2]], "uneven lengths"),
        ("float32", ["1.5"], "besides numbers"),
        ("float32", [False], "besides numbers"),
        ("float32", [1e300], "too large for float32"),
        ("float32", [10**400], "too large for float32"),
        ("bool", ["yes"], "besides true and false"),
        ("bool", [2], "besides true and false"),
    ],
)
def test_numbers_that_an_input_does_not_hold(dtype, value, said):
    with pytest.raises(InputError, match="record 2, input 'ids'") as caught:
        feeds(dtype, value)
    assert said in caught.value.what


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("int64", [1.0, 2**63 - 1]), ("int64", [[], []]), ("int64", 3), ("bool", [True, 0]),
     ("float32", [1, 1.5, float("inf"), float("nan")]), ("uint64", [2**64 - 1])],
)  # fmt: skip
def test_numbers_that_an_input_holds(dtype, value):
    found = feeds(dtype, value)
    assert found.dtype == dtype
    np.testing.assert_equal(found, np.asarray(value, dtype))


def test_a_broken_number_is_2(tmp_path):
    path = onnx_models.publish(tmp_path / "a", onnx_models.add_model())
    result = CliRunner().invoke(main, ["run", str(path), '{"x": [[1,2,3,4]], "m": [[1.9]]}'])
    assert result.exit_code == 2
    assert "record 1, input 'm'" in result.stderr


def test_sigterm_leaves_nothing(tmp_path):
    out = tmp_path / "outputs" / "out"
    command = [sys.executable, "-m", "onnxpress", "press", "encoder-tiny", "-o", str(out)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    for line in process.stderr:
        if "capture the graph" in line:
            assert list(out.parent.iterdir())  # its temporary directory is there
            process.send_signal(signal.SIGTERM)
            break
    printed, rest = process.communicate(timeout=60)
    assert process.returncode == 143, rest
    assert "stopped; nothing half-done was left" in rest
    assert "Traceback" not in rest
    assert printed == ""
    assert not list(out.parent.iterdir())


def test_the_handler_of_sigterm_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    CliRunner().invoke(main, ["doctor"])
    assert signal.getsignal(signal.SIGTERM) is before
