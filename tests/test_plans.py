"""Provider options and profiles: what we write, why it is refused, and what the bindings take."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxpress import errors
from onnxpress.artifact import Manifest, TensorSpec
from onnxpress.runtime import plans
from onnxpress.runtime.engine_cache import Entry, cache_directory
from onnxpress.runtime.profiles import parse_shapes, profile_of, text_of

from . import onnx_models
from .null_gpu import null_gpu, on_null_gpu

ENCODER = (
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("attention_mask", "int64", ("batch", "sequence")),
)
DECODER = (
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("attention_mask", "int64", ("batch", "past_sequence + sequence")),
    TensorSpec("past.0.key", "float16", ("batch", 3, "past_sequence", 64)),
    TensorSpec("scale", "float16", (1,)),
)
SHAPES = parse_shapes("batch=1:8:32,sequence=16:128:512")
MODEL = Path("model.onnx")


def manifest(provider: str = "cpu", **fields: object) -> Manifest:
    target = {"provider": provider, "precision": "fp16", "opset": 23}
    return Manifest("tensors", {}, target, ENCODER, (), **fields)  # type: ignore[arg-type]


# Sizes ----------------------------------------------------------------------------------------


def test_ranges_are_parsed():
    assert parse_shapes("batch=1:8:32, sequence = 16 : 128 : 512,") == {
        "batch": (1, 8, 32),
        "sequence": (16, 128, 512),
    }
    assert parse_shapes("batch=8") == {"batch": (8, 8, 8)}
    assert parse_shapes("batch=1:32") == {"batch": (1, 32, 32)}
    assert parse_shapes("past_sequence=0:64:512")["past_sequence"] == (0, 64, 512)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there are no sizes"),
        (" , ", "there are no sizes"),
        ("batch", "'batch' is no range"),
        ("batch=", "is no range"),
        ("=3", "is no range"),
        ("batch=1:2:3:4", "is no range"),
        ("batch=one", "is no range"),
        ("batch=-1", "is no range"),
        ("batch=1.5", "is no range"),
        ("batch=²", "is no range"),
        ("past + 1=2", "is no range"),
        ("batch=1;sequence=2", "is no range"),
        ("batch=8:1:32", "do not rise: 8:1:32"),
        ("batch=1:64:32", "do not rise"),
        ("batch=0", "must lie in 1.."),
        ("batch=1:3000000000", "must lie in 1.."),
        ("batch=1,batch=2", "given twice"),
    ],
)
def test_nonsense_for_ranges_is_refused(text, said):
    with pytest.raises(errors.UsageError, match=said) as e:
        parse_shapes(text)
    assert "--shapes" in str(e.value.hint)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.lists(st.integers(1, 10**6), min_size=3, max_size=3).map(lambda n: tuple(sorted(n))),
        min_size=1,
    )
)
def test_ranges_come_back_from_their_text(shapes):
    assert parse_shapes(text_of(shapes)) == shapes


@given(st.text(alphabet="ab=:,0 19-²", max_size=12))
def test_any_text_is_parsed_or_refused_as_usage(text):
    try:
        found = parse_shapes(text)
    except errors.UsageError:
        return
    assert found
    assert all(0 <= a <= b <= c and c for a, b, c in found.values())


# Profiles -------------------------------------------------------------------------------------


def test_a_profile_has_every_varying_input_and_no_other():
    shapes = {"batch": (1, 4, 8), "sequence": (1, 1, 16), "past_sequence": (0, 128, 500)}
    profile = profile_of(DECODER, shapes)
    assert profile is not None
    assert profile.text(0) == "input_ids:1x1,attention_mask:1x1,past.0.key:1x3x0x64"
    assert profile.text(1) == "input_ids:4x1,attention_mask:4x129,past.0.key:4x3x128x64"
    assert profile.text(2) == "input_ids:8x16,attention_mask:8x516,past.0.key:8x3x500x64"
    assert profile.sizes(2) == {"batch": 8, "sequence": 16, "past_sequence": 500}


def test_fixed_shapes_need_no_profile():
    assert profile_of((TensorSpec("x", "float32", (2, 4)),), {}) is None


def test_a_difference_is_least_where_the_other_side_is_greatest():
    specs = (TensorSpec("x", "float32", ("total - past", "total", "past")),)
    profile = profile_of(specs, {"total": (10, 12, 20), "past": (0, 4, 8)})
    assert profile is not None
    assert profile.inputs["x"] == ((2, 10, 0), (8, 12, 4), (20, 20, 8))
    with pytest.raises(errors.UsageError, match="no range of sizes with total=5:12:20,past=0:4:8"):
        profile_of(specs, {"total": (5, 12, 20), "past": (0, 4, 8)})


def test_missing_ranges_are_all_named_with_the_form():
    with pytest.raises(errors.UsageError, match="'sequence', 'past_sequence'") as e:
        profile_of(DECODER, {"batch": (1, 1, 1)})
    assert "sequence=LEAST:BEST:MOST,past_sequence=LEAST:BEST:MOST" in str(e.value.hint)
    assert "attention_mask" in str(e.value.where)
    assert "scale" not in str(e.value.where)


@pytest.mark.parametrize(
    ("specs", "shapes", "said"),
    [
        (ENCODER, {**SHAPES, "sequense": (1, 1, 1)}, "did you mean 'sequence'"),
        (ENCODER, {**SHAPES, "batch": (1, 8)}, "three whole numbers"),
        (ENCODER, {**SHAPES, "batch": (1, 8.0, 9)}, "three whole numbers"),
        (ENCODER, {**SHAPES, "batch": "1:8:9"}, "three whole numbers"),
        (ENCODER, {**SHAPES, "batch": 8}, "three whole numbers"),
        (ENCODER, {**SHAPES, "batch": (3, 2, 1)}, "do not rise"),
        ((TensorSpec("x", "float32", ("?",)),), {}, "a dimension without a name"),
        ((TensorSpec("a:b", "float32", ("n",)),), {"n": (1, 1, 1)}, "holds ':' or ','"),
    ],
)
def test_profiles_that_cannot_be(specs, shapes, said):
    with pytest.raises(errors.UsageError, match=said):
        profile_of(specs, shapes)


def test_a_run_outside_the_profiles_is_named_with_the_fix():
    profile = profile_of(ENCODER, SHAPES)
    assert profile is not None
    for batch, length in ((1, 16), (32, 512), (8, 100)):
        profile.check({s.name: np.ones((batch, length), np.int64) for s in ENCODER})
    for shape, axis, size, taken in (
        ((33, 16), 0, 33, "1..32"),
        ((1, 513), 1, 513, "16..512"),
        ((1, 15), 1, 15, "16..512"),
    ):
        with pytest.raises(errors.InputError, match="outside the profiles") as e:
            profile.check({s.name: np.ones(shape, np.int64) for s in ENCODER})
        assert "'input_ids'" in e.value.what
        assert taken in e.value.what
        assert f"dimension {axis}" in e.value.what
        assert f"is {size}," in e.value.what
    assert '"batch=1:8:32,sequence=15:128:512"' in str(e.value.hint)


# Plans ----------------------------------------------------------------------------------------


def test_cuda_is_exact_and_takes_what_it_needs():
    plan = plans.plan("cuda", specs=ENCODER, model=MODEL, manifest=manifest("cuda"))
    assert plan.options == {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
    assert (plan.config, plan.model, plan.profile, plan.graph_option) == ({}, MODEL, None, False)


def test_cuda_graphs_and_the_users_options_that_win():
    plan = plans.plan(
        "cuda", specs=ENCODER, model=MODEL, manifest=manifest(), cuda_graph=True,
        given={"use_tf32": "1", "gpu_mem_limit": "1000"},
    )  # fmt: skip
    assert plan.options["enable_cuda_graph"] == "1"
    assert plan.graph_option
    assert plan.options["use_tf32"] == "1"
    assert plan.options["gpu_mem_limit"] == "1000"


@pytest.mark.parametrize(
    ("value", "on"),
    [("1", True), ("True", True), ("true", True), ("0", False), ("False", False), ("", False)],
)
def test_graphs_are_on_in_every_spelling_of_true(value, on):
    given = {"enable_cuda_graph": value}
    plan = plans.plan("cuda", specs=ENCODER, model=MODEL, manifest=manifest(), given=given)
    assert plan.graph_option is on


def test_weight_kernels_only_where_the_graph_has_their_operator(tmp_path):
    four_bits = manifest("cuda", ops={"com.microsoft::MatMulNBits": 7, "Add": 1})
    plan = plans.plan("cuda", specs=ENCODER, model=MODEL, manifest=four_bits)
    assert plan.config == {"ep.cuda.fpa_intb_gemm": "1"}
    empty = {"manifest": four_bits, "cache": tmp_path / "no"}
    assert "fpa" not in str(plans.plan("tensorrt", specs=(), model=MODEL, **empty))


def test_tensorrt_has_profiles_and_no_precision(tmp_path):
    plan = plans.plan("tensorrt", specs=ENCODER, model=MODEL, shapes=SHAPES, cache=tmp_path / "no")
    assert plan.options == {
        "trt_profile_min_shapes": "input_ids:1x16,attention_mask:1x16",
        "trt_profile_opt_shapes": "input_ids:8x128,attention_mask:8x128",
        "trt_profile_max_shapes": "input_ids:32x512,attention_mask:32x512",
    }
    assert plan.profile is not None
    assert plan.model == MODEL
    assert not plan.graph_option
    assert not (tmp_path / "no").exists()


def test_tensorrt_takes_the_ranges_of_the_manifest_and_booleans_in_its_spelling(tmp_path):
    ranges = {name: list(sizes) for name, sizes in SHAPES.items()}
    plan = plans.plan(
        "tensorrt", specs=ENCODER, model=MODEL, manifest=manifest(runtime={"shapes": ranges}),
        cache=tmp_path / "no", cuda_graph=True,
    )  # fmt: skip
    assert plan.options["trt_profile_max_shapes"] == "input_ids:32x512,attention_mask:32x512"
    assert plan.options["trt_cuda_graph_enable"] == "True"
    assert plan.graph_option


def test_tensorrt_without_ranges_asks_for_them():
    with pytest.raises(errors.UsageError, match="'batch', 'sequence'"):
        plans.plan("tensorrt", specs=ENCODER, model=MODEL)


def test_openvino_runs_on_the_cpu_and_writes_no_files_unasked(tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "none"))
    made = manifest("openvino", runtime={"provider_options": {"load_config": "{}"}})
    plan = plans.plan("openvino", specs=ENCODER, model=MODEL, manifest=made)
    assert plan.options == {"device_type": "CPU", "load_config": "{}"}
    plan = plans.plan("openvino", specs=ENCODER, model=MODEL, cache=tmp_path)
    assert plan.options == {"device_type": "CPU", "cache_dir": str(tmp_path / "openvino")}


def test_options_of_a_manifest_are_for_its_own_provider():
    made = manifest("openvino", runtime={"provider_options": {"load_config": "{}"}})
    assert "load_config" not in plans.plan("cuda", specs=(), model=MODEL, manifest=made).options


def test_other_providers_get_what_the_user_gives():
    plan = plans.plan("coreml", specs=ENCODER, model=MODEL, given={"ModelFormat": "MLProgram"})
    assert plan.options == {"ModelFormat": "MLProgram"}


def test_the_cpu_has_no_options_and_no_graphs():
    assert plans.plan("cpu", specs=ENCODER, model=MODEL).options == {}
    with pytest.raises(errors.UsageError, match="no option 'use_arena', and none at all"):
        plans.plan("cpu", specs=ENCODER, model=MODEL, given={"use_arena": "1"})
    with pytest.raises(errors.UsageError, match="'openvino' has no CUDA graphs"):
        plans.plan("openvino", specs=ENCODER, model=MODEL, cuda_graph=True)


def test_ranges_for_names_that_no_input_has_are_refused_everywhere():
    with pytest.raises(errors.UsageError, match=r"no input has a dimension 'bach'.*'batch'"):
        plans.plan("cuda", specs=ENCODER, model=MODEL, shapes={"bach": (1, 1, 1)})


# Engines from the cache -----------------------------------------------------------------------


@pytest.fixture
def model(tmp_path) -> Path:
    return onnx_models.publish(tmp_path / "a", onnx_models.add_model()) / "model.onnx"


def built(model: Path, cache: Path, *engines: str, **options: object) -> Entry:
    given, _ = plans.tensorrt_options(ENCODER, SHAPES, **options)  # type: ignore[arg-type]
    entry = plans.entry_of(model, None, given, cache)
    with entry.build() as folder:
        for name in engines:
            (folder / name).write_bytes(b"engine")
        (folder / "model_ctx.onnx").write_bytes(b"context")
    return entry


def opened(model: Path, cache: Path, **options: object) -> plans.Plan:
    return plans.plan("tensorrt", specs=ENCODER, model=model, shapes=SHAPES, cache=cache, **options)  # type: ignore[arg-type]


def test_one_engine_opens_as_the_context_model(model, tmp_path):
    entry = built(model, tmp_path / "c", "one.engine")
    plan = opened(model, tmp_path / "c")
    assert plan.model == entry.folder / "model_ctx.onnx"
    assert plan.options == {}
    assert plan.profile is not None


def test_several_engines_open_beside_the_graph(model, tmp_path):
    entry = built(model, tmp_path / "c", "one.engine", "two.engine")
    plan = opened(model, tmp_path / "c")
    assert plan.model == model
    assert "trt_profile_min_shapes" in plan.options
    assert plan.options["trt_engine_cache_enable"] == "True"
    assert plan.options["trt_engine_cache_path"] == str(entry.folder)
    with pytest.raises(errors.ProviderError, match="in one engine, and it is of 2"):
        opened(model, tmp_path / "c", cuda_graph=True)


def test_engines_are_found_by_what_they_depend_on(model, tmp_path):
    cache = tmp_path / "c"
    built(model, cache, "one.engine")
    assert opened(model, cache, cuda_graph=True).model != model  # it is no part of the engine
    assert opened(model, cache, given={"user_compute_stream": "7"}).model != model
    assert opened(model, cache, given={"trt_builder_optimization_level": "5"}).model == model
    wider = {**SHAPES, "batch": (1, 8, 64)}
    plan = plans.plan("tensorrt", specs=ENCODER, model=model, shapes=wider, cache=cache)
    assert plan.model == model
    model.write_bytes(model.read_bytes() + b"\0\0")
    assert opened(model, cache).model == model


def test_engines_of_another_graph_are_not_taken(model, tmp_path):
    cache = tmp_path / "c"
    built(model, cache, "one.engine")
    assert opened(model, cache).model != model
    assert opened(model, cache, graph={"optimize": "False"}).model == model
    assert opened(model, cache, graph={"disabled_optimizers": "GemmSum"}).model == model


def test_engines_are_for_the_gpu_that_was_asked_for(model, tmp_path, monkeypatch):
    cards = {0: ("NVIDIA L4", "8.9"), 1: ("NVIDIA H200", "9.0")}
    monkeypatch.setattr(plans, "card", cards.get)
    for options, name in (({}, "L4"), ({"device_id": "1"}, "H200"), ({"device_id": "x"}, "L4")):
        entry = plans.entry_of(model, None, options, tmp_path)
        assert entry.machine["GPU"] == f"NVIDIA {name}"
    assert plans.machine(7)["GPU"] == ""


def test_a_place_of_the_users_own_is_left_to_the_user(model, tmp_path):
    built(model, tmp_path / "c", "one.engine")
    own = {"trt_engine_cache_enable": "True", "trt_engine_cache_path": "mine"}
    plan = opened(model, tmp_path / "c", given=own)
    assert plan.model == model
    assert plan.options["trt_engine_cache_path"] == "mine"


def test_the_cache_lies_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ONNXPRESS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "onnxpress"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_directory() == tmp_path / "x" / "onnxpress"
    monkeypatch.setenv("ONNXPRESS_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    assert cache_directory("here") == Path("here")


# What ONNX Runtime says -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "said", "told"),
    [
        ("cuda", {"use_tf_32": "0"}, 'Parse Unknown provider option: "use_tf_32".', "'use_tf32'?"),
        (
            "tensorrt",
            {"trt_fp16_enabled": "True"},
            "Factory( ... ) Invalid TensorRT EP option: trt_fp16_enabled",
            "'trt_fp16_enable'?",
        ),
        ("openvino", {"cachedir": "x"}, "Invalid OpenVINO EP option: cachedir", "'cache_dir'?"),
        (
            "tensorrt",
            {"trt_fp16_enable": "1"},
            "[ERROR] [TensorRT] The value for the key 'trt_fp16_enable' should be 'True' or "
            "'False'. Default value is 'False'.\n",
            "'1' for its option 'trt_fp16_enable': should be 'True' or 'False'",
        ),
        (
            "cuda",
            {"device_id": "3"},
            'Failed to parse provider option "device_id": info.cc:71 operator() '
            "Invalid device ID: 3, must be between 0 (inclusive) and 1 (exclusive).",
            "'device_id': Invalid device ID: 3, must be between 0",
        ),
        (
            "cuda",
            {"use_tf32": "yes"},
            'Failed to parse provider option "use_tf32": parse_string.h:116 '
            'ParseStringWithClassicLocale Failed to parse value: "1"',
            "does not take 'yes' for its option 'use_tf32'\n",
        ),
        ("tensorrt", {"trt_max_workspace_size": "1G"}, "stoull", "'1G' for its option 'trt_max_w"),
    ],
)
def test_refused_options_are_told_in_our_words(name, given, said, told):
    error = plans.refused_option(name, given, said)
    assert error is not None
    assert told in str(error)


@pytest.mark.parametrize("said", ["out of memory", "stoi", 'Unknown provider option: "other"'])
def test_other_errors_are_not_about_options(said):
    assert plans.refused_option("tensorrt", {"device_id": "0"}, said) is None


# A plugin registry without plugins: the TensorRT provider asks it before the binding reads options.
REGISTRY = """
static long none(void) { return 0; }
static void *table[64], *registry[1] = {table};
void *getPluginRegistry(void) {
    for (int n = 0; n < 64; n++) table[n] = (void *)none;
    return registry;
}
"""

# Each in a process of its own: with options that are right, a TensorRT of stand-ins goes on, and
# falls over where it would build an engine.
ASK = """
import json, os, sys
import onnxruntime as rt

def refusal(provider, options):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        settings = rt.SessionOptions()
        settings.log_severity_level = 4
        said = ""
        try:
            rt.InferenceSession(
                sys.argv[1], settings, providers=[(provider, options)], enable_fallback=0
            )
        except BaseException as e:
            said = str(e)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    return os.read(read, 1 << 16).decode()

print(json.dumps([refusal(*one) for one in json.loads(sys.argv[2])]))
"""


def refusals(model: Path, tmp_path: Path, asked: list[tuple[str, dict[str, str]]]) -> list[str]:
    null_gpu(tensorrt=True)  # says what is missing, gcc too
    (tmp_path / "registry.c").write_text(REGISTRY)
    library = tmp_path / "registry.so"
    source = tmp_path / "registry.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    env = {"LD_PRELOAD": str(library)}
    found: list[str] = on_null_gpu(ASK, model, json.dumps(asked), env=env, tensorrt=True)
    return found


def test_the_real_bindings_take_every_option_that_we_write(model, tmp_path):
    ort = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
    cuda = plans.plan("cuda", specs=ENCODER, model=model, cuda_graph=True).options
    tensorrt, _ = plans.tensorrt_options(ENCODER, SHAPES, cuda_graph=True)
    cached = {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(tmp_path)}
    written = [
        (ort["cuda"], dict(cuda)),
        (ort["tensorrt"], tensorrt),
        (ort["tensorrt"], tensorrt | plans.building_options(tmp_path)),
        (ort["tensorrt"], tensorrt | cached),
    ]
    wrong = [
        (ort["cuda"], {"nonsense": "1"}),
        (ort["tensorrt"], {"nonsense": "1"}),
        (ort["tensorrt"], {"trt_engine_cache_enable": "1"}),
        (ort["tensorrt"], {"trt_strongly_typed": "True"}),
    ]
    # A value that no option takes shows which names are known: those say so of the value.
    names = [(ort[p], {n: "?"}) for p in ort for n in plans.OPTIONS[p].split()]
    found = refusals(model, tmp_path, [*written, *wrong, *names])
    assert found[:4] == [""] * 4
    for (provider, options), said in zip(wrong, found[4:8], strict=True):
        short = next(n for n, o in ort.items() if o == provider)
        assert plans.refused_option(short, options, said) is not None, said
    for (provider, options), said in zip(names, found[8:], strict=True):
        unknown = "Unknown provider option" in said or "EP option" in said
        assert not unknown, (provider, options)
