"""The gate: what drifts is mended or refused, what is published says what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxpress
import pytest
from onnxpress import artifact
from onnxpress.errors import GateError, InputError, OnnxpressError, UsageError
from onnxpress.optimizers.pipeline import Change
from onnxpress.optimizers.precision.convert_floats import ConvertFloats
from onnxpress.optimizers.precision.emulate_floats import EmulateFloats
from onnxpress.optimizers.precision.learn_int8 import Int8, learn
from onnxpress.press import candidates, change, verify
from onnxpress.press.lab import Lab
from onnxpress.runtime import load

from . import onnx_models, planted

NAIVE = Int8(smooth=False, compensate=False, correct=False)
CASES: dict[str, Callable[[Path], Path]] = {
    "plain": planted.embedder,
    "channel": lambda path: planted.embedder(path, channel=100.0),
    "rare": lambda path: planted.embedder(path, rare=2),
    "values": lambda path: planted.embedder(path, value=3e4),
    "tensors": planted.tensors,
    "overflow": lambda path: planted.tensors(path, peak=3e3),
    "chain": planted.chain,
    "no layers": planted.without_layers,
    "classify": planted.classifier,
    "classify small": onnx_models.classifier,
    "answer": lambda path: onnx_models.answerer(path, start="red", end="house"),
    "translate": onnx_models.translator,
    "generate": lambda path: onnx_models.generator(path, head_dim=32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("precision")
    planted.texts(path / "calibration.txt", 40, 0)
    planted.texts(path / "eval.txt", 24, 1)
    planted.arrays(path / "calibration", 8, 0)
    planted.arrays(path / "eval", 4, 100)
    return path


@pytest.fixture(scope="module")
def given(folder) -> Callable[[str], Path]:
    """A float32 artifact, made once."""

    def given(case: str) -> Path:
        path = folder / case
        return path if path.exists() else CASES[case](path)

    return given


@pytest.fixture(scope="module")
def examples(folder) -> Callable[[str], dict[str, Path]]:
    """The examples of a case, for Python callers."""

    def examples(case: str) -> dict[str, Path]:
        of = "" if case in ("tensors", "overflow", "chain", "no layers") else ".txt"
        names = {"calibration": "calibration", "evaluation": "eval"}
        return {option: folder / f"{name}{of}" for option, name in names.items()}

    return examples


@pytest.fixture(scope="module")
def made(folder, given, examples) -> Callable[..., Path]:
    """An artifact of another precision, made once; nothing is timed."""

    def made(case: str, **options) -> Path:
        path = folder / " ".join([case, *(f"{k}={v}" for k, v in options.items())]).replace("/", "")
        if not path.exists():
            options = {"measure": False, **examples(case), **options}
            onnxpress.optimize(given(case), path, **options)
        return path

    return made


@pytest.fixture
def refuses(tmp_path, given, examples) -> Callable[..., OnnxpressError]:
    """What `optimize` refuses; and nothing is left behind."""

    def refuses(case: str | Path, error: type[OnnxpressError], **options) -> OnnxpressError:
        source = case if isinstance(case, Path) else given(case)
        given_files = examples(case if isinstance(case, str) else "plain")
        out = tmp_path / "outputs" / "a"
        with pytest.raises(error) as caught:
            onnxpress.optimize(source, out, **{"measure": False, **given_files, **options})
        assert not out.parent.exists() or not list(out.parent.iterdir())
        return caught.value

    return refuses


@pytest.fixture
def lab(tmp_path, given, examples) -> Callable[..., Lab]:
    def lab(case: str, target: str = "cpu") -> Lab:
        files = examples(case)
        return planted.lab(given(case), tmp_path, files["calibration"], files["evaluation"], target)

    return lab


def record(path: Path) -> dict:
    found = artifact.read_manifest(path).precision
    assert found is not None
    return found


def in_float(path: Path) -> list[dict]:
    return [layer for layer in record(path)["layers"] if layer["precision"] == "fp32"]


# What int8 does not hold -----------------------------------------------------------------------


@pytest.mark.parametrize("case", ["channel", "rare"])
def test_naive_int8_fails_on_what_is_planted(lab, case):
    tried = lab(case)
    learned = learn(tried.base, NAIVE, tried.run, tried.batches, real=tried.real)
    assert not tried.judge(tried.attempt("naive", Change(base=learned.passes()))).passed


def test_a_channel_at_100_times_is_smoothed_away(made):
    path = made("channel", precision="int8")
    found = record(path)
    assert found["drift"]["passed"]
    assert found["drift"]["mean"] < 0.001
    assert not in_float(path)
    assert {layer["alpha"] for layer in found["layers"]} - {None}
    assert artifact.read_manifest(path).ops["com.microsoft::MatMulIntegerToFloat"] == 8


def test_what_no_smoothing_mends_goes_back_to_float_and_no_layer_more(made, lab):
    path = made("rare", precision="int8")
    kept = in_float(path)
    assert len(kept) == 2
    # They are those that read the embeddings as they are, and the graph has them in float.
    assert artifact.read_manifest(path).ops["MatMul"] == 2
    for layer in kept:
        assert f"it drifts {layer['sensitivity']:.3g} by itself" in layer["reason"]
        assert "2 layers are in float for a budget of 0.005" in layer["reason"]
    others = [la["sensitivity"] for la in record(path)["layers"] if la not in kept]
    assert max(others) < 0.1 * min(la["sensitivity"] for la in kept)
    tried = lab("rare")
    maker = candidates.int8(tried, [], "minmax", lambda _: None, tried.target)
    assert not tried.judge(maker.make(())).passed
    for layer in maker.layers:  # one in float is too few, whichever it is
        assert not tried.judge(maker.make([layer.name])).passed
    assert tried.judge(maker.make([la["name"] for la in kept])).passed


def test_a_budget_that_nothing_meets_is_refused_with_the_closest_attempt(refuses, made):
    error = refuses("plain", GateError, precision="int8", max_drift=0.0)
    assert error.exit_code == 3
    assert "int8 is past the budget" in error.what
    assert "1 - cosine is" in error.what
    assert "the budget 0" in error.what
    assert "closest" in error.what
    assert "by itself" in error.what
    assert "nothing was published" in error.hint
    drift = record(made("plain", precision="int8", max_drift=0.0, allow_drift=True))["drift"]
    assert drift["allowed"]
    assert not drift["passed"]
    assert drift["why"]
    assert not record(made("plain", precision="int8"))["drift"]["allowed"]


def test_two_runs_write_the_same_bytes(made, given, examples, tmp_path):
    options = {"precision": "int8", "measure": False, **examples("rare")}
    onnxpress.optimize(given("rare"), tmp_path / "again", **options)
    first = made("rare", precision="int8")
    for file in sorted(p.name for p in first.iterdir()):
        if file not in ("report.html", "measured.json"):
            assert (tmp_path / "again" / file).read_bytes() == (first / file).read_bytes(), file


def test_the_mask_of_a_base_graph_need_not_be_one_that_the_cpu_takes(lab):
    """planted.embedder has a mask of one row; the CPU's Attention wants one for each query."""
    tried = lab("plain")
    tapped = [str(n.outputs[0].name) for n in tried.base.graph if n.op_type == "Attention"]
    found = list(tried.run(candidates.with_outputs(tried.base, tapped), tried.batches()))
    assert found[0][tapped[0]].shape[-1] == planted.D


# What 16 bits do not hold ----------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt"])
def test_an_overflow_is_found_kept_and_named(made, lab, target):
    path = made("overflow", precision="fp16", target=target)
    found = record(path)
    assert found["drift"]["passed"]
    types = planted.dtypes(path)
    assert {types[name] for name in "hrk"} == {ir.DataType.FLOAT}
    assert types["s"] == ir.DataType.FLOAT16
    first, second, third = found["layers"]
    assert (first["precision"], second["precision"], third["precision"]) == ("fp32", "fp32", "fp16")
    assert "'h' of 8.14e+04 exceeds 3.28e+04" in first["reason"]
    assert any("MatMul" in n and "float32" in n and "'h'" in n for n in found["notes"])
    assert len(found["recipe"]["kept_in_float32"]) == 3
    tried = lab("overflow", target)
    plain = Change(lowered=[ConvertFloats("fp16"), EmulateFloats()])
    assert not tried.judge(tried.attempt("plain", plain, stand_in=plain)).passed


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_bf16_has_the_range(made, target):
    path = made("overflow", precision="bf16", target=target)
    assert planted.dtypes(path)["h"] == ir.DataType.BFLOAT16
    assert not in_float(path)
    assert record(path)["drift"]["passed"]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_overflow_around_attention_is_kept_where_it_is_fused(made, target):
    """cpu writes branches around Attention after types, and cuda puts the projections into it."""
    path = made("values", precision="fp16", target=target)
    found = record(path)
    assert found["drift"]["mean"] < 1e-5
    for graph in artifact.open_model(path).graphs():
        for node in graph:
            if node.op_type == "Attention":
                assert {v.dtype for v in node.outputs} == {ir.DataType.FLOAT}
    packed = "com.microsoft::Attention" in artifact.read_manifest(path).ops
    assert packed == (target == "cuda")


def test_a_layer_that_is_fused_can_go_back_to_float(lab):
    tried = lab("plain", "cuda")
    maker = candidates.halves(tried, [], "fp16", False, lambda _: None)

    def of_attention(keep: list[str]) -> ir.DataType | None:
        graph = maker.make(keep).model.graph
        node = next(n for n in graph if n.op_type == "Attention")
        assert node.domain == "com.microsoft"
        return node.outputs[0].dtype

    assert of_attention([]) == ir.DataType.FLOAT16
    assert of_attention([maker.layers[0].name]) == ir.DataType.FLOAT  # the queries' projection


# Every precision -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("cpu", "int8"),
        ("cpu", "int8-dynamic"),
        ("cpu", "fp16"),
        ("cuda", "fp16"),
        ("cuda", "bf16"),
        ("tensorrt", "int8"),
        ("tensorrt", "fp16"),
        ("tensorrt", "bf16"),
    ],
)
def test_what_a_target_has(made, given, target, precision):
    path = made("plain", target=target, precision=precision)
    manifest, before = artifact.read_manifest(path), artifact.read_manifest(given("plain"))
    assert manifest.target["provider"] == target
    assert manifest.target["precision"] == precision
    assert manifest.precision["asked"] == manifest.precision["precision"] == precision
    assert manifest.precision["drift"]["passed"]
    assert manifest.precision["eval"]["examples"] == 24
    assert [c["name"] for c in manifest.precision["candidates"]] == ["fp32", precision]
    assert manifest.inputs == before.inputs
    assert manifest.outputs == before.outputs
    onnx.checker.check_model(str(path / "model.onnx"))


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("cpu", "int8"),
        ("cpu", "int8-dynamic"),
        ("cuda", "fp16"),
        ("tensorrt", "int8"),
    ],
)
def test_layers_with_nothing_in_between(made, target, precision):
    path = made("chain", target=target, precision=precision, max_drift=0.2)
    assert record(path)["drift"]["passed"]
    assert not in_float(path)


def test_tensorrt_reads_symmetric_pairs_and_nothing_of_ours(made):
    path = made("plain", target="tensorrt", precision="int8")
    assert not [op for op in artifact.read_manifest(path).ops if "::" in op]
    pairs = {"QuantizeLinear": 0, "DequantizeLinear": 0}
    for node in artifact.open_model(path).graph:
        if node.op_type in pairs:
            pairs[node.op_type] += 1
            zero = node.inputs[2] if len(node.inputs) > 2 else None
            if zero is not None:
                assert zero.dtype == ir.DataType.INT8
                assert not zero.const_value.numpy().any()
    assert pairs["DequantizeLinear"] == pairs["QuantizeLinear"] + 8  # eight weights


@pytest.mark.parametrize("what", ["heads:0.25", "ffn:0.25", "weights:0.5", "2:4"])
def test_pruning_drifts_and_is_refused_or_allowed(refuses, made, given, what):
    target = "tensorrt" if what == "2:4" else "cpu"
    budget = 1e-6
    error = refuses("plain", GateError, prune=what, target=target, max_drift=budget)
    assert "fp32 pruned is past the budget" in error.what
    path = made("plain", prune=what, target=target, max_drift=budget, allow_drift=True)
    found = record(path)
    assert found["drift"]["allowed"]
    name, _, number = what.partition(":")
    if name == "2":
        assert found["pruned"] == {"heads": 0, "ffn": 0, "weights": 0.5, "pattern": "2:4"}
    else:
        assert found["pruned"][name] == float(number)
    weights = {
        tuple(v.shape)
        for v in artifact.open_model(path).graph.initializers.values()
        if len(v.shape) == 2
    }
    smaller = {"heads": {(64, 48), (48, 64)}, "ffn": {(64, 48), (48, 64)}}.get(name, set())
    assert smaller <= weights
    assert (weights == {(39, 64), (64, 64)}) == (not smaller)


@pytest.mark.parametrize(
    ("case", "what", "said"),
    [
        ("channel", "heads:0.1", "all 4 heads stay"),
        ("generate", "heads:0.5", "a cache"),
        ("no layers", "ffn:0.25", "ffn"),
        ("no layers", "2:4", "nothing"),
    ],
)
def test_pruning_that_finds_nothing_is_refused(refuses, case, what, said):
    error = refuses(case, UsageError, prune=what, target="tensorrt", allow_drift=True)
    assert "nothing" in error.what
    assert said in error.what or said in ("ffn", "nothing")


# Speed -----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch) -> Callable[..., None]:
    """Sets what each candidate takes; what is not named takes 10 ms."""

    def clock(**ms: float) -> None:
        def timed(sessions, reference, shapes):
            assert sessions
            row = {name: ms.get(name.replace("-", "_"), 10.0) for name in sessions}
            return [{"batch": 1, "sequence": 16, "ms": row}]

        monkeypatch.setattr(change, "time_sessions", timed)
        monkeypatch.setattr(change, "time_against", lambda *a, **b: {})

    return clock


def test_auto_keeps_the_fastest_that_passes(clock, given, examples, tmp_path):
    options = {"precision": "auto", "max_drift": 0.5, **examples("tensors")}
    for fastest in ("fp16", "int8", "int8-dynamic"):
        clock(fp32=10.0, **{fastest.replace("-", "_"): 3.0})
        found = onnxpress.optimize(given("tensors"), tmp_path / fastest, **options)
        assert found.target["precision"] == found.precision["precision"] == fastest
        rows = {c["name"]: c for c in found.precision["candidates"]}
        assert set(rows) == {"fp32", "int8", "int8-dynamic", "fp16"}
        assert all(row["passed"] for row in rows.values())
        assert [name for name, row in rows.items() if row["kept"]] == [fastest]
    table = json.loads((tmp_path / "int8" / "measured.json").read_text())["candidates"]
    assert {row["name"]: row["ms"]["1x16"] for row in table}["int8"] == 3.0
    # Nothing is faster: it stays what it was, and says so.
    clock(fp32=1.0)
    found = onnxpress.optimize(given("tensors"), tmp_path / "c", **options)
    assert found.precision["precision"] == found.target["precision"] == "fp32"


def test_auto_never_keeps_what_fails(clock, given, examples, tmp_path):
    clock(fp32=10.0, int8=1.0, int8_dynamic=1.0, fp16=5.0)
    options = {"precision": "auto", "max_drift": 1e-3, **examples("tensors")}
    found = onnxpress.optimize(given("tensors"), tmp_path / "a", **options)
    assert found.precision["precision"] == "fp16"
    for row in found.precision["candidates"][1:3]:
        assert row["name"].startswith("int8")
        assert not row["passed"]
        assert "the budget 0.001" in row["why"]


def test_auto_does_not_publish_unpruned_what_was_to_be_pruned(clock, refuses):
    clock(fp32=10.0)
    error = refuses(
        "plain", GateError, precision="auto", prune="ffn:0.25", max_drift=1e-9, measure=True
    )
    assert "pruned" in error.what
    assert "budget" in error.what


def test_what_is_slower_is_refused(clock, refuses, made):
    clock(fp32=2.0, int8=3.0)
    error = refuses("plain", GateError, precision="int8", measure=True)
    assert error.exit_code == 3
    assert "int8 is not faster than fp32 here: 0.67 times its speed" in error.what
    assert "--no-measure" in error.hint
    assert record(made("plain", precision="int8"))["precision"] == "int8"


def test_auto_needs_a_clock(refuses):
    assert "nothing is measured" in refuses("plain", UsageError, precision="auto").what
    for target in ("cuda", "tensorrt"):
        error = refuses("plain", UsageError, precision="auto", target=target, measure=True)
        assert "nothing is measured" in error.what


# Bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "options", "said"),
    [
        ("tensors", {"calibration": None, "evaluation": None}, "no default calibration data"),
        ("no layers", {}, "no MatMul"),
        ("no layers", {"precision": "int8-dynamic"}, "no MatMul"),
        ("classify small", {}, "its weight has 24 elements; below 1024"),
        ("answer", {"calibration": None, "evaluation": None}, "no MatMul"),
        ("translate", {"precision": "int8-dynamic"}, "below 1024"),
        ("plain", {"max_drift": -0.1}, "-0.1"),
        ("plain", {"max_drift": float("nan")}, "nan"),
        ("plain", {"max_drift": float("inf")}, "inf"),
        ("plain", {"calibration": "missing.jsonl"}, "no such file"),
        ("plain", {"evaluation": "missing.jsonl"}, "no such file"),
        ("plain", {"calibrator": "mean"}, "no calibrator 'mean'"),
        ("plain", {"calibrator": "mean", "precision": "fp16"}, "no calibrator 'mean'"),
        ("plain", {"calibrator": "mse", "precision": "fp16"}, "no use with fp16"),
        ("plain", {"precision": "int4"}, "no precision 'int4'"),
        ("plain", {"precision": "bf16"}, "cpu has no bf16: ONNX Runtime has no bf16 kernels"),
        ("plain", {"target": "cuda"}, "cuda has no int8: its provider has no kernel"),
        ("plain", {"target": "cuda", "precision": "int8-dynamic"}, "no DynamicQuantizeLinear"),
        ("plain", {"target": "tensorrt", "precision": "int8-dynamic"}, "at run time"),
        ("plain", {"until": "fold_constants"}, "need every pass"),
        ("plain", {"skip": ["lift_gelu"]}, "need every pass"),
        ("plain", {"precision": "fp32"}, "no use without"),
        ("plain", {"prune": "heads"}, "'heads'"),
        ("plain", {"prune": "heads:1"}, "'heads:1'"),
        ("plain", {"prune": "heads:nan"}, "'heads:nan'"),
        ("plain", {"prune": "heads:0.2,heads:0.3"}, "'heads:0.3'"),
        ("plain", {"prune": "legs:0.5"}, "'legs:0.5'"),
        ("plain", {"prune": ","}, "''"),
        ("plain", {"prune": "2:4,weights:0.5"}, "not both"),
    ],
)
def test_bad_input_is_refused_with_the_reason(refuses, case, options, said):
    error = refuses(case, UsageError, **{"precision": "int8", **options})
    assert error.exit_code == 2
    assert said in error.what, error.what
    assert error.hint or error.where


def test_no_calibration_data_says_how(refuses):
    error = refuses("tensors", UsageError, precision="fp16", calibration=None, evaluation=None)
    assert "--calibration" in error.hint
    assert ".npz" in error.hint


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "fp16"])
def test_what_was_rounded_once_is_not_rounded_again(refuses, made, precision):
    path = made("plain", precision=precision)
    for again in ("int8", "fp16", "int8-dynamic"):
        error = refuses(path, UsageError, precision=again)
        assert "already" in error.what
        assert "float32" in error.hint


def test_what_is_pruned_is_not_changed_again(refuses, made):
    path = made("plain", prune="ffn:0.25", allow_drift=True)
    assert "pruned already" in refuses(path, UsageError, precision="int8").what


def test_one_example_is_enough_and_said_to_prove_little(given, tmp_path):
    calibration = planted.arrays(tmp_path / "one", 1, 0)
    options = {"precision": "int8", "measure": False, "calibration": calibration}
    found = onnxpress.optimize(given("tensors"), tmp_path / "a", **options).precision
    assert found["calibration"]["examples"] == found["eval"]["examples"] == 1
    assert any("proves little" in note for note in found["notes"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_activations_that_are_no_numbers_are_named(refuses, tmp_path, value):
    for part in ("calibration", "eval"):
        planted.arrays(tmp_path / part, 4, 7 if part == "eval" else 0)
    x = onnx_models.normal(0, 4, planted.D)
    x[2, 5] = value
    np.savez(tmp_path / "calibration" / "0.npz", x=x)
    files = {"calibration": tmp_path / "calibration", "evaluation": tmp_path / "eval"}
    for precision in ("int8", "fp16"):
        error = refuses("tensors", InputError, precision=precision, **files)
        assert "'x'" in error.what
        assert error.hint


def test_constant_activations_are_taken_and_said(given, tmp_path):
    for part in ("calibration", "eval"):
        (tmp_path / part).mkdir()
        for i in range(4):
            x = np.full((2, planted.D), 0.5, np.float32)
            np.savez(tmp_path / part / f"{i}.npz", x=x[: 1 + i % 2] if part == "eval" else x)
    np.savez(tmp_path / "eval" / "5.npz", x=np.full((3, planted.D), 0.5, np.float32))
    found = onnxpress.optimize(
        given("tensors"),
        tmp_path / "a",
        precision="int8",
        measure=False,
        calibration=tmp_path / "calibration",
        evaluation=tmp_path / "eval",
    ).precision
    assert any("never change on the calibration data" in note for note in found["notes"])
    assert found["drift"]["passed"]


# Once more -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "fp16"])
@pytest.mark.parametrize("case", ["channel", "generate"])
def test_optimizing_again_keeps_the_record(made, tmp_path, case, precision):
    path = made(case, precision=precision)
    again = onnxpress.optimize(path, tmp_path / "again")
    assert again.precision == record(path)
    assert again.target["precision"] == precision
    assert "<html" in (tmp_path / "again" / "report.html").read_text()


def _from_file(folder: Path, given: Callable[[str], Path], **options) -> Path:
    """An artifact whose source is an .onnx file, which `verify` can read again."""
    source = folder / "theirs.onnx"
    onnx.save(onnx.load(given("tensors") / "model.onnx"), source)
    onnxpress.optimize(source, folder / "a", measure=False, **options)
    return folder / "a"


def _drift(path: Path):
    return next(f for f in verify(path) if f.check == "drift")


def test_verify_makes_the_gate_again(given, examples, tmp_path):
    files = {
        option: shutil.copytree(path, tmp_path / option)
        for option, path in examples("tensors").items()
    }
    path = _from_file(tmp_path, given, precision="int8", max_drift=0.05, **files)
    found = _drift(path)
    assert found.passed
    assert "4 examples against the adopted file" in found.detail
    assert f"mean {record(path)['drift']['mean']:.2g}" in found.detail
    # Weights that someone swapped, in an artifact whose hashes fit.
    swapped = Path(shutil.copytree(path, tmp_path / "swapped"))
    model = ir.load(path / "model.onnx")
    scale = next(
        v
        for v in model.graph.initializers.values()
        if str(v.name).startswith("third") and v.dtype == ir.DataType.FLOAT
    )
    scale.const_value = ir.tensor(scale.const_value.numpy() * 1.5, name=scale.name)
    artifact.save_model(model, swapped)
    with pytest.raises(OnnxpressError, match=r"sha256|bytes"):
        verify(swapped)
    listed = {
        n: {"bytes": f.stat().st_size, "sha256": artifact.sha256(f)}
        for n in artifact.read_manifest(path).files
        for f in [swapped / n]
    }
    onnx_models.edit_manifest(swapped, files=listed)
    with pytest.raises(GateError, match="drifts from the adopted file"):
        verify(swapped)
    # Examples that are others by now, and then gone.
    np.savez(files["evaluation"] / "0.npz", x=onnx_models.normal(55, 4, planted.D))
    found = _drift(path)
    assert found.passed is None
    assert "others by now" in found.detail
    shutil.rmtree(files["evaluation"])
    found = _drift(path)
    assert found.passed is None
    assert "not at hand" in found.detail


def test_verify_takes_a_drift_that_was_allowed(given, examples, tmp_path):
    path = _from_file(tmp_path, given, prune="weights:0.5", allow_drift=True, **examples("tensors"))
    found = _drift(path)
    assert found.passed is False
    assert "budget 0.02" in found.detail


# Every task ------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "fp16"])
def test_generate_keeps_its_cache_and_its_words(made, given, precision):
    path = made("generate", precision=precision, calibration=None, evaluation=None)
    manifest, before = artifact.read_manifest(path), artifact.read_manifest(given("generate"))
    assert manifest.kv == before.kv
    assert manifest.inputs == before.inputs
    assert manifest.outputs == before.outputs
    assert manifest.precision["calibration"]["from"] == "the default calibration set"
    assert manifest.precision["drift"]["extra"]["top1"] > 0.95
    prompts = ["the cat sat", "who is fast"]
    want = load(given("generate")).generate(prompts, max_new_tokens=4)
    got = load(path).generate(prompts, max_new_tokens=4)
    assert [len(text.split()) for text in got] == [len(text.split()) for text in want]


def test_classify(made, given):
    path = made("classify", precision="int8", calibration=None, evaluation=None)
    assert record(path)["drift"]["extra"]["agreement"] >= 0.98
    texts = ["the cat", "a red house near town"]
    want = [found["label"] for found in load(given("classify")).classify(texts)]
    assert [found["label"] for found in load(path).classify(texts)] == want


@pytest.mark.parametrize("case", ["answer", "translate"])
def test_tasks_in_fp16(made, case):
    path = made(case, precision="fp16", target="cuda", calibration=None, evaluation=None)
    assert record(path)["drift"]["passed"]
