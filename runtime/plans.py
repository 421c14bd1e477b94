"""What a provider is opened with: its options, the file, and the shapes that it takes.

Every option that is written here has its reason beside it. The user's own come last and win.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..artifact import Manifest, TensorSpec
from ..errors import ProviderError, UsageError
from . import engine_cache, libraries, providers
from .engine_cache import Entry, Sealed
from .gpu import card, kernel_driver
from .graph_file import read_graph
from .profiles import Profile, profile_of, ranges_of
from .shared_objects import base
from .signature import close_match

GRAPHS = {"cuda": "enable_cuda_graph", "tensorrt": "trt_cuda_graph_enable"}


@dataclass(frozen=True)
class Plan:
    """How a provider is to be opened.

    Attributes:
        options: Provider options as ONNX Runtime spells them.
        config: Session config entries.
        model: The file to open: the graph itself, or an EPContext model from the cache.
        profile: The shapes that the engine takes, for a check of every run; None where any are.
        graph_option: Whether runs are captured as CUDA graphs.
    """

    options: Mapping[str, str]
    config: Mapping[str, str]
    model: Path
    profile: Profile | None = None
    graph_option: bool = False


@dataclass(frozen=True)
class _Asked:
    """The arguments of `plan`, by which the provider's own part decides."""

    specs: tuple[TensorSpec, ...]
    model: Path
    manifest: Manifest | None
    shapes: Mapping[str, object] | None
    cache: str | os.PathLike[str] | None
    cuda_graph: bool
    given: dict[str, str] = field(default_factory=dict)
    graph: Mapping[str, str] = field(default_factory=dict)


def plan(
    name: str,
    *,
    specs: Sequence[TensorSpec],
    model: Path,
    manifest: Manifest | None = None,
    shapes: Mapping[str, object] | None = None,
    cache: str | os.PathLike[str] | None = None,
    cuda_graph: bool = False,
    given: Mapping[str, str] | None = None,
    graph: Mapping[str, str] | None = None,
) -> Plan:
    """Options, file and shapes for one provider.

    Args:
        name: Its short name.
        specs: The inputs of the graph.
        model: The graph's file.
        manifest: The artifact's manifest; its `runtime.shapes` hold where `shapes` is None, its
            `runtime.provider_options` where it was made for this provider.
        shapes: The least, best and greatest size of each name in `specs`.
        cache: Where engines are; None for `engine_cache.cache_directory()`. It is read here,
            and written by `warmup` alone.
        cuda_graph: Capture runs as CUDA graphs.
        given: The user's options, as ONNX Runtime spells them.
        graph: What else changes the graph that the provider gets (`Model.shaping`), so that
            engines of another one are not taken.

    Raises:
        UsageError: Sizes that are missing or wrong, options for a provider that has none, or
            CUDA graphs where there are none.
        ProviderError: The cached engines are another GPU's or version's, or are damaged.
    """
    if cuda_graph and name not in GRAPHS:
        raise UsageError(
            f"the provider {name!r} has no CUDA graphs", hint="cuda_graph is for cuda and tensorrt"
        )
    if shapes is None and manifest is not None:
        shapes = manifest.runtime.get("shapes")
    own = dict(given or {})
    if manifest is not None and manifest.target.get("provider") == name:
        own = {**manifest.runtime.get("provider_options", {}), **own}
    ranges = ranges_of(specs, shapes)
    asked = _Asked(tuple(specs), model, manifest, ranges, cache, cuda_graph, own, dict(graph or {}))
    if name in _PLANS:
        return _PLANS[name](asked)
    return Plan(own, {}, model)


# CPU ----------------------------------------------------------------------------------------


def _cpu(asked: _Asked) -> Plan:
    if asked.given:  # ONNX Runtime would take them without a word
        raise UsageError(
            f"the provider 'cpu' has no option {next(iter(asked.given))!r}, and none at all",
            hint="threads= and arena= of the Session set what the CPU has to set",
        )
    return Plan({}, {}, asked.model)


# CUDA ---------------------------------------------------------------------------------------


def _cuda(asked: _Asked) -> Plan:
    options = {
        # The default doubles the arena whenever it grows: the first run at a new greatest shape
        # takes up to twice the memory that it needs, and keeps it.
        "arena_extend_strategy": "kSameAsRequested",
        # On by default: it rounds float32 to 10 bits of mantissa in every product. Whoever
        # presses in float32 wants float32; use_tf32=1 asks for the other.
        "use_tf32": "0",
    }
    if asked.cuda_graph:
        options[GRAPHS["cuda"]] = "1"
    options |= asked.given
    # The kernel that multiplies by 4- and 8-bit weights as they are, in tensor cores; it is off by
    # default since it measures its tactics when the session opens. Other graphs have no use of it.
    nbits = "com.microsoft::MatMulNBits" in _operators(asked)
    config = {"ep.cuda.fpa_intb_gemm": "1"} if nbits else {}
    return Plan(
        options, config, asked.model, None, providers.is_on(options.get(GRAPHS["cuda"], ""))
    )


def _operators(asked: _Asked) -> set[str]:
    if asked.manifest is not None:
        return set(asked.manifest.ops)
    with suppress(OSError, ValueError):  # ONNX Runtime says better what is wrong with the file
        return {node.op for node in read_graph(asked.model).nodes}
    return set()


# TensorRT -----------------------------------------------------------------------------------

# Options of one session, which no engine depends on.
_SESSION_ONLY = {"user_compute_stream", GRAPHS["tensorrt"]}
# With any of these the user keeps engines in a place of their own, and ours is not looked at.
_OWN_CACHE = re.compile("trt_(engine_cache|dump_ep_context|ep_context|timing_cache)_")


def tensorrt_options(
    specs: Sequence[TensorSpec],
    shapes: Mapping[str, object] | None,
    *,
    cuda_graph: bool = False,
    given: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], Profile | None]:
    """The options that engines are built with, and the shapes that they take.

    No precision is among them: without one, ONNX Runtime obeys the types of the graph (a strongly
    typed network; its pull request 18707), which were checked against the reference when it was
    pressed. Not yet seen on a GPU.
    Hardware compatibility stays off, for it costs speed: the cache holds engines by GPU instead.

    Raises:
        UsageError: Sizes that are missing or wrong.
    """
    options: dict[str, str] = {}
    profile = profile_of(specs, shapes)
    if profile is not None:
        # Without them, the first run builds an engine for its own shape, and each run outside of
        # what was seen so far builds it again.
        for point, word in enumerate(("min", "opt", "max")):
            options[f"trt_profile_{word}_shapes"] = profile.text(point)
    if cuda_graph:
        options[GRAPHS["tensorrt"]] = "True"
    return {**options, **(given or {})}, profile


def entry_of(
    model: Path,
    manifest: Manifest | None,
    options: Mapping[str, str],
    cache: str | os.PathLike[str] | None,
    graph: Mapping[str, str] | None = None,
) -> Entry:
    """Where the engines of a graph with these options lie in the cache; `graph` as of `plan`."""
    lasting = {k: v for k, v in options.items() if k not in _SESSION_ONLY} | dict(graph or {})
    folder = engine_cache.cache_directory(cache)
    return Entry(
        folder, engine_cache.model_sha256(model, manifest), lasting, machine(_device(options))
    )


def building_options(folder: Path) -> dict[str, str]:
    """Options that make a session leave its engines in this directory.

    The engines lie beside the EPContext model, which names them without a path, so that the
    directory can be renamed; `trt_engine_cache_path` must then be left out.
    """
    return {
        "trt_engine_cache_enable": "True",
        "trt_dump_ep_context_model": "True",
        "trt_ep_context_file_path": str(folder / engine_cache.CONTEXT_MODEL),
        "trt_ep_context_embed_mode": "0",  # an engine above 2 GB does not fit into a protobuf
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder / engine_cache.TIMING),
    }


def _device(options: Mapping[str, str]) -> int:
    text = options.get("device_id", "0")
    return int(text) if text.isdecimal() else 0  # ONNX Runtime refuses what is no number


def machine(device: int = 0) -> dict[str, str]:
    """What engines are bound to: the versions and this GPU; empty where it cannot be found out."""
    rt = providers.onnxruntime()
    library = Path(rt.__file__).parent / "capi" / providers.PROVIDERS["tensorrt"].library
    found = {base(one.soname): one.version for one in libraries.examine(library)}
    name, capability = card(device) or ("", "")
    return {
        "onnxruntime": str(rt.__version__),
        "TensorRT": found.get("libnvinfer", ""),
        "GPU": name,
        "compute capability": capability,
        "driver": kernel_driver(),
    }


def _tensorrt(asked: _Asked) -> Plan:
    options, profile = tensorrt_options(
        asked.specs, asked.shapes, cuda_graph=asked.cuda_graph, given=asked.given
    )
    graph = providers.is_on(options.get(GRAPHS["tensorrt"], ""))
    without = Plan(options, {}, asked.model, profile, graph)
    cache = engine_cache.cache_directory(asked.cache)
    if any(_OWN_CACHE.match(name) for name in asked.given) or not cache.is_dir():
        return without
    sealed = entry_of(asked.model, asked.manifest, options, cache, asked.graph).check()
    if sealed is None:
        return without
    if graph and sealed.engines != 1:
        raise ProviderError(
            f"CUDA graphs need the whole graph in one engine, and it is of {sealed.engines}",
            where=str(sealed.folder),
            hint="open it without cuda_graph, or press it for tensorrt: inspect DIR --placement",
        )
    return _cached(without, sealed)


def _cached(plan: Plan, sealed: Sealed) -> Plan:
    if sealed.model is not None:
        lasting = {k: v for k, v in plan.options.items() if not k.startswith("trt_profile_")}
        return Plan(lasting, {}, sealed.model, plan.profile, plan.graph_option)
    options = {
        **plan.options,
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(sealed.folder),
    }
    return Plan(options, {}, plan.model, plan.profile, plan.graph_option)


# OpenVINO -----------------------------------------------------------------------------------


def openvino_cache(cache: str | os.PathLike[str] | None) -> Path:
    """Where OpenVINO keeps compiled graphs; it checks itself what of them it may use."""
    return engine_cache.cache_directory(cache) / "openvino"


def _openvino(asked: _Asked) -> Plan:
    options = {"device_type": "CPU"}  # the default looks for a GPU or an NPU of Intel's
    place = openvino_cache(asked.cache)
    # Only where it was asked for, here or by a warmup: a session by itself writes no files.
    if asked.cache is not None or place.is_dir():
        options["cache_dir"] = str(place)
    return Plan({**options, **asked.given}, {}, asked.model)


_PLANS = {"cpu": _cpu, "cuda": _cuda, "tensorrt": _tensorrt, "openvino": _openvino}


# What ONNX Runtime says of options ----------------------------------------------------------

# Names by provider, for a question after the right one: ONNX Runtime itself refuses unknown ones.
# Of the Python bindings of onnxruntime-gpu 1.31.1, asked one by one, and of -openvino 1.24.1.
OPTIONS: Mapping[str, str] = {
    "cpu": "",
    "cuda": """
        device_id has_user_compute_stream user_compute_stream gpu_mem_limit arena_extend_strategy
        cudnn_conv_algo_search do_copy_in_default_stream gpu_external_alloc gpu_external_free
        gpu_external_empty_cache cudnn_conv_use_max_workspace enable_cuda_graph
        cudnn_conv1d_pad_to_nc1d tunable_op_enable tunable_op_tuning_enable
        tunable_op_max_tuning_duration_ms enable_skip_layer_norm_strict_mode prefer_nhwc
        use_ep_level_unified_stream use_tf32 sdpa_kernel fuse_conv_bias enable_cudnn
        """,
    "tensorrt": """
        device_id user_compute_stream trt_auxiliary_streams trt_bf16_enable
        trt_build_heuristics_enable trt_builder_optimization_level
        trt_context_memory_sharing_enable trt_cuda_graph_enable trt_detailed_build_log
        trt_dla_core trt_dla_enable trt_dump_ep_context_model trt_dump_subgraphs
        trt_engine_cache_enable trt_engine_cache_path trt_engine_cache_prefix
        trt_engine_decryption_enable trt_engine_decryption_lib_path trt_engine_hw_compatible
        trt_ep_context_embed_mode trt_ep_context_file_path trt_extra_plugin_lib_paths
        trt_force_sequential_engine_build trt_force_timing_cache trt_fp16_enable
        trt_int8_calibration_table_name trt_int8_enable trt_int8_use_native_calibration_table
        trt_layer_norm_fp32_fallback trt_max_partition_iterations trt_max_workspace_size
        trt_min_subgraph_size trt_onnx_model_folder_path trt_op_types_to_exclude
        trt_preview_features trt_profile_max_shapes trt_profile_min_shapes trt_profile_opt_shapes
        trt_sparsity_enable trt_tactic_sources trt_timing_cache_enable trt_timing_cache_path
        trt_weight_stripped_engine_enable
        """,
    "openvino": """
        device_type device_id cache_dir load_config num_of_threads precision enable_qdq_optimizer
        disable_dynamic_shapes model_priority num_streams enable_opencl_throttling context
        reshape_input layout enable_causallm device_luid
        """,
}

# Those of TensorRT that are numbers: of a wrong one the binding says "stoi", and nothing else.
_NUMBERS = """
    device_id user_compute_stream trt_auxiliary_streams trt_builder_optimization_level trt_dla_core
    trt_ep_context_embed_mode trt_max_partition_iterations trt_max_workspace_size
    trt_min_subgraph_size
    """

_UNKNOWN = re.compile(r"(?:Unknown provider option: \"?|Invalid \S+ EP option: )(\w+)")
_TENSORRT = re.compile(r"The value for the key '(\w+)' (should be .+)")
_CUDA = re.compile(r'Failed to parse provider option "(\w+)": (?:\S+\.(?:h|cc):\d+ \S+ )?(.*)')


def refused_option(name: str, options: Mapping[str, str], said: str) -> UsageError | None:
    """ONNX Runtime's refusal of an option in our words, or None where it said something else.

    Args:
        name: The provider's short name.
        options: The options that it was opened with.
        said: The text of ONNX Runtime's error.
    """
    known = OPTIONS.get(name, "").split()
    if (match := _UNKNOWN.search(said)) and (option := match.group(1)) in options:
        return UsageError(
            f"the provider {name!r} has no option {option!r}{close_match(option, known)}",
            hint=f"its options: {', '.join(known)}" if known else None,
        )
    match = _TENSORRT.search(said) or _CUDA.search(said)
    if match and match.group(1) in options:
        return _wrong(name, options, match.group(1), match.group(2).strip())
    if re.search(r"\bsto(i|ull)\s*$", said):
        for option in _NUMBERS.split():
            if not re.fullmatch(r"-?[0-9]+", options.get(option, "0")):
                return _wrong(name, options, option, "should be a whole number")
    return None


def _wrong(name: str, options: Mapping[str, str], option: str, why: str) -> UsageError:
    # Of a text that is no number, its words name another one: the value is ours to say.
    why = "" if why.startswith("Failed to parse value") else f": {why}"
    return UsageError(
        f"the provider {name!r} does not take {options.get(option)!r} for its option "
        f"{option!r}{why}",
        hint=f"provider_options={{{name!r}: {{{option!r}: ...}}}}",
    )
