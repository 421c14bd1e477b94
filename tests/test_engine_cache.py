"""The engine cache, with bytes in place of engines: what is opened, and what is refused and why."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnxpress import errors
from onnxpress.artifact import read_manifest
from onnxpress.runtime.engine_cache import Entry, model_sha256

from . import onnx_models

H200 = {
    "onnxruntime": "1.31.1",
    "TensorRT": "10.16.1",
    "GPU": "NVIDIA H200",
    "compute capability": "9.0",
    "driver": "580.65.06",
}


@pytest.fixture
def entry(tmp_path) -> Entry:
    return Entry(tmp_path / "cache", "ab" * 32, {"trt_profile_min_shapes": "x:1"}, H200)


def build(entry: Entry, engine: bytes = b"engine", **files: bytes) -> Entry:
    with entry.build() as folder:
        (folder / "one.engine").write_bytes(engine)
        (folder / "model_ctx.onnx").write_bytes(b"names one.engine")
        for name, data in files.items():
            (folder / name).write_bytes(data)
    return entry


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# Building and opening -------------------------------------------------------------------------


def test_what_was_built_is_opened(entry):
    assert entry.check() is None
    sealed = build(entry).check()
    assert sealed is not None
    assert sealed.model == entry.folder / "model_ctx.onnx"
    assert sealed.engines == 1
    assert names(entry.folder) == {"one.engine", "model_ctx.onnx", "key.json"}
    record = json.loads((entry.folder / "key.json").read_text())
    assert record["machine"] == H200
    assert record["files"]["one.engine"]["bytes"] == 6


def test_no_context_model_of_several_engines(entry):
    sealed = build(entry, second=b"x").check()
    assert sealed is not None
    assert sealed.engines == 1
    with entry.build() as folder:
        for name in ("a.engine", "b.engine", "model_ctx.onnx"):
            (folder / name).write_bytes(b"x")
    again = entry.check()
    assert again is not None
    assert (again.engines, again.model) == (2, None)


@pytest.mark.parametrize("what", ["model", "options", *H200])
def test_everything_that_an_engine_depends_on_is_in_the_key(entry, what):
    other = {
        "model": replace(entry, model="cd" * 32),
        "options": replace(entry, options={"trt_profile_min_shapes": "x:2"}),
    }.get(what) or replace(entry, machine={**H200, what: "other"})
    assert other.key != entry.key
    assert replace(entry, options=dict(entry.options)).key == entry.key


def test_what_a_failed_build_wrote_is_removed(entry):
    def fail() -> None:
        with entry.build() as folder:
            (folder / "one.engine").write_bytes(b"half")
            raise errors.ProviderError("TensorRT gave up")

    with pytest.raises(errors.ProviderError, match="gave up"):
        fail()
    assert entry.check() is None
    assert not [n for n in names(entry.cache) if entry.key in n and not n.endswith(".lock")]


def test_what_a_killed_build_left_is_removed_by_the_next(entry):
    left = entry.cache / f".{entry.key}.0123abcd"
    left.mkdir(parents=True)
    (left / "one.engine").write_bytes(b"half")
    build(entry)
    assert not left.exists()


def test_a_build_replaces_the_engines_that_were_there(entry):
    build(entry, b"old", stale=b"of the last build")
    build(entry, b"new")
    assert (entry.folder / "one.engine").read_bytes() == b"new"
    assert names(entry.folder) == {"one.engine", "model_ctx.onnx", "key.json"}


def test_builds_at_the_same_time_wait_for_each_other(entry):
    inside, most, lock = [0], [0], threading.Lock()
    pause = threading.Event()

    def one(number: int) -> None:
        with entry.build() as folder:
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            pause.wait(0.05)
            (folder / "one.engine").write_bytes(b"%d" % number)
            with lock:
                inside[0] -= 1

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert entry.check() is not None


def test_who_has_waited_for_the_same_engines_builds_none(entry):
    built, start = [], threading.Barrier(3)

    def one(number: int) -> None:
        start.wait()
        with entry.build(rebuild=False) as folder:
            if folder is not None:
                built.append(number)
                (folder / "one.engine").write_bytes(b"x")

    threads = [threading.Thread(target=one, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    cut(entry.folder)  # damaged ones are no reason to do nothing
    one_more = entry.build(rebuild=False)
    with one_more as folder:
        assert folder is not None
        (folder / "one.engine").write_bytes(b"x")
    assert entry.check() is not None


def test_without_locks_nobody_removes_what_another_builds(entry, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", flock)
    other = entry.cache / f".{entry.key}.0123abcd"
    other.mkdir(parents=True)
    build(entry)
    assert other.exists()
    assert entry.check() is not None


def test_measured_kernels_are_shared_by_builds_on_one_machine(entry):
    with entry.build() as folder:
        (folder / "timing" / "sm90.timing").write_bytes(b"first")
        (folder / "one.engine").write_bytes(b"x")
    assert "timing" not in names(entry.folder)
    with replace(entry, model="cd" * 32).build() as folder:
        assert (folder / "timing" / "sm90.timing").read_bytes() == b"first"
    with replace(entry, machine={**H200, "GPU": "other"}).build() as folder:
        assert not list((folder / "timing").iterdir())


# Refusals -------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    (folder / "one.engine").write_bytes(b"eng")


def longer(folder: Path) -> None:
    (folder / "one.engine").write_bytes(b"engine and more")


def changed(folder: Path) -> None:
    (folder / "one.engine").write_bytes(b"enginE")


def missing(folder: Path) -> None:
    (folder / "one.engine").unlink()


def foreign(folder: Path) -> None:
    (folder / "two.engine").write_bytes(b"who wrote this?")


def no_key(folder: Path) -> None:
    (folder / "key.json").unlink()


def half_a_key(folder: Path) -> None:
    text = (folder / "key.json").read_text()
    (folder / "key.json").write_text(text[: len(text) // 2])


def not_an_object(folder: Path) -> None:
    (folder / "key.json").write_text("[]")


def edit(folder: Path, **fields: object) -> None:
    raw = json.loads((folder / "key.json").read_text())
    (folder / "key.json").write_text(json.dumps({**raw, **fields}))


def outside(folder: Path) -> None:
    edit(folder, files={"../one.engine": {"bytes": 6, "sha256": "0"}})


def bad_files(folder: Path) -> None:
    edit(folder, files={"one.engine": {"bytes": "6"}})


def other_options(folder: Path) -> None:
    edit(folder, options={})


DAMAGE = {
    cut: "cut short: it has 3 bytes, and 6 were written",
    longer: "too long",
    changed: "its sha256 differs",
    missing: "is missing",
    foreign: "a file that is not of it",
    no_key: "cannot be read: it is missing",
    half_a_key: "cannot be read",
    not_an_object: "is damaged",
    outside: "is damaged: its files",
    bad_files: "is damaged: its files",
    other_options: "another model or other options",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_damage_is_named_with_the_fix(entry, damage):
    build(entry)
    damage(entry.folder)
    with pytest.raises(errors.ProviderError) as e:
        entry.check()
    assert DAMAGE[damage] in e.value.what
    assert str(entry.folder) in str(e.value.where)
    assert f"delete {entry.folder}, or build it again with `onnxpress warmup DIR`" in str(e.value)


@pytest.mark.parametrize(
    "damage", [d for d in DAMAGE if d is not foreign], ids=lambda d: d.__name__
)
def test_a_build_mends_every_damage(entry, damage):
    build(entry)
    damage(entry.folder)
    build(entry)
    assert entry.check() is not None


@pytest.mark.parametrize("what", H200)
def test_engines_of_another_machine_are_named(entry, what):
    build(entry)
    here = replace(entry, machine={**H200, what: "another"})
    with pytest.raises(errors.ProviderError, match=f"built for {what} {H200[what]}") as e:
        here.check()
    assert "(here: another)" in e.value.what
    assert str(entry.folder) in str(e.value)
    build(here)  # both may lie there
    assert here.check() is not None
    assert entry.check() is not None


def test_engines_copied_under_the_name_of_this_machine_are_named(entry):
    build(entry)
    here = replace(entry, machine={**H200, "GPU": "NVIDIA A100"})
    entry.folder.rename(here.folder)
    with pytest.raises(errors.ProviderError, match=r"NVIDIA H200 \(here: NVIDIA A100"):
        here.check()


def test_engines_of_another_model_are_nobodys_concern(entry):
    build(entry)
    half_a_key(entry.folder)
    assert replace(entry, model="cd" * 32).check() is None


def test_nothing_that_is_not_of_the_cache_is_deleted(entry):
    build(entry)
    (entry.folder / "thesis.tex").write_text("ten years")
    with pytest.raises(errors.OutputError, match=r"holds 'thesis\.tex'"):
        build(entry)
    assert (entry.folder / "thesis.tex").read_text() == "ten years"
    assert (entry.folder / "one.engine").exists()


def test_a_link_in_the_place_of_engines_is_not_followed(entry, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "one.engine").write_bytes(b"mine")
    entry.cache.mkdir()
    entry.folder.symlink_to(tmp_path / "mine")
    with pytest.raises(errors.OutputError, match="no engine cache"):
        build(entry)
    assert names(tmp_path / "mine") == {"one.engine"}


def test_a_cache_that_cannot_be_written_is_told(entry, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(errors.OutputError, match="cannot be written") as e:
        build(entry)
    assert "--cache" in str(e.value.hint)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_permission_is_told(entry):
    entry.cache.mkdir(mode=0o500)
    with pytest.raises(errors.OutputError, match="Permission denied"):
        build(entry)


# The model's hash -----------------------------------------------------------------------------


def test_the_hash_of_a_bare_model_sees_its_weights(tmp_path):
    weights = {"w": np.arange(4096, dtype=np.float32)}
    text = "g (float[4096] x, float[4096] w) => (float[4096] y) { y = Add(x, w) }"
    big = onnx_models.graph(text, weights)
    folder = onnx_models.publish(tmp_path / "b", big)
    model, data = folder / "model.onnx", folder / "model.onnx.data"
    bare = model_sha256(model, None)
    listed = model_sha256(model, read_manifest(folder))
    (folder / "other.data").write_bytes(b"not of the model")
    assert model_sha256(model, None) == bare
    data.write_bytes(data.read_bytes()[:-4] + b"\1\2\3\4")
    assert model_sha256(model, None) != bare
    assert model_sha256(model, read_manifest(folder)) == listed  # its files are checked elsewhere
    model.write_bytes(model.read_bytes() + b"\0\0")
    assert model_sha256(model, None) != bare
    assert model_sha256(model, read_manifest(folder)) != listed  # the graph is always read
    model.write_bytes(b"")
    assert model_sha256(model, None) != bare
