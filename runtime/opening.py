"""Opening a model on one provider, or refusing with the nodes that are in the way.

`Model` holds what all sessions of one file share; `Model.strict` opens it so that every node runs
on the provider, and tells of each node that would not: its name, its operator, its types, and why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import artifact
from ..artifact import Manifest
from ..errors import ArtifactError, InputError, OnnxpressError, ProviderError
from . import graph_capture, libraries, providers
from .gpu import gpu
from .graph_file import GraphFile, read_graph
from .placement import PlacedNode, Placement, placed_nodes
from .plans import Plan, refused_option

# ONNX Runtime fuses DequantizeLinear and MatMul of 4-bit weights, and by default rounds the other
# side to 8 bits then, which nobody asked for: errors of 2e-3. At level 1 it computes in float32.
_EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}
_STRICT, _RECORD = "session.disable_cpu_ep_fallback", "session.record_ep_graph_assignment_info"

# Kernels of the CUDA provider (1.31.1) that fail without cuDNN, by running each of them without.
_CUDNN_OPS = {
    *("Conv", "ConvTranspose", "com.microsoft::FusedConv"),
    *("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"),
    *("BatchNormalization", "InstanceNormalization", "LRN"),
    *("LSTM", "RNN", "Einsum", "ArgMax", "ArgMin"),
    *("com.microsoft::Attention", "com.microsoft::MultiHeadAttention"),  # Attention-23 does not
    *("ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceLogSumExp"),
}


# Of the arenas and of CUDA; names of nodes stand in the same texts (/reallocate/Gather).
_MEMORY = re.compile(
    r"failed to allocate memory|out of memory|available memory of|CUDA error 2\b|bfc_arena", re.I
)
_DAMAGED = re.compile("Protobuf parsing failed|INVALID_GRAPH|INVALID_PROTOBUF")
# A kernel's failure carries its node, and nodes of engines carry the provider in their names.
_PROVIDERS_OWN = re.compile("CUDA|Tensor[Rr][Tt]|OpenVINO")


@dataclass(frozen=True)
class Skipped:
    """A provider that was asked for and did not take the model: why, and what would mend it."""

    provider: str
    why: str
    hint: str

    def __str__(self) -> str:
        return f"{self.provider}: {self.why}" + (f"  ({self.hint})" if self.hint else "")


def locate(path: str | os.PathLike[str]) -> tuple[Manifest | None, Path]:
    """The manifest and the graph of an artifact directory; None and the file of a model.onnx.

    Raises:
        ArtifactError: There is no model here, or the manifest is damaged.
    """
    path = Path(path)
    manifest = None
    if path.is_dir():
        if (path / artifact.MANIFEST).is_file():
            manifest = artifact.read_manifest(path)
        path = path / artifact.MODEL
    if not path.is_file():
        raise ArtifactError("there is no model here", where=str(path))
    return manifest, path


@dataclass(frozen=True)
class Model:
    """A model's file, and the options that every session on it is opened with.

    Attributes:
        rt: The onnxruntime module.
        path: The graph's file.
        threads: Threads of one run on the CPU, None for ONNX Runtime's choice.
        arena: Keep freed memory.
        optimize: Let ONNX Runtime optimize the graph.
        disabled: Optimizers of ONNX Runtime that stay off.
        config: Session config entries of the user.
    """

    rt: Any
    path: Path
    threads: int | None
    arena: bool
    optimize: bool
    disabled: tuple[str, ...]
    config: Mapping[str, str]

    @classmethod
    def of(
        cls,
        path: Path,
        manifest: Manifest | None,
        *,
        threads: int | None = None,
        arena: bool = True,
        optimize: bool | None = None,
        disabled: Sequence[str] | None = None,
        config: Mapping[str, str] | None = None,
    ) -> Model:
        """A model's file; what is None is as the manifest records it."""
        recorded = manifest.runtime if manifest else {}
        if optimize is None:
            optimize = bool(recorded.get("optimize", True))
        if disabled is None:
            disabled = recorded.get("disabled_optimizers", ())
        rt = providers.onnxruntime()
        return cls(rt, path, threads, arena, optimize, tuple(disabled), dict(config or {}))

    def shaping(self) -> dict[str, str]:
        """What of this changes the graph that a provider gets; nothing by default."""
        off = {} if self.optimize else {"optimize": "False"}
        kept = {"disabled_optimizers": " ".join(sorted(self.disabled))} if self.disabled else {}
        return off | kept

    def graph(self) -> GraphFile:
        """What the file says of nodes and inputs; nothing where it cannot be read."""
        with suppress(ValueError, OSError):
            return read_graph(self.path)
        return GraphFile((), ())

    def needs_cudnn(self, options: Mapping[str, str]) -> str:
        """The first operator that CUDA runs with cuDNN; none where the user has turned it off."""
        if not providers.is_on(options.get("enable_cudnn", "1")):
            return ""
        return next((n.op for n in self.graph().nodes if n.op in _CUDNN_OPS), "")

    def open(
        self,
        plans: Mapping[str, Plan],
        config: Mapping[str, str] | None = None,
        *,
        save_as: Path | None = None,
    ) -> Any:
        """An InferenceSession on these providers, in this order; ONNX Runtime's errors escape."""
        rt, options = self.rt, self.rt.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and told once, by us
        options.enable_cpu_mem_arena = options.enable_mem_pattern = self.arena
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        level = rt.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if self.optimize else level.ORT_DISABLE_ALL
        )
        entries = dict(_EXACT)
        for plan in plans.values():
            entries |= plan.config
        for key, value in (entries | dict(config or {}) | dict(self.config)).items():
            options.add_session_config_entry(key, value)
        if save_as:
            options.optimized_model_filepath = str(save_as)
        model = next(iter(plans.values())).model
        # enable_fallback: on an error, ONNX Runtime's default is to try again on the CPU.
        return rt.InferenceSession(
            str(model),
            options,
            providers=[
                (providers.PROVIDERS[n].ort, {**self._threads_of(n), **p.options})
                for n, p in plans.items()
            ],
            disabled_optimizers=list(self.disabled),
            enable_fallback=0,
        )

    def _threads_of(self, provider: str) -> dict[str, str]:
        """Options that give a provider with threads of its own as many as were asked for."""
        own = provider == "openvino" and self.threads is not None
        return {"num_of_threads": str(self.threads)} if own else {}

    def strict(self, plans: Mapping[str, Plan], *, captures: bool = False) -> Any:
        """An InferenceSession with every node on the providers of `plans`.

        Raises:
            ArtifactError: ONNX Runtime cannot load the graph.
            ProviderError: A provider did not come up, or nodes lie elsewhere.
        """
        names = list(plans)
        config = {} if names == ["cpu"] else {_RECORD: "1"}
        strict = {} if "cpu" in plans else {_STRICT: "1"}
        try:
            session = self.open(plans, config | strict)
        except Exception as e:
            if captures:
                self._why_not_captured(plans)
            for name, plan in plans.items():
                if refused := refused_option(name, plan.options, _reason(e)):
                    raise refused from e
            if "fallback to CPU EP" not in str(e):
                raise self.failed_open(e, names) from e
            # It refuses without a name; once more without strictness, to say which and why.
            try:
                session = self.open(plans, config)
            except Exception as again:
                raise self.failed_open(again, names) from again
        providers.check_came_up(self.rt, session, {n: providers.PROVIDERS[n] for n in names})
        if config:
            self._check_placed(Placement(placed_nodes(session), None), names)
        return session

    def elsewhere(self, placement: Placement, names: Sequence[str]) -> list[Elsewhere]:
        """The nodes that lie on none of these providers, with what the file says of them."""
        fell = placement.outside([providers.PROVIDERS[n].ort for n in names])
        graph = self.graph() if fell else GraphFile((), ())
        return [_elsewhere(n, graph) for n in fell]

    def _check_placed(self, placement: Placement, names: Sequence[str]) -> None:
        fell = self.elsewhere(placement, names)
        if not fell:
            return
        shown = list(map(str, fell[:8]))
        more = [f"{len(fell) - 8} more"] if fell[8:] else []
        raise ProviderError(
            f"{len(fell)} of {len(placement.nodes)} nodes do not run on {' or '.join(names)}, "
            f"but on {', '.join(sorted({n.provider for n in fell}))}: "
            + "; ".join([*shown, *more]),
            where=str(self.path),
            hint=f"press the model for this target{_press(names[0])}, or allow it: "
            "allow_fallback=True (--allow-fallback)",
        )

    def _why_not_captured(self, plans: Mapping[str, Plan]) -> None:
        # ONNX Runtime refuses a graph that it cannot capture without naming a node; opened
        # without capture it shows where they lie.
        plain = {
            name: replace(p, options={k: v for k, v in p.options.items() if "cuda_graph" not in k})
            for name, p in plans.items()
        }
        try:
            nodes = placed_nodes(self.open(plain, {_RECORD: "1"}))
        except Exception:  # the first error stands: it has nothing to do with capture
            return
        ort = providers.PROVIDERS[next(iter(plans))].ort
        graph_capture.check_capturable(Placement(nodes, None), ort, str(self.path))

    # What went wrong --------------------------------------------------------------------------

    def failed_open(self, e: Exception, names: Sequence[str]) -> OnnxpressError:
        """The error to raise for one of ONNX Runtime's at opening."""
        text, where = _reason(e), str(self.path)
        if "cuDNN is unavailable" in text:
            return _no_cudnn(where)
        if _is_memory(text):
            return _out_of_memory(text, where, names)
        if "NotImplemented" in type(e).__name__:
            return ProviderError(
                f"the provider has no kernel for a node: {text}",
                where=where,
                hint="press the model again for this provider and this onnxruntime",
            )
        if set(names) != {"cpu"} and not _DAMAGED.search(str(e)):
            return ProviderError(
                f"the session did not come up: {text}",
                where=where,
                hint=f"press the model for this target{_press(names[0])}; `onnxpress doctor` "
                "tries the provider on one node",
            )
        return ArtifactError(
            f"ONNX Runtime cannot load the graph: {text}",
            where=where,
            hint="copy the artifact again, or make it again from its source",
        )

    def failed_run(self, e: Exception, names: Sequence[str]) -> OnnxpressError:
        """The error to raise for one of ONNX Runtime's at a run."""
        text, where = _reason(e), str(self.path)
        if "cuDNN is unavailable" in text:
            return _no_cudnn(where)
        if _is_memory(text):
            return _out_of_memory(text, where, names)
        own = _PROVIDERS_OWN.search(text) or "EPFail" in type(e).__name__
        if set(names) != {"cpu"} and own:
            return ProviderError(
                f"the provider failed: {text}",
                where=where,
                hint="`onnxpress doctor` tries the provider on one node",
            )
        return InputError(
            f"ONNX Runtime refused these inputs: {text}",
            where=where,
            hint="shapes and dtypes fit the signature; look at the values (ids in range?)",
        )


@dataclass(frozen=True)
class Elsewhere:
    """A node that lies on another provider than was asked for.

    Attributes:
        op: Its operator, `domain::Name` outside ai.onnx.
        name: Its name; may be empty.
        dtypes: Types of its inputs and outputs, as far as the file says them.
        provider: ONNX Runtime's name of the provider that it lies on.
        why: What is in the way, as far as can be known.
    """

    op: str
    name: str
    dtypes: tuple[str, ...]
    provider: str
    why: str

    def __str__(self) -> str:
        types = f" ({', '.join(self.dtypes)})" if self.dtypes else ""
        return f"{self.op}{f' {self.name!r}' if self.name else ''}{types}, {self.why}"


def _elsewhere(node: PlacedNode, graph: GraphFile) -> Elsewhere:
    known = graph.find(node.name, node.op)
    if known is None:  # ONNX Runtime made it from others, or several are alike
        why = "no kernel for it there, or a computation on sizes"
    elif known.shapes_only:
        why = "a computation on sizes, which ONNX Runtime keeps on the CPU"
    else:
        why = "no kernel for it there"
    return Elsewhere(node.op, node.name, known.dtypes if known else (), node.provider, why)


def _press(name: str) -> str:
    precision = {"cuda": " --precision fp16", "tensorrt": " --precision fp16", "openvino": ""}
    return f" (--target {name}{precision[name]})" if name in precision else ""


def _no_cudnn(where: str) -> ProviderError:
    return ProviderError(
        "a node needs cuDNN 9, and libcudnn.so.9 cannot be loaded",
        where=where,
        hint=libraries.GET_CUDNN,
    )


def _is_memory(text: str) -> bool:
    return bool(_MEMORY.search(text))


def _out_of_memory(text: str, where: str, names: Sequence[str]) -> OnnxpressError:
    asked = _asked_bytes(text)
    what = f"{_mib(asked)} were asked for" if asked else "more memory was asked for than there is"
    on_gpu = names[0] in ("cuda", "tensorrt")
    card = gpu() if on_gpu else None
    if card:
        what += f", and {_mib(card.free)} of {_mib(card.memory)} are free on {card.name}"
    knobs = "smaller batches, shorter texts"
    if on_gpu:
        knobs += (
            ", or a smaller capacity of the key-value cache; provider_options={'cuda': "
            "{'gpu_mem_limit': BYTES, 'arena_extend_strategy': 'kSameAsRequested'}} keeps the "
            "arena from growing in powers of two; other processes: `nvidia-smi`"
        )
    else:
        knobs += ", or arena=False, which gives memory back after each run"
    return OnnxpressError(f"out of memory: {what}", where=f"{where}: {text}", hint=knobs)


def _asked_bytes(text: str) -> int:
    """The bytes that ONNX Runtime or CUDA names as asked for; 0 where it names none."""
    found = re.search(r"(?:buffer of size|requested bytes of|size[:=]?|allocate) ?(\d{3,})", text)
    return int(found.group(1)) if found else 0


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _reason(e: Exception) -> str:
    # "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : text": the text is what a person needs.
    return str(e).rsplit("[ONNXRuntimeError] : ", 1)[-1].split(" : ", 2)[-1].strip()
