"""One model, opened and checked: arrays in, arrays out, and proof of where it ran."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import artifact
from ..artifact import Manifest
from ..errors import ArtifactError, InputError, OnnxpressError, ProviderError
from . import providers
from .placement import Placement, count_memcpy, placed_nodes
from .signature import Array, Checker, Feeds, close_match, spec_of


class Session:
    """A model that runs where it was asked to run, or not at all.

    Every node runs on a provider that was asked for: `provider="cuda"` raises where one node
    would fall to the CPU, `provider=["cuda", "cpu"]` allows it. A session may be used from many
    threads at once.

    Args:
        path: A model.onnx, or an artifact directory.
        provider: "cpu", "cuda" or "tensorrt", or several in order of preference.
        threads: Threads of one run on the CPU; None leaves it to ONNX Runtime, which takes the
            physical cores that it sees. In a container, give the number it may use.
        arena: Keep freed memory for the next run: faster, larger.
        optimize: Let ONNX Runtime optimize the graph further. None takes what the manifest says
            under `runtime.optimize`, and True where it says nothing.
        disabled_optimizers: Those of ONNX Runtime's optimizers that stay off, since they would
            fuse again what was measured to be faster apart. None takes what the manifest says
            under `runtime.disabled_optimizers`.
        provider_options: Options by provider, {"cuda": {"device_id": 1}}.
        config: Session config entries of ONNX Runtime, for experts.

    Raises:
        ArtifactError: There is no model here, or it is damaged.
        MissingPackage: onnxruntime is not installed.
        ProviderError: A provider is missing, or does not take a node.
        UsageError: A provider's name or its options are wrong.

    Attributes:
        path: The graph's file.
        manifest: The artifact's manifest; None for a bare model.onnx.
        inputs: Name, dtype and shape of each input, in order.
        outputs: The same of each output.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str | Sequence[str] = "cpu",
        threads: int | None = None,
        arena: bool = True,
        optimize: bool | None = None,
        disabled_optimizers: Sequence[str] | None = None,
        provider_options: providers.ProviderOptions | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        path = Path(path)
        self.manifest: Manifest | None = None
        if path.is_dir():
            if (path / artifact.MANIFEST).is_file():
                self.manifest = artifact.read_manifest(path)
            path = path / artifact.MODEL
        if not path.is_file():
            raise ArtifactError("there is no model here", where=str(path))
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        recorded = self.manifest.runtime if self.manifest else {}
        if optimize is None:
            optimize = bool(recorded.get("optimize", True))
        if disabled_optimizers is None:
            disabled_optimizers = recorded.get("disabled_optimizers", ())
        self._disabled = list(disabled_optimizers)
        self.path = path
        self._rt = providers.onnxruntime()
        self._asked = providers.resolve(provider)
        self._settings = (threads, arena, optimize, dict(config or {}))
        self._providers = providers.with_options(self._asked, provider_options)
        self._placement: Placement | None = None
        self._lock = threading.Lock()
        providers.check_compiled_in(self._rt, self._asked)
        providers.preload(self._rt, self._asked)
        self._session = self._open_strict()
        self.inputs = tuple(spec_of(i) for i in self._session.get_inputs())
        self.outputs = tuple(spec_of(o) for o in self._session.get_outputs())
        self._check = Checker(self.inputs)
        self._output_names = [o.name for o in self.outputs]

    # Running ----------------------------------------------------------------------------------

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run the model once.

        Args:
            feeds: One numpy array for each input, of exactly its dtype. Arrays that are not
                contiguous, and arrays without elements, are fine.
            outputs: Names of the outputs wanted; None for all.

        Returns:
            The outputs by name, in the order asked for.

        Raises:
            InputError: A feed is missing, unknown, or not of the dtype or shape of its input;
                or the values are not valid for the model (an id outside the vocabulary).
        """
        self._check(feeds)
        return self.run_unchecked(feeds if type(feeds) is dict else dict(feeds), outputs)

    def run_unchecked(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """`run` for a caller that has checked the feeds: a loop that feeds back what it got.

        ONNX Runtime still refuses a wrong name, dtype or rank, in its own words.
        """
        if outputs is None:
            names = self._output_names
        else:
            names = list(outputs)
            for name in names:
                if name not in self._output_names:
                    raise InputError(
                        f"the model has no output {name!r}{close_match(name, self._output_names)}",
                        hint=f"its outputs: {', '.join(self._output_names)}",
                    )
            if not names:  # to ONNX Runtime, none means all
                return {}
        try:
            values = self._session.run(names, feeds)
        except Exception as e:  # ONNX Runtime's errors share no base class but Exception
            raise self._failed(e) from e
        return dict(zip(names, values, strict=True))

    # Where it ran -----------------------------------------------------------------------------

    def placement(self) -> Placement:
        """The provider of every node, and the number of copies between host and device.

        The first call on a CPU session opens the model a second time for a moment: recording
        costs about 5% of the load, and few ask.
        """
        with self._lock:
            if self._placement is None:
                record = {"session.record_ep_graph_assignment_info": "1"}
                nodes = placed_nodes(self._open(record))
                mixed = len({n.provider for n in nodes}) > 1
                self._placement = Placement(nodes, self._count_memcpy() if mixed else 0)
            return self._placement

    def _count_memcpy(self) -> int | None:
        # Copies are put in after placement, so only the finished graph shows them.
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / "placed.onnx"
            entry = "session.optimized_model_external_initializers_file_name"
            try:
                self._open({entry: "placed.data"}, save_as=graph)
                return count_memcpy(graph)
            except Exception:  # graphs with compiled nodes (TensorRT) cannot be saved
                return None

    # Opening ----------------------------------------------------------------------------------

    def _open(self, config: Mapping[str, str], *, save_as: Path | None = None) -> Any:
        threads, arena, optimize, extra = self._settings
        rt, options = self._rt, self._rt.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and told once, by us
        options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
        if threads is not None:
            options.intra_op_num_threads = threads
        level = rt.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        )
        for key, value in {**_EXACT, **config, **extra}.items():
            options.add_session_config_entry(key, value)
        if save_as:
            options.optimized_model_filepath = str(save_as)
        # enable_fallback: on an error, ONNX Runtime's default is to try again on the CPU.
        return rt.InferenceSession(
            str(self.path),
            options,
            providers=self._providers,
            disabled_optimizers=self._disabled,
            enable_fallback=0,
        )

    def _open_strict(self) -> Any:
        config = {}
        if "cpu" not in self._asked:
            config["session.disable_cpu_ep_fallback"] = "1"
        if set(self._asked) != {"cpu"}:
            config["session.record_ep_graph_assignment_info"] = "1"
        try:
            session = self._open(config)
        except Exception as e:
            if "fallback to CPU EP" not in str(e):
                raise self._failed_open(e) from e
            # It refuses without a name; once more without strictness, to say which and why.
            config.pop("session.disable_cpu_ep_fallback", None)
            try:
                session = self._open(config)
            except Exception as again:
                raise self._failed_open(again) from again
        providers.check_came_up(self._rt, session, self._asked)
        if set(self._asked) != {"cpu"}:
            self._check_placed(Placement(placed_nodes(session), None))
        return session

    def _check_placed(self, placement: Placement) -> None:
        fell = placement.outside([p.ort for p in self._asked.values()])
        if not fell:
            return
        shown = ", ".join(map(str, fell[:8])) + (f" and {len(fell) - 8} more" if fell[8:] else "")
        asked = list(self._asked)
        raise ProviderError(
            f"{len(fell)} of {len(placement.nodes)} nodes do not run on {' or '.join(asked)}, "
            f"but on {', '.join(sorted({n.provider for n in fell}))}: {shown}",
            where=str(self.path),
            hint=f"press the model for this target, or allow it: provider={[*asked, 'cpu']}",
        )

    def _failed_open(self, e: Exception) -> OnnxpressError:
        text, where = _reason(e), str(self.path)
        if "NotImplemented" in type(e).__name__:
            return ProviderError(
                f"the provider has no kernel for a node: {text}",
                where=where,
                hint="press the model again for this provider and this onnxruntime",
            )
        if set(self._asked) != {"cpu"}:
            return ProviderError(f"the session did not come up: {text}", where=where)
        return ArtifactError(
            f"ONNX Runtime cannot load the graph: {text}",
            where=where,
            hint="copy the artifact again, or make it again from its source",
        )

    def _failed(self, e: Exception) -> OnnxpressError:
        text, where = _reason(e), str(self.path)
        if "allocat" in text.lower() or "out of memory" in text.lower():
            return OnnxpressError(
                f"the run needs more memory than there is: {text}",
                where=where,
                hint="run smaller batches or shorter texts",
            )
        if set(self._asked) != {"cpu"} and ("CUDA" in text or "EPFail" in type(e).__name__):
            return ProviderError(f"the provider failed: {text}", where=where)
        return InputError(
            f"ONNX Runtime refused these inputs: {text}",
            where=where,
            hint="shapes and dtypes fit the signature; look at the values (ids in range?)",
        )


# ONNX Runtime fuses DequantizeLinear and MatMul of 4-bit weights, and by default rounds the other
# side to 8 bits then, which nobody asked for: errors of 2e-3. At level 1 it computes in float32.
_EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}


def _reason(e: Exception) -> str:
    # "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : text": the text is what a person needs.
    return str(e).rsplit("[ONNXRuntimeError] : ", 1)[-1].split(" : ", 2)[-1].strip()
