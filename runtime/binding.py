"""Runs on tensors that stay where they are: nothing is copied that need not be."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifact import TensorSpec, evaluate
from ..errors import InputError, UsageError
from . import dlpack, graph_capture
from .buffers import Buffer, host_bits
from .graph_capture import Bucket, Graphs
from .memory import Residence, obstacle
from .signature import Array, Checker, check_padding, close_match

if TYPE_CHECKING:
    from .session import Session


class Binding:
    """The inputs and outputs of a session, bound to memory; made by `Session.bind`.

        binding = session.bind()
        binding.input("input_ids", ids)             # a numpy array, a Buffer, a torch tensor, ...
        binding.output("logits", torch_tensor)      # or leave it out, and a Buffer comes back
        logits = binding.run()["logits"]
        torch.from_dlpack(logits)                   # shares; logits.numpy() copies to the host

    A binding is used by one thread at a time; a session may have many bindings.

    What is copied: on a CPU session only arrays that are not contiguous, not aligned or read-only.
    On a GPU, what lies on the GPU is used in place, and what lies on the host is copied there by
    `input`, through pinned memory. A tensor used in place may be changed between runs, and the
    next run sees it; of a copied one, give it to `input` again.

    How long things live: a bound tensor is held by the binding until another takes its place. A
    result that ONNX Runtime allocated is new in every run. The same Buffer may be bound as an
    input and as an output, which is how a key-value cache grows in place.

    Streams: a session runs on a stream of ONNX Runtime's own. `run` waits, before it starts, for
    tensors that other libraries may still be writing, and at its end for the outputs; so any
    stream may go on with them. To chain without the host waiting, open the session on the stream
    of your other code: `provider_options={"cuda": {"user_compute_stream": stream.cuda_stream}}`.
    Then `run` only enqueues: tensors are ordered by events on the device, as DLPack has it, and
    `Buffer.numpy` waits. Let go of an output only when the work that reads it has been done.

    CUDA graphs (`Session(..., cuda_graph=True)`): the first run with a set of shapes executes the
    graph three times and records it, the later ones replay the recording. Outputs that are not
    bound are allocated once for each set of shapes, so that the next run overwrites them. Arrays
    from the host are written to one address for each shape. A tensor of yours must stay at its
    address: see `run`. No other thread may use the GPU during a first run, and a binding stays
    with the thread that ran it first. A graph that adds to what it reads must not be bound in
    place there; a cache that is written by position may be.
    """

    def __init__(
        self,
        session: Session,
        residence: Residence,
        outputs: Sequence[str] | None,
        *,
        capture: bool = True,
    ) -> None:
        self._session, self._memory = session, residence.memory
        self._graphs = residence.graphs if capture else None
        self._inputs = {i.name: i for i in session.inputs}
        known = {o.name: o for o in session.outputs}
        names = list(known) if outputs is None else list(outputs)
        self._outputs = {name: _known(name, known, "output") for name in names}
        if not names:
            raise UsageError("a binding needs an output", hint=f"some of {', '.join(known)}")
        for spec in [*self._inputs.values(), *self._outputs.values()]:
            _element(spec)  # refused here, not in the middle of a loop
        self._on_host = residence.on_host
        self._io = session._session.io_binding()
        self._bound: dict[str, Buffer] = {}  # inputs
        self._given: dict[str, Buffer] = {}  # outputs that the caller bound
        self._foreign: dict[str, Any] = {}  # inputs on the device that another library writes
        self._copies: dict[str, dict[tuple[int, ...], Buffer]] = {name: {} for name in self._inputs}
        self._changed = True
        self._check, self._padding = Checker(session.inputs), session._check.padding
        self._check_one = {i.name: Checker([i]) for i in session.inputs}
        # On the caller's stream a run only enqueues.
        waits = {} if self._memory.stream is None else {_NO_WAIT: "1"}
        self._entries = dict(waits)
        free = dict(waits) if residence.graphs is None else {**waits, "gpu_graph_id": "-1"}
        self._options = graph_capture.run_options(self._memory.rt, **free) if free else None
        self._buckets: dict[Any, Bucket] = {}
        self._bucket: Bucket | None = None
        self._thread: int | None = None
        self._running = threading.Lock()
        for name in self._outputs:  # the order of the results
            self._loose(name)

    def input(self, name: str, value: Any) -> None:
        """Bind an input.

        Args:
            name: The input's name.
            value: A numpy array, a `Buffer`, or a tensor with `__dlpack__` (torch, cupy, jax), of
                the input's dtype, on the host or on the session's device. Where it is not
                contiguous, not aligned or read-only on the host it is copied; on a GPU it must be
                contiguous. A mask that has to pad on the right is checked when it is copied, and
                by every `run` if it is used on the host; one on a GPU is not looked at.

        Raises:
            InputError: There is no such input, or the value does not fit it: dtype, rank, a fixed
                size, a device that is not the session's, a mask's padding.
        """
        spec, what = _known(name, self._inputs, "input"), f"the input {name!r}"
        source, place = self._memory.source(value, what)
        self._fits(spec, place.dtype, place.shape)
        on_host = place.device[0] != dlpack.CUDA
        read_on_host = name in self._on_host
        if read_on_host and not on_host:
            raise InputError(
                f"{what} is read by the host, and was given a tensor on {self._memory.device}",
                where=str(spec),
                hint="a numpy array, or session.buffer(shape, dtype, device='cpu')",
            )
        self._foreign.pop(name, None)
        # A graph reads what lies on the host once, while it is captured: hence a copy as well.
        in_place = read_on_host == on_host and not (on_host and self._graphs)
        if in_place and (not on_host or obstacle(source, place) is None):
            buffer = self._memory.wrap(source, place, what)
            if not on_host and source is not value:
                self._foreign[name] = value
        else:
            if name in self._padding:
                check_padding(name, host_bits(source, place))
            buffer = self._home(spec, place.shape)
            buffer.write(source, place)
        before = self._bound.get(name)
        if buffer is not before:
            self._bind(self._io.bind_input, self._io.bind_ortvalue_input, name, buffer)
            self._bound[name] = buffer
        moved = buffer is not before or read_on_host  # what a captured graph would not see
        if before is None or buffer.shape != before.shape or (moved and self._graphs):
            self._changed = True

    def output(self, name: str, buffer: Any) -> None:
        """Bind an output to memory that the run writes into.

        Args:
            name: The output's name.
            buffer: A `Buffer`, a writable numpy array or a tensor with `__dlpack__`: of the
                output's dtype and shape, contiguous, aligned, and where the session writes this
                output (its device). None: let ONNX Runtime allocate it again.

        Raises:
            InputError: There is no such output in this binding, or the memory does not fit it.
        """
        spec, what = _known(name, self._outputs, "output"), f"the output {name!r}"
        self._changed = True
        if buffer is None:
            self._given.pop(name, None)
            self._loose(name)
            return
        source, place = self._memory.source(buffer, what)
        buffer = self._memory.wrap(source, place, what)
        home = "cpu" if name in self._on_host else self._memory.device
        if buffer.on_host != (home == "cpu"):
            raise InputError(
                f"{what} is written on {home}, and was given memory on {buffer.device}",
                where=str(spec),
                hint="leave it out, and copy the result: run()[name].numpy()",
            )
        if buffer.dtype != _element(spec):
            raise InputError(
                f"{what} is {_element(spec)}, and was given memory of {buffer.dtype}",
                where=str(spec),
            )
        self._sized(spec, buffer, {})
        self._bind(self._io.bind_output, self._io.bind_ortvalue_output, name, buffer)
        self._given[name] = buffer

    def bound(self, name: str) -> Buffer:
        """The Buffer that an input reads from, or that an output of the caller's writes to.

        For an array from the host on a GPU it is the copy there: `copy_from` writes the next one.

        Raises:
            InputError: Nothing is bound to this name.
        """
        buffers = {**self._given, **self._bound}
        if name not in buffers:
            raise InputError(
                f"nothing is bound to {name!r}{close_match(name, list(buffers))}",
                hint=f"binding.input({name!r}, value) or binding.output({name!r}, buffer) first",
            )
        return buffers[name]

    def run(self) -> dict[str, Buffer]:
        """Run the model once on what is bound.

        Returns:
            The outputs by name, in the order of `Session.bind`: the caller's own memory where it
            was bound, else new Buffers on the session's device (under CUDA graphs: the same ones
            for the same shapes).

        Raises:
            InputError: An input is missing, sizes that must agree do not, or a mask pads wrongly.
            UsageError: Under a captured CUDA graph an address is another than at the capture, the
                session has as many graphs as it may, or another thread runs this binding.
        """
        if not self._running.acquire(blocking=False):
            raise UsageError(
                "another thread is running this binding", hint="session.bind() for each thread"
            )
        try:
            return self._run()
        finally:
            self._running.release()

    def _run(self) -> dict[str, Buffer]:
        if self._changed:
            self._prepare()
        if self._graphs is not None and self._thread != threading.get_ident():
            raise UsageError(
                "the CUDA graphs of this binding were captured in another thread, and ONNX Runtime "
                "replays them only there",
                hint="session.bind() for each thread",
            )
        for name in self._padding:
            if self._bound[name].on_host:  # it may have been written since the last run
                check_padding(name, self._bound[name].view())
        self._order()
        if self._bucket is None:
            for name in self._outputs:
                if name not in self._given:
                    self._loose(name)  # else the run writes into the result of the one before
            self._execute(self._options)
            return self._results()
        self._bucket.run(self._execute)
        return {name: self._bucket.tensors["output", name] for name in self._outputs}

    # What run does, step by step ---------------------------------------------------------------

    def _prepare(self) -> None:
        feeds = {n: _stand_in(b.dtype, b.shape) for n, b in self._bound.items()}
        self._check(feeds)
        if self._session._profile is not None:
            self._session._profile.check(feeds)
        sizes = {
            dim: size
            for name, b in self._bound.items()
            for dim, size in zip(self._inputs[name].shape, b.shape, strict=True)
            if isinstance(dim, str)
        }
        for name, buffer in self._given.items():
            self._sized(self._outputs[name], buffer, sizes)
        if self._graphs is not None:
            self._thread = self._thread or threading.get_ident()
            self._bucket = self._find(self._graphs, sizes)
        self._changed = False

    def _find(self, graphs: Graphs, sizes: Mapping[str, int]) -> Bucket:
        tensors = {("input", n): b for n, b in self._bound.items() if n not in self._on_host}
        tensors |= {("output", n): b for n, b in self._given.items()}
        # The host's values are read once, at the capture: other values are another graph.
        frozen = {n: b.numpy() for n, b in self._bound.items() if n in self._on_host}
        shapes = [f"{n} {list(b.shape)}" for (_, n), b in tensors.items()]
        key = (*shapes, *((n, v.shape, v.tobytes()) for n, v in frozen.items()))
        bucket = self._buckets.get(key)
        if bucket is None:
            words = ", ".join([*shapes, *(f"{n} = {v.tolist()}" for n, v in frozen.items())])
            number = graphs.new(words)
            tensors |= self._own(sizes)
            options = {**self._entries, "gpu_graph_id": str(number)}
            bucket = Bucket(
                number, words, tensors, graph_capture.run_options(self._memory.rt, **options)
            )
            self._buckets[key] = bucket
        bucket.check(tensors)
        for name in self._outputs:
            buffer = bucket.tensors["output", name]
            self._bind(self._io.bind_output, self._io.bind_ortvalue_output, name, buffer)
        return bucket

    def _own(self, sizes: Mapping[str, int]) -> dict[tuple[str, str], Buffer]:
        mine = {n: s for n, s in self._outputs.items() if n not in self._given}
        shapes: Any = {n: [evaluate(d, sizes) for d in s.shape] for n, s in mine.items()}
        if any(None in shape for shape in shapes.values()):  # only a run can tell: not recorded
            for name in mine:  # all of them: they may be bound to memory of other sizes
                self._loose(name)
            self._order()
            self._execute(self._options)
            shapes = {name: b.shape for name, b in self._results().items()}
        home, new = dict.fromkeys(self._on_host, "cpu"), self._memory.buffer
        return {("output", n): new(shapes[n], _element(s), home.get(n)) for n, s in mine.items()}

    def _order(self) -> None:
        if self._memory.device == "cpu":
            return
        for name, value in self._foreign.items():
            if self._memory.stream is not None:
                dlpack.capsule_of(value, f"the input {name!r}", self._memory.stream)
        if self._memory.stream is None:
            own = self._bucket.tensors.values() if self._bucket else ()  # a replay overwrites them
            buffers = [*self._bound.values(), *self._given.values(), *own]
            if any(b.shared and not b.on_host for b in buffers):
                self._io.synchronize_inputs()  # waits for the whole device
            self._memory.settle()

    def _execute(self, options: Any) -> None:
        try:
            self._session._session.run_with_iobinding(self._io, options)
        except Exception as e:  # ONNX Runtime's errors share no base class but Exception
            raise self._session._failed(e) from e

    def _results(self) -> dict[str, Buffer]:
        values = self._io.get_outputs_as_ortvaluevector()
        memory, results = self._memory, {}
        for i, name in enumerate(self._outputs):
            if name in self._given:
                results[name] = self._given[name]
            else:
                home = "cpu" if name in self._on_host else memory.device
                results[name] = Buffer(memory.rt.OrtValue(values[i]), memory, home)
        return results

    # Binding -----------------------------------------------------------------------------------

    def _loose(self, name: str) -> None:
        host = name in self._on_host or self._memory.device == "cpu"
        self._io.bind_output(name, "cpu" if host else "cuda", 0 if host else self._memory.index)

    def _bind(self, place: Any, share: Any, name: str, buffer: Buffer) -> None:
        if buffer.on_host or not buffer.pointer:
            share(name, buffer.value)
        else:  # by address: a foreign tensor's OrtValue need not name the device as ours do
            number = dlpack.ELEMENT_TYPES[buffer.dtype]
            place(name, "cuda", self._memory.index, number, list(buffer.shape), buffer.pointer)

    def _home(self, spec: TensorSpec, shape: tuple[int, ...]) -> Buffer:
        homes = self._copies[spec.name]
        if shape not in homes:
            if self._graphs is None:
                homes.clear()
            device = "cpu" if spec.name in self._on_host else None
            homes[shape] = self._memory.buffer(shape, _element(spec), device)
        return homes[shape]

    def _fits(self, spec: TensorSpec, dtype: str, shape: tuple[int, ...]) -> None:
        before = self._bound.get(spec.name)
        if before is not None and (before.dtype, before.shape) == (dtype, shape):
            return
        if dtype != _element(spec):
            raise InputError(
                f"the input {spec.name!r} takes {_element(spec)}, and got {dtype}", where=str(spec)
            )
        self._check_one[spec.name]({spec.name: _stand_in(dtype, shape)})

    def _sized(self, spec: TensorSpec, buffer: Buffer, sizes: Mapping[str, int]) -> None:
        want = [evaluate(d, sizes) for d in spec.shape]
        fits = len(want) == len(buffer.shape) and all(
            w is None or w == n for w, n in zip(want, buffer.shape, strict=True)
        )
        if not fits:
            shown = [d if w is None else w for d, w in zip(spec.shape, want, strict=True)]
            raise InputError(
                f"the output {spec.name!r} has the shape {shown}, and was given memory of shape "
                f"{list(buffer.shape)}",
                where=str(spec),
            )


_NO_WAIT = "disable_synchronize_execution_providers"


def _known(name: str, known: Mapping[str, TensorSpec], kind: str) -> TensorSpec:
    if name not in known:
        raise InputError(
            f"the binding has no {kind} {name!r}{close_match(str(name), list(known))}",
            hint=f"its {kind}s: {', '.join(known)}",
        )
    return known[name]


def _element(spec: TensorSpec) -> str:
    dtype = spec.dtype.removeprefix("tensor(").removesuffix(")")
    if dtype not in dlpack.ELEMENT_TYPES:
        raise InputError(
            f"{spec.name!r} is {spec.dtype}, which cannot be bound",
            where=str(spec),
            hint="Session.run takes it; an output can be left out: session.bind(outputs=[...])",
        )
    return dtype


def _stand_in(dtype: str, shape: tuple[int, ...]) -> Array:
    # For the check of feeds, which reads an array's dtype and shape: one element, repeated.
    return np.ndarray(shape, dlpack.storage(dtype), _ZERO, strides=(0,) * len(shape))


_ZERO = bytes(8)
