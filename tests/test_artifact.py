"""The artifact: nobody sees half of one, and nobody runs a damaged one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxpress
import pytest
from onnxpress import artifact
from onnxpress.artifact import MANIFEST, MODEL, Manifest, TensorSpec, stage
from onnxpress.errors import ArtifactError, OutputError
from onnxpress.press import verify

from . import factories, onnx_models


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


SOURCE = {"spec": "tests", "kind": "hand", "weights_sha256": ""}


def manifest(**more) -> Manifest:
    x = TensorSpec("x", "float32", ("batch", 4))
    given = {"task": "tensors", "source": SOURCE, "target": {}, "inputs": (x,), "outputs": (x,)}
    return Manifest(**given | more)


def weights_model() -> ir.Model:
    """y = x @ a @ b, with a table large enough to go to the file of weights."""
    return onnx_models.graph(
        """g (float[batch,64] x, float[64,64] a, float[64,512] b) => (float[batch,512] y)
        { h = MatMul(x, a)  y = MatMul(h, b) }""",
        {"a": onnx_models.normal(1, 64, 64), "b": onnx_models.normal(2, 64, 512)},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return onnx_models.publish(tmp_path_factory.mktemp("made") / "a", weights_model())


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


# Writing ---------------------------------------------------------------------------------------


def publish(out: Path, text: str = "graph", **options) -> None:
    with stage(out, **options) as staging:
        staging.write(MODEL, text)
        staging.publish(manifest())


def test_an_artifact_appears_whole(tmp_path):
    umask = os.umask(0)
    os.umask(umask)
    out = tmp_path / "new" / "parent" / "out"
    with stage(out) as staging:
        staging.write(MODEL, "graph")
        assert not out.exists()
        assert staging.path.parent == out.parent  # a rename, not a copy
        published = staging.publish(manifest())
    assert sorted(contents(out)) == [MANIFEST, MODEL]
    assert published.files[MODEL] == {
        "bytes": 5,
        "sha256": hashlib.sha256(b"graph").hexdigest(),
    }
    assert artifact.read_manifest(out) == published
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("there", [False, True], ids=["new", "old one there"])
def test_whatever_ends_the_block_leaves_nothing(tmp_path, error, there):
    out = tmp_path / "parent" / "out"
    if there:
        publish(out, "old")

    def half():
        with stage(out, force=there) as staging:
            staging.write(MODEL, "half a")
            raise error

    with pytest.raises(error):
        half()
    assert [p.name for p in out.parent.iterdir()] == (["out"] if there else [])
    if there:
        assert contents(out)[MODEL] == b"old"


def test_a_block_that_publishes_nothing_leaves_nothing(tmp_path):
    with stage(tmp_path / "out") as staging:
        staging.write(MODEL, "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_rename_that_fails_brings_the_old_one_back(tmp_path, monkeypatch, error):
    out = tmp_path / "parent" / "out"
    publish(out, "old")

    def rename(*_):
        raise error

    monkeypatch.setattr(artifact.os, "rename", rename)
    with pytest.raises(type(error)):
        publish(out, "new", force=True)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert contents(out)[MODEL] == b"old"


def test_force_replaces_the_whole_artifact(tmp_path):
    out = tmp_path / "out"
    with stage(out) as staging:
        staging.write("tokenizer.json", "{}")
        staging.write(MODEL, "old")
        staging.publish(manifest())
    publish(out, "new", force=True)
    assert sorted(contents(out)) == [MANIFEST, MODEL]
    assert contents(out)[MODEL] == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_may_be_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    publish(tmp_path / "out")
    assert contents(tmp_path / "out")[MODEL] == b"graph"


def test_what_is_there_is_refused(tmp_path):
    out = tmp_path / "out"
    publish(out)
    with pytest.raises(OutputError, match="the output exists") as caught:
        publish(out)
    assert "--force" in caught.value.hint


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["directory", "file", "dangling link", "manifest is a folder"])
def test_what_is_no_artifact_is_never_replaced(tmp_path, force, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        (out / (MANIFEST if "manifest" in kind else "photos")).mkdir(parents=True)
    with pytest.raises(OutputError, match="is no onnxpress artifact") as caught:
        publish(out, force=force)
    assert "another directory" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    if kind == "file":
        assert out.read_text() == "precious"


def test_a_taken_output_is_refused_before_any_work(tmp_path):
    publish(tmp_path / "out")
    steps = []
    with pytest.raises(OutputError):
        onnxpress.press("encoder-tiny", tmp_path / "out", progress=steps.append)
    assert steps == []


def test_a_place_that_cannot_be_written(tmp_path, refused):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write here: Not a directory") as caught:
        onnxpress.press("encoder-tiny", tmp_path / "file" / "below" / "out")
    assert "choose another directory" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="cannot write here: Permission denied"):
        publish(tmp_path / "closed" / "out")


# A disk that fills up --------------------------------------------------------------------------

PRESS = "from onnxpress.cli import main; main()"


def press_command(spec: str, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-c", PRESS, "press", spec, "-o", str(out), *options]


@pytest.fixture
def onnx_file(tmp_path) -> Path:
    """y = x @ a @ b as a file: adopting it needs no export, so the road is short."""
    ir.save(weights_model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk],
                      capture_output=True).returncode:  # fmt: skip
        pytest.skip("mounting a small disk needs more rights than this user has")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(small_disk, onnx_file):
    out = small_disk / "out"
    with pytest.raises(OutputError, match="the disk is full") as caught:
        onnxpress.press(str(onnx_file), out, measure=False)
    assert "nothing was published" in caught.value.what
    assert caught.value.where == str(small_disk)
    assert "free some space" in caught.value.hint
    assert not list(small_disk.iterdir())


def test_a_file_larger_than_allowed(tmp_path, onnx_file):
    out = tmp_path / "outputs" / "out"
    limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000)); " + PRESS
    command = [sys.executable, "-c", limit, "press", str(onnx_file), "-o", str(out)]
    done = subprocess.run([*command, "--no-measure"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("name", ["manifest.json", "measured.json"])
def test_a_disk_that_fills_up_late(tmp_path, onnx_file, monkeypatch, name):
    out = tmp_path / "outputs" / "out"
    onnxpress.press(str(onnx_file), out, measure=False)
    before = contents(out)
    write = artifact.Staging.write

    def full(self, file, content):
        if file == name:
            (self.path / file).write_bytes(b"{")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, file, content)

    monkeypatch.setattr(artifact.Staging, "write", full)
    with pytest.raises(OutputError, match="the disk is full"):
        onnxpress.press(str(onnx_file), out, force=True)
    assert contents(out) == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


# Ctrl-C ----------------------------------------------------------------------------------------

SLOW = """
import time
class Slow(nn.Linear):
    def forward(self, x):
        time.sleep(0.25)
        return super().forward(x)

def build():
    return Slow(4, 3), (torch.randn(2, 4),)
"""


@pytest.mark.parametrize("step", ["capture the graph", "check against"])
def test_ctrl_c_leaves_nothing(tmp_path, write, step):
    out = tmp_path / "outputs" / "out"
    process = subprocess.Popen(
        press_command(write(SLOW), out), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    said = ""
    for line in process.stderr:
        said += line
        if step in line:
            assert list(out.parent.iterdir())  # its temporary directory is there
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            break
    printed, rest = process.communicate(timeout=60)
    assert process.returncode == 130, said + rest
    assert "stopped; nothing" in rest
    assert "Traceback" not in rest
    assert "KeyboardInterrupt" not in rest
    assert printed == ""
    assert not list(out.parent.iterdir())


# The same bytes --------------------------------------------------------------------------------


def test_pressing_twice_gives_the_same_bytes(tmp_path, encoder_tiny):
    """Here and in another process, with other hash seeds of Python."""
    out = tmp_path / "again"
    done = subprocess.run(
        press_command("encoder-tiny", out, "--no-measure"),
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    want = contents(encoder_tiny)
    assert want.pop("measured.json")
    assert want.pop("report.html")  # it shows the times
    have = contents(out)
    assert have.pop("report.html")
    assert have == want
    text = want[MANIFEST].decode()
    assert json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) == text[:-1]
    for word in (os.uname().nodename, str(Path.home()), str(tmp_path)):
        assert word not in text


def test_hand_made_artifacts_are_the_same_bytes(tmp_path, made):
    again = onnx_models.publish(tmp_path / "again", weights_model())
    assert contents(again) == contents(made)


# Reading ---------------------------------------------------------------------------------------


def opened(path: Path):
    return onnxpress.load(path)


def changed(path: Path, **fields) -> None:
    onnx_models.edit_manifest(path, **fields)


@pytest.mark.parametrize("read", [opened, verify])
def test_a_flipped_byte(copy, read):
    for name in ("model.onnx", "model.onnx.data"):
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        good = (copy / name).read_bytes()
        (copy / name).write_bytes(data)
        with pytest.raises(ArtifactError, match="sha256 differs") as caught:
            read(copy)
        assert caught.value.where == str(copy / name)
        assert caught.value.exit_code == 5
        (copy / name).write_bytes(good)
    read(copy)


@pytest.mark.parametrize("read", [opened, verify])
def test_a_file_that_is_missing(copy, read):
    (copy / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError, match="a file of the artifact is missing") as caught:
        read(copy)
    assert caught.value.where == str(copy / "model.onnx.data")
    assert "copy the artifact again" in caught.value.hint


@pytest.mark.parametrize("hashes", [True, False])
def test_a_file_that_is_cut(copy, hashes):
    path = copy / "model.onnx.data"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ArtifactError, match=r"has \d+ bytes, the manifest says \d+"):
        onnxpress.load(copy, verify=hashes)


def test_a_manifest_of_a_newer_format(copy):
    changed(copy, format=2, unheard_of=True)
    with pytest.raises(ArtifactError, match="of format 2; this onnxpress reads up to") as caught:
        onnxpress.load(copy)
    assert "pip install --upgrade onnxpress" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["", "{", "\x00\x01", "[]", "3", "null", "{}", '{"format": 1}', '{"format": 0}']
)
def test_a_manifest_that_is_none(copy, text):
    (copy / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json") as caught:
        onnxpress.load(copy)
    assert caught.value.where == str(copy / MANIFEST)


def test_a_manifest_that_is_no_text(copy):
    (copy / MANIFEST).write_bytes(b"\xff\xfe{}")
    with pytest.raises(ArtifactError, match="cannot be read"):
        onnxpress.load(copy)


@pytest.mark.parametrize(
    "fields",
    [
        {"files": {}},
        {"files": []},
        {"files": None},
        {"files": {MODEL: {}}},
        {"files": {MODEL: 3}},
        {"files": {MODEL: {"bytes": "12", "sha256": ""}}},
        {"inputs": 3},
        {"inputs": [{"name": "x"}]},
        {"outputs": [{"name": "x", "dtype": "float32", "shape": 4}]},
        {"settings": []},
        {"source": "x"},
        {"runtime": None},
        {"unknown_field": 1},
    ],
    ids=str,
)
def test_a_manifest_with_a_damaged_field(copy, fields):
    changed(copy, **fields)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        onnxpress.load(copy)


def test_a_manifest_that_someone_edited(copy):
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"batch"', '"rows"'))
    for read in (opened, verify):
        with pytest.raises(ArtifactError, match="changed after it was published"):
            read(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..", "a\0b"])
def test_files_outside_the_artifact_are_refused(copy, name):
    (copy.parent / "secret").write_text("s")
    files = json.loads((copy / MANIFEST).read_text())["files"]
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"s").hexdigest()}
    changed(copy, files={name: entry, **files})
    for read in (opened, verify):
        with pytest.raises(ArtifactError, match="lists a file outside the artifact"):
            read(copy)


def test_a_task_of_a_later_version(copy):
    changed(copy, task="dream")
    with pytest.raises(ArtifactError, match="the task 'dream' is none"):
        onnxpress.load(copy)


@pytest.mark.parametrize("kind", ["empty directory", "nothing", "file"])
def test_what_is_no_artifact(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "empty directory":
        path.mkdir()
    elif kind == "file":
        path.write_text("x")
    with pytest.raises(ArtifactError) as caught:
        onnxpress.load(path)
    assert str(path) in caught.value.where


def test_verify_sees_a_graph_with_another_signature(copy):
    inputs = json.loads((copy / MANIFEST).read_text())["inputs"]
    changed(copy, inputs=[{**inputs[0], "name": "z"}])
    with pytest.raises(ArtifactError, match="inputs are not those of the manifest"):
        verify(copy)


def test_weights_lie_on_pages(tmp_path):
    weights = {"a": onnx_models.normal(1, 130, 130), "b": onnx_models.normal(2, 130, 130)}
    model = onnx_models.graph(
        """g (float[batch,130] x, float[130,130] a, float[130,130] b) => (float[batch,130] y)
        { h = MatMul(x, a)  y = MatMul(h, b) }""",
        weights,
    )
    path = onnx_models.publish(tmp_path / "out", model)
    values = artifact.open_model(path).graph.initializers.values()
    assert [v.const_value.offset % artifact.ALIGNMENT for v in values] == [0, 0]
    for v in values:
        np.testing.assert_array_equal(v.const_value.numpy(), weights[v.name])


# Past 2 GiB ------------------------------------------------------------------------------------

GIANT = """
import resource, sys
import numpy as np, onnx_ir as ir
from onnxpress import artifact
from pathlib import Path

rows, parts = 1 << 17, 5  # 5 tables of 512 MiB

def table(i):
    return lambda: ir.tensor(np.full((rows, 1024), i, np.float32))

text = ", ".join(f"float[{rows},1024] t{i}" for i in range(parts))
body = " ".join(f"y{i} = Gather(t{i}, x)" for i in range(parts))
outs = ", ".join(f"float[n,1024] y{i}" for i in range(parts))
model = ir.from_onnx_text(
    f'<ir_version: 10, opset_import: ["" : 23]> g (int64[n] x, {text}) => ({outs}) {{ {body} }}')
for i, v in enumerate(list(model.graph.inputs)[1:]):
    model.graph.inputs.remove(v)
    v.const_value = ir.LazyTensor(table(i), dtype=ir.DataType.FLOAT, shape=v.shape, name=v.name)
    model.graph.register_initializer(v)
with artifact.stage(sys.argv[1]) as staging:
    artifact.save_model(model, staging.path)
    spec = artifact.TensorSpec("x", "int64", ("n",))
    staging.publish(artifact.Manifest(task="tensors", inputs=(spec,), outputs=(),
        source={"spec": "x", "kind": "hand", "weights_sha256": ""}, target={}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_weights_past_two_gib_are_written_one_by_one(tmp_path):
    if shutil.disk_usage(tmp_path).free < 6 << 30:
        pytest.skip("needs 6 GB of free disk")
    out = tmp_path / "giant"
    try:
        done = subprocess.run([sys.executable, "-c", GIANT, out], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (out / "model.onnx.data").stat().st_size >= 5 << 29
        assert (out / "model.onnx").stat().st_size < 10_000
        assert int(done.stdout) < 1800  # MiB: one table and its copy at a time, not all five
        session = onnxpress.load(out, verify=False)
        got = session.run({"x": np.array([0, (1 << 17) - 1])})
        assert [set(v.ravel()) for v in got.values()] == [{0}, {1}, {2}, {3}, {4}]
    finally:
        shutil.rmtree(out, ignore_errors=True)


def test_the_press_of_a_factory_can_be_verified(tmp_path):
    out = tmp_path / "out"
    spec = f"{factories.__file__}:linear"
    onnxpress.press(spec, out, measure=False)
    for source, parity in ((None, None), (spec, True)):
        found = {f.check: f.passed for f in verify(out, source=source)}
        assert found == {"files": True, "signature": True, "parity": parity}
