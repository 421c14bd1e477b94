"""Warming up: on the CPU and OpenVINO for real, on TensorRT with a session that writes bytes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from onnxpress import errors
from onnxpress.artifact import TensorSpec, read_manifest
from onnxpress.cli import warm as cli
from onnxpress.runtime import Session, plans, warmup
from onnxpress.runtime.profiles import parse_shapes

from . import onnx_models
from .null_gpu import on_null_gpu

SHAPES = parse_shapes("batch=1:2:4,sequence=1:3:5")


@pytest.fixture
def directory(tmp_path) -> Path:
    return onnx_models.publish(tmp_path / "a", onnx_models.cache_model())


@pytest.fixture
def varying(tmp_path) -> Path:
    text = "g (float[batch, sequence] x) => (float[batch, sequence] y) { y = Relu(x) }"
    return onnx_models.publish(tmp_path / "v", onnx_models.graph(text))


# The CPU --------------------------------------------------------------------------------------


def test_the_cpu_runs_the_ends_of_the_ranges_and_keeps_nothing(varying, tmp_path):
    found = warmup.warmup(varying, shapes=SHAPES, cache=tmp_path / "c")
    assert found["provider"] == "cpu"
    assert [r["sizes"] for r in found["runs"]] == [
        {"batch": 1, "sequence": 1},
        {"batch": 2, "sequence": 3},
        {"batch": 4, "sequence": 5},
    ]
    assert (found["cache"], found["build_seconds"]) == (None, None)
    assert "nothing" in found["note"]
    assert not (tmp_path / "c").exists()


def test_ranges_of_the_manifest_are_taken(varying):
    ranges = {name: list(sizes) for name, sizes in SHAPES.items()}
    onnx_models.edit_manifest(varying, runtime={"onnxruntime": ">=1.31", "shapes": ranges})
    assert len(warmup.warmup(varying)["runs"]) == 3


def test_without_ranges_there_is_one_run_of_usual_sizes(varying):
    (run,) = warmup.warm(Session(varying))
    assert run["sizes"] == {"batch": 1, "sequence": 16}
    assert run["first"] > 0


def test_fixed_shapes_run_once(tmp_path):
    fixed = onnx_models.graph("g (float[2, 4] x) => (float[2, 4] y) { y = Relu(x) }")
    (run,) = warmup.warmup(onnx_models.publish(tmp_path / "f", fixed))["runs"]
    assert run["sizes"] == {}


def test_models_with_a_cache_are_fed(directory):
    assert warmup.warmup(directory)["runs"]


def test_a_bare_model_is_taken(varying):
    assert warmup.warmup(varying / "model.onnx", shapes=SHAPES)["provider"] == "cpu"


class Shared:
    """A session with a decoder's signature whose cache is one buffer; it keeps what it was fed."""

    inputs = (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("seqlens_k", "int32", ("batch",)),
        TensorSpec("total_sequence_length", "int32", (1,)),
        TensorSpec("past_key_values.0.key", "float16", ("batch", 2, "capacity", 4)),
    )

    def __init__(self, manifest: Any) -> None:
        self.manifest, self.fed = manifest, list[dict[str, np.ndarray]]()

    def run(self, feeds: dict[str, np.ndarray]) -> None:
        self.fed.append(feeds)


def test_shared_caches_get_lengths_that_fit(directory):
    kv = {
        "layout": "shared", "lengths": "seqlens_k", "total": "total_sequence_length",
        "dtype": "float16", "head_dim": 4, "kv_heads": 2, "layers": 1, "past": "p", "present": "q",
    }  # fmt: skip
    onnx_models.edit_manifest(directory, kv=kv)
    session = Shared(read_manifest(directory))
    warmup.warm(session, shapes=parse_shapes("batch=2,sequence=7"))  # type: ignore[arg-type]
    fed = session.fed[0]
    assert fed["seqlens_k"].tolist() == [6, 6]
    assert fed["total_sequence_length"].tolist() == [7]
    assert fed["past_key_values.0.key"].shape == (2, 2, 7, 4)


def test_without_a_manifest_lengths_still_fit():
    session = Shared(None)
    feeds = warmup.feeds_of(session, {"batch": 1, "sequence": 8})  # type: ignore[arg-type]
    assert feeds["seqlens_k"].tolist() == [7]
    assert feeds["total_sequence_length"].tolist() == [8]
    assert feeds["past_key_values.0.key"].shape == (1, 2, 8, 4)


def test_what_any_provider_may_run_is_warmed_on_the_cpu(varying):
    target = {**read_manifest(varying).target, "provider": "any"}
    onnx_models.edit_manifest(varying, target=target)
    assert warmup.warmup(varying)["provider"] == "cpu"


@pytest.mark.parametrize(("provider", "points"), [("tensorrt", [3]), ("cuda", [1, 3, 5])])
def test_tensorrt_captures_the_best_sizes_alone(varying, provider, points):
    """It holds one graph a session, and refuses the second."""

    class Bound:
        inputs, manifest = Session(varying).inputs, None

        def bind(self) -> Bound:
            return self

        def input(self, name: str, value: np.ndarray) -> None: ...

        def run(self) -> None: ...

    session: Any = Bound()
    session.provider = provider
    runs = warmup.warm(session, shapes=SHAPES, cuda_graph=True)
    assert [r["sizes"]["sequence"] for r in runs] == points


# Refusals -------------------------------------------------------------------------------------


def test_what_is_wrong_is_told(varying, tmp_path):
    with pytest.raises(errors.ArtifactError, match="no model here"):
        warmup.warmup(tmp_path / "nowhere")
    with pytest.raises(errors.UsageError, match="for one provider, not for cuda, cpu"):
        warmup.warmup(varying, provider="cuda,cpu")
    with pytest.raises(errors.UsageError, match=r"'bach'.*did you mean 'batch'"):
        warmup.warmup(varying, shapes={"bach": (1, 1, 1)})
    with pytest.raises(errors.UsageError, match="CUDA graphs"):
        warmup.warmup(varying, provider="cpu", cuda_graph=True)
    (tmp_path / "bad.onnx").write_bytes(b"\xff\xff\xff")
    with pytest.raises(errors.ArtifactError, match="cannot be read"):
        warmup.warmup(tmp_path / "bad.onnx", provider="tensorrt")


def test_tensorrt_asks_for_ranges_before_anything_else(varying):
    with pytest.raises(errors.UsageError, match="'batch', 'sequence'"):
        warmup.warmup(varying, provider="tensorrt")


def test_a_machine_without_the_provider_keeps_an_empty_cache(varying, tmp_path):
    with pytest.raises(errors.ProviderError):
        warmup.warmup(varying, provider="tensorrt", shapes=SHAPES, cache=tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.engine"))
    assert not list((tmp_path / "c").rglob("key.json"))


# TensorRT, with a session that writes what ONNX Runtime would ---------------------------------


class Engines:
    """In place of Session: leaves engines where the options say, and runs nothing."""

    opened: list[plans.Plan]
    engines = ("one.engine",)
    fails = False

    def __init__(self, path: Path, *, provider: str, provider_options: Any, **wish: Any) -> None:
        self.manifest = read_manifest(path)
        self.inputs = self.manifest.inputs
        self.plan = plans.plan(
            provider,
            specs=self.inputs,
            model=path / "model.onnx",
            manifest=self.manifest,
            given=provider_options[provider],
            **wish,
        )
        self.opened.append(self.plan)
        if context := self.plan.options.get("trt_ep_context_file_path"):
            Path(context).write_bytes(b"context")
            for name in self.engines:
                Path(context).with_name(name).write_bytes(name.encode())
            if self.fails:
                raise errors.ProviderError("the driver went away")

    def run(self, feeds: dict[str, np.ndarray]) -> None:
        if self.plan.profile is not None:
            self.plan.profile.check(feeds)


@pytest.fixture
def engines(monkeypatch) -> type[Engines]:
    class Own(Engines):
        opened: list[plans.Plan] = []  # noqa: RUF012

    monkeypatch.setattr(warmup, "Session", Own)
    return Own


def test_engines_are_built_sealed_and_opened(varying, tmp_path, engines):
    steps: list[str] = []
    options = {"provider": "tensorrt", "shapes": SHAPES, "cache": tmp_path / "c"}
    found = warmup.warmup(varying, tell=steps.append, **options)
    building, last = engines.opened
    assert building.model == varying / "model.onnx"
    assert building.options["trt_dump_ep_context_model"] == "True"
    assert building.options["trt_profile_opt_shapes"] == "x:2x3"
    assert last.model.name == "model_ctx.onnx"
    assert last.model.parent == Path(found["cache"]["folder"])
    assert found["cache"]["engines"] == 1
    assert found["build_seconds"] is not None
    assert len(found["runs"]) == 3
    again = warmup.warmup(varying, **options)
    assert again["build_seconds"] is None
    assert again["cache"] == found["cache"]
    assert warmup.warmup(varying, rebuild=True, **options)["build_seconds"] is not None


def test_warmups_at_the_same_time_build_once(varying, tmp_path, engines, monkeypatch):
    options = {"provider": "tensorrt", "shapes": SHAPES, "cache": tmp_path / "c"}
    start, found = threading.Barrier(3), []
    monkeypatch.setattr(warmup, "_whole", lambda *_: start.wait() < 0)  # all see an empty cache
    threads = [
        threading.Thread(target=lambda: found.append(warmup.warmup(varying, **options)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("trt_dump_ep_context_model" in plan.options for plan in engines.opened) == 1
    assert sorted(one["build_seconds"] is None for one in found) == [False, True, True]


def test_damaged_engines_are_built_anew(varying, tmp_path, engines):
    steps: list[str] = []
    options = {"provider": "tensorrt", "shapes": SHAPES, "cache": tmp_path / "c"}
    found = warmup.warmup(varying, **options)
    (Path(found["cache"]["folder"]) / "one.engine").write_bytes(b"cut")
    assert warmup.warmup(varying, tell=steps.append, **options)["build_seconds"] is not None
    assert "cut short" in steps[0]


@pytest.mark.parametrize("broken", [{"engines": ()}, {"fails": True}], ids=str)
def test_a_build_that_fails_leaves_nothing(varying, tmp_path, engines, broken):
    for name, value in broken.items():
        setattr(engines, name, value)
    with pytest.raises(errors.ProviderError, match=r"built no engine|went away"):
        warmup.warmup(varying, provider="tensorrt", shapes=SHAPES, cache=tmp_path / "c")
    assert not list((tmp_path / "c").rglob("*.engine"))


# The null GPU ---------------------------------------------------------------------------------


def test_cuda_graphs_are_captured_on_the_null_gpu(varying):
    found = on_null_gpu(
        """
        import json, sys
        from onnxpress.runtime.warmup import warmup
        shapes = {"batch": (1, 2, 4), "sequence": (1, 3, 5)}
        plain = warmup(sys.argv[1], provider="cuda", shapes=shapes)
        captured = warmup(sys.argv[1], provider="cuda", shapes=shapes, cuda_graph=True)
        print(json.dumps([plain, captured]))
        """,
        varying,
    )
    for one in found:
        assert one["provider"] == "cuda"
        assert len(one["runs"]) == 3
        assert one["cache"] is None


# The command line -----------------------------------------------------------------------------


def warm_up(*arguments: object) -> Any:
    group = click.Group(commands={"warmup": cli.warmup})
    return CliRunner().invoke(group, ["warmup", *map(str, arguments)])


def test_the_command_prints_a_table_and_json(varying):
    done = warm_up(varying, "--shapes", "batch=1:2:4,sequence=1:3:5")
    assert done.exit_code == 0, done.output
    assert "a session on cpu opens in" in done.output
    assert "batch=4, sequence=5" in done.output
    done = warm_up(varying, "--shapes", "batch=2", "--json")
    assert json.loads(done.output)["runs"][0]["sizes"] == {"batch": 2, "sequence": 16}


def test_the_command_refuses_nonsense(varying):
    assert isinstance(warm_up(varying, "--shapes", "batch").exception, errors.UsageError)
    assert isinstance(warm_up(varying, "--shapes", "").exception, errors.UsageError)
