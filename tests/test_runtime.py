"""Session and load: what is checked before ONNX Runtime sees it, and what is said when it fails."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from onnxpress import artifact, errors
from onnxpress.artifact import TensorSpec
from onnxpress.runtime import Session, libraries, load, providers, random_feeds, time_runs
from onnxpress.runtime.placement import count_memcpy

from . import onnx_models

X = np.ones((2, 4), np.float32)
M = np.ones((2, 3), np.int64)


@pytest.fixture(scope="module")
def add(tmp_path_factory) -> Session:
    path = tmp_path_factory.mktemp("add") / "a"
    return Session(onnx_models.publish(path, onnx_models.add_model()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Session:
    path = tmp_path_factory.mktemp("cache") / "a"
    return Session(onnx_models.publish(path, onnx_models.cache_model()))


@pytest.fixture(scope="module")
def embedder_dir(tmp_path_factory) -> Path:
    return onnx_models.embedder(tmp_path_factory.mktemp("embedder") / "a")


# Running


def test_run_gives_outputs_by_name(add):
    out = add.run({"x": X, "m": M})
    assert list(out) == ["y", "z"]
    np.testing.assert_array_equal(out["y"], X + X)
    assert list(add.run({"x": X, "m": M}, ["z"])) == ["z"]
    assert add.run({"x": X, "m": M}, []) == {}
    assert add.inputs == (
        TensorSpec("x", "float32", ("batch", 4)),
        TensorSpec("m", "int64", ("batch", "seq")),
    )


def test_arrays_without_elements_and_not_contiguous_are_fine(add):
    big = np.arange(16, dtype=np.float32).reshape(4, 4)
    out = add.run({"x": big.T[::2], "m": M[:, :0]})
    np.testing.assert_array_equal(out["y"], 2 * big.T[::2])
    assert out["z"].shape == (2, 0)
    assert add.run({"x": X[:0], "m": M[:0]})["y"].shape == (0, 4)


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        ({"x": X}, ["'m' is missing"]),
        ({}, ["'x' is missing", "1 more"]),
        ({"x": X, "mm": M}, ["no input 'mm'", "did you mean 'm'?"]),
        ({"x": X, "m": M, "extra": M}, ["no input 'extra'"]),
        ({"x": X.astype(np.float64), "m": M}, ["'x' takes float32, and got float64"]),
        ({"x": X, "m": M.astype(np.int32)}, ["takes int64, and got int32", ".astype(np.int64)"]),
        ({"x": X, "m": M.astype(">i8")}, ["takes int64, and got >i8"]),
        ({"x": X.tolist(), "m": M}, ["no numpy array, but list"]),
        ({"x": X[0], "m": M}, ["'x' has 2 dimensions, and got 1"]),
        ({"x": X[:, :3], "m": M}, ["'x' has shape [2, 3]", "dimension 1 is 3 and must be 4"]),
        ({"x": X, "m": M[:1]}, ["dimension 0 is 1 and must be 2", "'batch' as in the input 'x'"]),
        ([X, M], ["must be a dict"]),
    ],
)
def test_bad_feeds_are_named(add, feeds, said):
    with pytest.raises(errors.InputError) as e:
        add.run(feeds)
    for text in said:
        assert text in str(e.value)
    assert "ONNX Runtime" not in str(e.value)


def test_expressions_over_dimensions_are_checked(cache):
    feeds = {"ids": M, "mask": np.ones((2, 8), np.int64), "past": np.ones((2, 5), np.float32)}
    cache.run(feeds)
    with pytest.raises(errors.InputError, match=r"must be 8: 'p \+ s' with s = 3, p = 5"):
        cache.run({**feeds, "mask": M})


def test_unknown_output(add):
    with pytest.raises(errors.InputError, match="no output 'yy'; did you mean 'y'"):
        add.run({"x": X, "m": M}, ["yy"])


def test_what_onnxruntime_refuses_is_wrapped(embedder_dir):
    session = Session(embedder_dir)
    ids = np.full((1, 2), 10**6)
    with pytest.raises(errors.InputError, match="ONNX Runtime refused") as e:
        session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert e.value.where == str(embedder_dir / "model.onnx")
    assert e.value.hint


def test_sixteen_threads_give_the_answers_of_one(embedder_dir):
    session = Session(embedder_dir, threads=1)
    feeds = [
        random_feeds(session.inputs, {"batch": 1 + n % 4, "sequence": 1 + n % 7}, seed=n, high=HIGH)
        for n in range(64)
    ]
    want = [session.run(f)["last_hidden_state"] for f in feeds]
    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda f: session.run(f)["last_hidden_state"], feeds * 4))
    for n, g in enumerate(got):
        np.testing.assert_array_equal(g, want[n % 64])


HIGH = {"input_ids": len(onnx_models.VOCAB)}


# Placement and providers


def test_placement_names_the_provider_of_every_node(add):
    placement = add.placement()
    assert placement.counts == {"CPUExecutionProvider": 2}
    assert [n.op for n in placement.nodes] == ["Add", "Add"]
    assert placement.memcpy == 0
    assert add.placement() is placement


def test_memcpy_nodes_are_counted_in_the_saved_graph(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 23, "com.x" : 1]> g (float[4] x) => (float[4] y)
    { a = com.x.MemcpyFromHost(x)  b = Relu(a)  c = com.x.MemcpyToHost(b)  y = Abs(c) }"""
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    assert count_memcpy(tmp_path / "m.onnx") == 2


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_compiled_in(add, name):
    if providers.PROVIDERS[name].ort in providers.onnxruntime().get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    with pytest.raises(errors.ProviderError, match=f"has no provider {name!r}") as e:
        Session(add.path, provider=name)
    assert e.value.exit_code == 4
    assert "onnxruntime-gpu" in str(e.value)
    assert "onnxruntime 1." in str(e.value)


def test_unknown_provider_and_stray_options(add):
    with pytest.raises(errors.UsageError, match="did you mean 'cuda'"):
        Session(add.path, provider="cudda")
    with pytest.raises(errors.UsageError, match="no provider"):
        Session(add.path, provider=[])
    with pytest.raises(errors.UsageError, match="not asked for"):
        Session(add.path, provider_options={"cuda": {"device_id": 1}})


def test_options_are_spelled_as_each_provider_reads_them():
    asked = providers.resolve(["tensorrt", "cuda"])
    options = {"tensorrt": {"trt_fp16_enable": True}, "cuda": {"use_tf32": False, "device_id": 1}}
    assert providers.spelled(asked, options) == {
        "tensorrt": {"trt_fp16_enable": "True"},
        "cuda": {"use_tf32": "0", "device_id": "1"},
    }


def test_providers_are_asked_for_by_name_with_commas_or_in_a_list():
    want = ["tensorrt", "cuda", "cpu"]
    for asked in ("tensorrt,cuda,cpu", " tensorrt, cuda ,cpu,", want, tuple(want)):
        assert list(providers.resolve(asked)) == want
    with pytest.raises(errors.UsageError, match="unknown provider 'gpu'"):
        providers.resolve("gpu,cpu")


def fake_ort(came_up: list[str], placed: dict[str, str], opened: list) -> SimpleNamespace:
    """The real module, with sessions that pretend: CUDA is compiled in, nodes lie as `placed`."""
    real = providers.onnxruntime()

    class Fake:
        def __init__(self, path, options, providers, disabled_optimizers, enable_fallback):
            strict = options.get_session_config_entry("session.disable_cpu_ep_fallback")
            opened.append(strict)
            assert enable_fallback == 0
            if strict == "1" and "CPUExecutionProvider" in placed.values():
                raise RuntimeError("nodes on CPU, but fallback to CPU EP has been disabled")
            plain = real.SessionOptions()
            plain.optimized_model_filepath = options.optimized_model_filepath
            self.real = real.InferenceSession(path, plain)

        def __getattr__(self, name):
            return getattr(self.real, name)

        def get_providers(self):
            return came_up

        def get_provider_graph_assignment_info(self):
            return [
                SimpleNamespace(
                    ep_name=ep,
                    get_nodes=lambda n=name: [SimpleNamespace(name=n, op_type="Add", domain="")],
                )
                for name, ep in placed.items()
            ]

    def options():
        made = real.SessionOptions()
        made.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
        return made

    return SimpleNamespace(
        **{k: getattr(real, k) for k in ("GraphOptimizationLevel", "__file__")},
        SessionOptions=options,
        InferenceSession=Fake,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )


CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture
def no_libraries(monkeypatch):
    """As on a system whose libraries nobody looks into."""
    monkeypatch.setattr(libraries, "examine", lambda library: [])


def test_a_session_that_came_up_without_the_provider_is_refused(add, monkeypatch, no_libraries):
    fake = fake_ort([CPU], {"one": CPU}, [])
    monkeypatch.setattr(providers, "onnxruntime", lambda: fake)
    with pytest.raises(errors.ProviderError, match="left out the provider 'cuda'") as e:
        Session(add.path, provider="cuda")
    assert "libonnxruntime_providers_cuda.so" in str(e.value)  # what the loader says
    # Also where falling to the CPU was allowed: the provider asked for is not there at all.
    with pytest.raises(errors.ProviderError, match="left out"):
        Session(add.path, provider="cuda", allow_fallback=True)
    # As one of an order of preference it is skipped, and that is told.
    session = Session(add.path, provider="cuda,cpu")
    assert session.provider == "cpu"
    assert [s.provider for s in session.skipped] == ["cuda"]
    assert "left out the provider 'cuda'" in session.skipped[0].why


def test_nodes_that_fell_to_the_cpu_are_named(add, monkeypatch, no_libraries):
    opened = []
    fake = fake_ort([CUDA, CPU], {"one": CUDA, "other": CPU}, opened)
    monkeypatch.setattr(providers, "onnxruntime", lambda: fake)
    with pytest.raises(errors.ProviderError, match="1 of 2 nodes do not run on cuda") as e:
        Session(add.path, provider="cuda")
    assert "Add 'other'" in str(e.value)
    assert "allow_fallback=True" in str(e.value)
    assert opened == ["1", "0"]
    session = Session(add.path, provider="cuda", allow_fallback=True)
    assert session.placement().counts == {CUDA: 1, CPU: 1}
    assert (session.provider, session.skipped) == ("cuda", ())


def test_a_session_that_is_all_where_it_should_be(add, monkeypatch, no_libraries):
    fake = fake_ort([CUDA, CPU], {"one": CUDA, "other": CUDA}, [])
    monkeypatch.setattr(providers, "onnxruntime", lambda: fake)
    session = Session(add.path, provider="cuda")
    assert session.placement().memcpy == 0


def test_missing_library_is_what_the_loader_says(tmp_path):
    assert "cannot open" in providers.missing_library(tmp_path / "libnone.so")
    (tmp_path / "libbad.so").write_bytes(b"not a library")
    assert providers.missing_library(tmp_path / "libbad.so")


def test_without_onnxruntime_the_pip_line_is_given(add, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(errors.MissingPackage, match=r"onnxpress\[cpu\]"):
        Session(add.path)


# Opening


def test_load_gives_the_session_of_a_tensors_artifact(add):
    assert isinstance(load(add.path.parent), Session)


@pytest.fixture
def copy(embedder_dir, tmp_path) -> Path:
    return Path(shutil.copytree(embedder_dir, tmp_path / "copy"))


def test_a_flipped_byte_is_found(copy):
    weights = copy / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(errors.ArtifactError, match="sha256 differs") as e:
        load(copy)
    assert e.value.where == str(weights)
    load(copy, verify=False)  # sizes only


def test_a_missing_file_and_a_short_one_are_found_without_hashing(copy):
    (copy / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(errors.ArtifactError, match="has 5 bytes"):
        load(copy, verify=False)
    (copy / "model.onnx.data").unlink()
    with pytest.raises(errors.ArtifactError, match="is missing"):
        load(copy, verify=False)


def change(path: Path, **fields) -> None:
    onnx_models.edit_manifest(path, **fields)


def test_a_newer_format_and_an_unknown_task(copy):
    change(copy, task="paint")
    with pytest.raises(errors.ArtifactError, match="'paint'"):
        load(copy)
    change(copy, format=99)
    with pytest.raises(errors.ArtifactError, match="format 99"):
        load(copy)


def test_a_missing_setting_is_named(copy):
    change(copy, settings={"max_length": 12})
    with pytest.raises(errors.ArtifactError, match="'pooling'"):
        load(copy).embed(["a"])


def test_no_model_and_a_broken_model(tmp_path):
    with pytest.raises(errors.ArtifactError, match="no model"):
        Session(tmp_path / "none.onnx")
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(errors.ArtifactError, match="cannot load the graph"):
        Session(tmp_path)
    with pytest.raises(errors.ArtifactError, match="no onnxpress artifact"):
        load(tmp_path)


def test_the_manifest_says_whether_onnxruntime_optimizes(tmp_path):
    model = onnx_models.add_model()
    path = onnx_models.publish(tmp_path / "a", model, runtime={"optimize": False})
    assert Session(path)._model.optimize is False
    assert Session(path, optimize=True)._model.optimize is True


def test_neither_torch_nor_onnx_is_in_the_process(embedder_dir):
    code = """if True:
        import sys
        import onnxpress.runtime
        onnxpress.runtime.load(sys.argv[1]).embed(["the cat"])
        heavy = {"torch", "onnx", "onnx_ir", "onnxscript", "click"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-W", "error", "-c", code, embedder_dir], check=True)


# Dimensions, feeds, timing


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (3, 3),
        ("a", 2),
        ("a + b", 7),
        ("2*(b - a) // 3", 2),
        ("-a + b", 3),
        ("a.b", None),
        ("c + 1", None),
        ("a // (b - 5)", None),
        ("Max(a, b)", None),
        ("__import__('os')", None),
        ("a ** b", None),
        ("?", None),
        ("+", None),
    ],
)
def test_dimension_expressions(text, want):
    assert artifact.evaluate(text, {"a": 2, "b": 5}) == want


def test_random_feeds():
    inputs = (
        TensorSpec("input_ids", "int64", ("batch", "s")),
        TensorSpec("attention_mask", "int64", ("batch", "past_sequence + s")),
        TensorSpec("position_ids", "int64", ("batch", "s")),
        TensorSpec("past", "float32", ("batch", 2, "past_sequence", 4)),
        TensorSpec("flag", "bool", ()),
    )
    sizes = {"batch": 2, "s": 3, "past_sequence": 5}
    feeds = random_feeds(inputs, sizes, seed=1, high={"input_ids": 7})
    assert {n: (a.shape, a.dtype.name) for n, a in feeds.items()} == {
        "input_ids": ((2, 3), "int64"),
        "attention_mask": ((2, 8), "int64"),
        "position_ids": ((2, 3), "int64"),
        "past": ((2, 2, 5, 4), "float32"),
        "flag": ((), "bool"),
    }
    assert feeds["input_ids"].max() < 7
    assert feeds["attention_mask"].all()
    assert feeds["position_ids"][0].tolist() == [5, 6, 7]
    again = random_feeds(inputs, sizes, seed=1, high={"input_ids": 7})
    assert all((feeds[n] == again[n]).all() for n in feeds)
    with pytest.raises(errors.InputError, match="'batch'"):
        random_feeds(inputs, {"s": 3, "past_sequence": 5})


def test_time_runs_interleaves_and_ranks():
    calls = []
    work = {
        "short": lambda: calls.append("s"),
        "long": lambda: (calls.append("l"), sum(range(10**5))),
    }
    times = time_runs(work, rounds=3, min_seconds=0.005)
    assert times["short"].median < times["long"].median
    assert times["long"].min <= times["long"].median <= times["long"].max
    switches = sum(a != b for a, b in itertools.pairwise(calls))
    assert switches >= 4
    with pytest.raises(errors.InputError):
        time_runs(work, rounds=0)
