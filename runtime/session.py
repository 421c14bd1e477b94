"""One model, opened and checked: arrays in, arrays out, and proof of where it ran."""

from __future__ import annotations

import functools
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..artifact import Manifest
from ..errors import ArtifactError, InputError, OnnxpressError, ProviderError, UsageError
from . import providers
from .binding import Binding
from .buffers import Buffer
from .choosing import Wish, take
from .graph_capture import uncaptured
from .memory import Residence, residence
from .opening import Elsewhere, Model, locate
from .placement import Placement, count_memcpy, placed_nodes
from .signature import Array, Checker, Feeds, close_match, spec_of


class Session:
    """A model that runs where it was asked to run, or not at all.

    All nodes run on one provider: `provider="cuda"` raises where one node would fall to the CPU.
    Several are an order of preference, "tensorrt,cuda,cpu": the first that takes every node gets
    them all. A session may be used from many threads at once.

    Args:
        path: A model.onnx, or an artifact directory.
        provider: None for the one that the artifact was made for (the CPU, where that is any). A
            name (cpu, cuda, tensorrt, openvino, coreml, directml, qnn, migraphx), several
            with commas, or a sequence of them.
        allow_fallback: Spread the nodes over all the providers asked for, in this order, and over
            the CPU as the last; each of them must be there.
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
        shapes: Least, best and greatest size of each name in the signature, which an engine of
            TensorRT is built for. None takes what the manifest says under `runtime.shapes`.
        cache: Directory of engines; None takes $ONNXPRESS_CACHE, or ~/.cache/onnxpress.
        cuda_graph: Record the kernels of a run and replay them (`bind`); cuda and tensorrt only.

    Raises:
        ArtifactError: There is no model here, or it is damaged.
        MissingPackage: onnxruntime is not installed.
        ProviderError: No provider that was asked for takes every node: for each what it lacks, or
            which nodes it refused.
        UsageError: A provider's name or its options are wrong, or CUDA graphs were asked of a
            provider that has none.

    Attributes:
        path: The graph's file.
        manifest: The artifact's manifest; None for a bare model.onnx.
        inputs: Name, dtype and shape of each input, in order.
        outputs: The same of each output.
        provider: The short name of the provider that took the nodes; the first of those asked for
            with `allow_fallback`.
        skipped: Those before it that did not take them, and why.
        cuda_graph: Whether it records the kernels of a run and replays them.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        provider: str | Sequence[str] | None = None,
        allow_fallback: bool = False,
        threads: int | None = None,
        arena: bool = True,
        optimize: bool | None = None,
        disabled_optimizers: Sequence[str] | None = None,
        provider_options: providers.ProviderOptions | None = None,
        config: Mapping[str, str] | None = None,
        shapes: Mapping[str, tuple[int, int, int]] | None = None,
        cache: str | os.PathLike[str] | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.manifest, self.path = locate(path)
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        recorded = self.manifest.runtime if self.manifest else {}
        self._model = Model.of(
            self.path,
            self.manifest,
            threads=threads,
            arena=arena,
            optimize=optimize,
            disabled=disabled_optimizers,
            config=config,
        )
        self._rt = self._model.rt
        self._placement: Placement | None = None
        self._lock = threading.Lock()
        wish = Wish(
            providers.resolve(made_for(self.manifest) if provider is None else provider),
            provider_options or {},
            self.manifest,
            shapes,
            Path(cache) if cache is not None else None,
            cuda_graph,
        )
        try:
            taken = take(self._model, wish, allow_fallback=allow_fallback)
        except ProviderError as e:
            if provider is None and "cpu" not in wish.asked:  # nobody has chosen it: it was made so
                other = "provider='cpu' (--provider cpu)"
                e.hint = f"{e.hint}; or {other}" if e.hint else other
            raise
        self._plans, self._session, self.skipped = taken
        self.provider = next(iter(self._plans))
        self.inputs = tuple(spec_of(i) for i in self._session.get_inputs())
        self.outputs = tuple(spec_of(o) for o in self._session.get_outputs())
        self._check = Checker(self.inputs, recorded.get("padding"))
        self._profile = next((p.profile for p in self._plans.values() if p.profile), None)
        self._output_names = [o.name for o in self.outputs]
        self.cuda_graph = any(p.graph_option for p in self._plans.values())
        self._run_options = uncaptured(self._rt) if self.cuda_graph else None
        # That provider reads no number of a graph: it captures every run, guarded or not.
        self._bound_only = "tensorrt" in self._plans and self._plans["tensorrt"].graph_option

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
            UsageError: The session captures CUDA graphs on TensorRT, which only `bind` can run.
        """
        self._check(feeds)
        if self._profile is not None:
            self._profile.check(feeds)
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
        if self._bound_only:
            raise _only_bound("a run whose memory is freed behind it")
        try:
            values = self._session.run(names, feeds, self._run_options)
        except Exception as e:  # ONNX Runtime's errors share no base class but Exception
            raise self._failed(e) from e
        return dict(zip(names, values, strict=True))

    # On memory that stays ----------------------------------------------------------------------

    def bind(self, outputs: Sequence[str] | None = None, *, capture: bool = True) -> Binding:
        """Inputs and outputs bound to memory, for runs that copy nothing; see `Binding`.

        Args:
            outputs: Names of the outputs wanted; None for all.
            capture: Whether a session with CUDA graphs records the runs. False suits shapes that
                hardly come again: each recording holds memory until the session is closed.

        Raises:
            InputError: There is no such output, or one of its type cannot be bound.
            UsageError: `capture=False` with CUDA graphs on TensorRT, which captures every run.
        """
        if self._bound_only and not capture:
            raise _only_bound("capture=False")
        return Binding(self, self._residence, outputs, capture=capture)

    def buffer(self, shape: Sequence[int], dtype: Any, device: str | None = None) -> Buffer:
        """A tensor of memory that stays where it is, its values undefined; see `Buffer`.

        Args:
            shape: The sizes.
            dtype: "float32", "bfloat16", "bool", ... or numpy's.
            device: None for the session's, "cuda:0" or "cpu"; "cpu"; or "pinned", memory of the
                host that the GPU reads directly, for sessions on one.

        Raises:
            OnnxpressError: There is not that much memory.
            UsageError: The dtype, a size or the device is none that there is.
        """
        return self._residence.memory.buffer(shape, dtype, device)

    @functools.cached_property
    def _residence(self) -> Residence:
        # From Python 3.12 on a cached_property has no lock: of two threads, the first one's counts.
        made: Residence = self.__dict__.setdefault("_residence", residence(self._rt, self._session))
        return made

    # Where it ran -----------------------------------------------------------------------------

    def placement(self, *, copies: bool = True) -> Placement:
        """The provider of every node, and the number of copies between host and device.

        The first call on a CPU session opens the model a second time for a moment: recording
        costs about 5% of the load, and few ask.

        Args:
            copies: Count the copies. On a GPU that takes a second session for a moment, with its
                memory there, which writes graph and weights to a temporary directory; without,
                `memcpy` is None where there may be some.

        Raises:
            OnnxpressError: There is no memory for the second session, or no room for its files.
        """
        with self._lock:
            if self._placement is None:
                if list(self._plans) == ["cpu"]:
                    session = self._open({"session.record_ep_graph_assignment_info": "1"})
                    self._placement = Placement(placed_nodes(session), 0)
                else:
                    nodes = placed_nodes(self._session)
                    # CUDA copies around kernels that read sizes from the host, others at borders.
                    some = "cuda" in self._plans or len({n.provider for n in nodes}) > 1
                    if some and not copies:
                        return Placement(nodes, None)
                    self._placement = Placement(nodes, self._count_memcpy() if some else 0)
            return self._placement

    def elsewhere(self) -> list[Elsewhere]:
        """The nodes that do not lie on `provider`: what they are, where they lie, and why.

        There are some with `allow_fallback` alone.
        """
        return self._model.elsewhere(self.placement(copies=False), [self.provider])

    def _count_memcpy(self) -> int | None:
        # Copies are put in after placement, so only the finished graph shows them.
        with tempfile.TemporaryDirectory() as folder:
            graph = Path(folder) / "placed.onnx"
            entry = "session.optimized_model_external_initializers_file_name"
            try:
                self._open({entry: "placed.data"}, save_as=graph)
                return count_memcpy(graph)
            except Exception as e:  # ONNX Runtime's errors share no base class but Exception
                if "contains compiled nodes" in str(e):  # of TensorRT: no file holds those
                    return None
                raise self._model.failed_open(e, list(self._plans)) from e

    def _open(self, config: Mapping[str, str], *, save_as: Path | None = None) -> Any:
        return self._model.open(self._plans, config, save_as=save_as)

    def _failed(self, e: Exception) -> OnnxpressError:
        return self._model.failed_run(e, list(self._plans))


def _only_bound(what: str) -> UsageError:
    return UsageError(
        f"TensorRT with CUDA graphs captures every run, and {what} cannot be replayed",
        hint="use bind(), or open the session without cuda_graph",
    )


def made_for(manifest: Manifest | None) -> str:
    """The provider that an artifact was made for: "cpu" for what any may run.

    Raises:
        ArtifactError: There is no such provider.
    """
    target = str(manifest.target.get("provider", "any")) if manifest else "any"
    if target not in ("any", *providers.PROVIDERS):
        raise ArtifactError(
            f"the artifact was made for {target!r}, which this onnxpress does not know",
            hint="pip install --upgrade onnxpress, or name a provider that runs it",
        )
    return "cpu" if target == "any" else target
