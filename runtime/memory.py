"""Where the tensors of a session lie, and the ways there: allocation, sharing, copies, streams."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError, OnnxpressError, UsageError
from . import dlpack, providers
from .buffers import Buffer
from .cudart import Cudart, Staging
from .dlpack import Layout
from .gpu import gpu
from .graph_capture import Graphs
from .signature import Array


class Memory:
    """Where the tensors of one session lie, and how they get there.

    Args:
        rt: The onnxruntime module.
        options: What the CUDA or TensorRT provider was opened with, as ONNX Runtime has it; None
            for a session whose tensors lie on the host.
        owner: The InferenceSession, kept open as long as one of its buffers is used.

    Attributes:
        device: "cpu", or "cuda:0".
        index: The GPU's number.
        stream: The stream of the caller's that the session runs on (`user_compute_stream`), or
            None where ONNX Runtime has its own and every run waits for it.
    """

    def __init__(self, rt: Any, options: Mapping[str, str] | None, owner: object = None) -> None:
        self.rt, self._owner = rt, owner
        self.index = int((options or {}).get("device_id", 0))
        self.device = "cpu" if options is None else f"cuda:{self.index}"
        self.stream: int | None = None
        if options and options.get("has_user_compute_stream", "1") == "1":
            self.stream = int(options.get("user_compute_stream") or "0", 0) or None
        # How many copies were started, and how many of them a wait has covered. Threads share it.
        self._started = self._done = 0
        self._counting = threading.Lock()

    @functools.cached_property
    def cuda(self) -> Cudart:
        """The CUDA runtime on this device."""
        return Cudart(self.index)

    def buffer(self, shape: Sequence[int], dtype: Any, device: str | None = None) -> Buffer:
        """What `Session.buffer` gives."""
        name, sizes = _dtype(dtype), _sizes(shape)
        device = self._device(device)
        nbytes = math.prod(sizes) * dlpack.storage(name).itemsize
        if device == "pinned":
            block = self.cuda.pinned(max(nbytes, 1))[:nbytes]
            bits = block.view(dlpack.storage(name)).reshape(sizes)
            return Buffer(self._import(bits.__dlpack__(), name), self, "pinned")
        kind, _, index = device.partition(":")
        try:
            value = self.rt.OrtValue.ortvalue_from_shape_and_type(
                sizes, dlpack.ELEMENT_TYPES[name], kind, int(index or 0)
            )
        except Exception as e:  # its errors share no base class but Exception
            there = None if kind == "cpu" else gpu()
            free = f", which has {there.free / 2**20:.1f} MiB left" if there else ""
            raise OnnxpressError(
                f"there is no memory for {nbytes / 2**20:.1f} MiB on {device}{free}: {e}",
                hint="smaller or fewer buffers, or provider_options={'cuda': {'gpu_mem_limit': "
                "bytes}} for what the session itself takes"
                if there
                else "smaller or fewer buffers",
            ) from e
        return Buffer(value, self, device)

    def wrap(self, source: Any, place: Layout, what: str) -> Buffer:
        """What `source` gave as a Buffer on the same memory, which is kept alive.

        Raises:
            InputError: There is an `obstacle`.
        """
        if isinstance(source, Buffer):
            return source
        found = obstacle(source, place)
        if found is not None:
            raise InputError(
                f"{what} was given {found[0]}, which cannot be bound in place", hint=found[1]
            )
        if isinstance(source, np.ndarray):
            source = source.view(dlpack.storage(place.dtype)).__dlpack__()
        shared = self._import(source, place.dtype)
        on_gpu = place.device[0] == dlpack.CUDA
        buffer = Buffer(shared, self, self.device if on_gpu else "cpu")
        buffer.shared = True
        return buffer

    def _import(self, capsule: Any, dtype: str) -> Any:
        if dtype == "bfloat16":  # where it was made from its bits in numpy
            dlpack.retype(capsule, dlpack.UINT, dlpack.BFLOAT)
        if dtype == "bool" and not _knows_bool(self.rt):
            dlpack.retype(capsule, dlpack.BOOL, dlpack.UINT)
        return self.rt.OrtValue.from_dlpack(_Capsule(capsule, dtype))

    def source(self, value: Any, what: str) -> tuple[Any, Layout]:
        """The tensor behind a value: what keeps it alive (an array, a capsule), and its layout.

        Raises:
            InputError: It is no tensor, or one on a device that is not this session's.
        """
        if isinstance(value, np.ndarray):
            return _numpy(value, what)
        if isinstance(value, Buffer) and value.memory is self:
            device = value.__dlpack_device__()
            return value, Layout(value.pointer, device, value.dtype, value.shape, None)
        if not (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")):
            raise InputError(
                f"{what} takes a numpy array, a Buffer or a tensor with __dlpack__, "
                f"not {type(value).__name__}"
            )
        kind, index = value.__dlpack_device__()
        device = (int(kind), int(index))
        here = (dlpack.CUDA, self.index) if self.device != "cpu" else (dlpack.CPU, 0)
        if device != here and device[0] not in (dlpack.CPU, dlpack.CUDA_HOST):
            raise InputError(
                f"{what} was given a tensor on {_spell(device)}, and the session runs on "
                f"{self.device}",
                hint=f"move it there first, as with tensor.to({self.device!r})",
            )
        if device[0] != dlpack.CUDA:
            capsule = dlpack.capsule_of(value, what)
        else:  # 1: the legacy default stream, for a session whose own stream nobody knows
            capsule = dlpack.capsule_of(value, what, self.stream or 1)
        return capsule, dlpack.layout(capsule, what)

    def _device(self, device: str | None) -> str:
        if device is None or device == self.device or device == "cpu":
            return device or self.device
        if self.device != "cpu" and device in ("cuda", "pinned"):
            return self.device if device == "cuda" else "pinned"
        known = ["cpu"] if self.device == "cpu" else [self.device, "pinned", "cpu"]
        raise UsageError(
            f"a session on {self.device} has no buffers on {device!r}",
            hint=f"one of {', '.join(known)}",
        )

    # Copies and streams: only for sessions on a GPU --------------------------------------------

    def send(self, staging: Staging, source: Array, target: int) -> None:
        """Start the copy of a host array to the device, ordered before the next run."""
        staging.send(source, target, self.stream)
        self._begun()

    def put(self, target: int, source: int, nbytes: int) -> None:
        """Start a copy to the device, ordered before the next run."""
        self.cuda.copy(target, source, nbytes, self.stream)
        self._begun()

    def fetch(self, target: int, source: int, nbytes: int) -> None:
        """Copy from the device to the host, after all that was started."""
        self.cuda.copy(target, source, nbytes, self.stream)
        self._begun()
        self.finish()

    def settle(self) -> None:
        """Before a run: copies that were started are done, or lie before it on its stream."""
        if self.stream is None:
            self.finish()

    def finish(self) -> None:
        """Wait for the copies that were started, by whichever thread."""
        started = self._started  # one that is started during the wait may not be covered by it
        if started > self._done:
            self.cuda.finish(self.stream)
            with self._counting:
                self._done = max(self._done, started)

    def _begun(self) -> None:
        with self._counting:
            self._started += 1

    def publish(self, stream: int | None) -> None:
        """Before a capsule is handed over: the consumer's stream comes after the session's."""
        if stream == -1:  # the consumer asks for no order
            return
        if self.stream is None:
            self.finish()
        elif stream != self.stream:
            self.cuda.order(self.stream, stream)


@dataclass(frozen=True)
class Residence:
    """What the bindings of one session share.

    Attributes:
        memory: Where its tensors lie.
        graphs: Its CUDA graphs; None where it captures none.
        on_host: The inputs and outputs that the host reads and writes, also on a GPU.
    """

    memory: Memory
    graphs: Graphs | None
    on_host: frozenset[str]


def residence(rt: Any, session: Any) -> Residence:
    """The residence of an InferenceSession."""
    provider = session.get_providers()[0]
    options = session.get_provider_options().get(provider, {})
    cuda, tensorrt = (providers.PROVIDERS[name].ort for name in ("cuda", "tensorrt"))
    on_gpu = provider in (cuda, tensorrt)
    memory = Memory(rt, options if on_gpu else None, session)
    graphs = None
    if provider == cuda and providers.is_on(options.get("enable_cuda_graph", "")):
        graphs = Graphs()
    elif provider == tensorrt and providers.is_on(options.get("trt_cuda_graph_enable", "")):
        graphs = Graphs(limit=1)  # that provider reads no number: its one graph is every run's
    homes = [
        *zip(session.get_inputs(), session.get_input_memory_infos(), strict=True),
        *zip(session.get_outputs(), session.get_output_memory_infos(), strict=True),
    ]
    on_host = frozenset(v.name for v, info in homes if not on_gpu or info.name.startswith("Cpu"))
    return Residence(memory, graphs, on_host)


def obstacle(source: Any, place: Layout) -> tuple[str, str] | None:
    """Why what `Memory.source` gave cannot be bound where it lies, and a hint; None if it can."""
    if not place.contiguous:
        hint = "tensor.contiguous(), or np.ascontiguousarray(array), and keep that one"
        return "a tensor that is not contiguous", hint
    if isinstance(source, np.ndarray):
        if not source.flags.aligned:
            return "an array whose elements are not aligned", "array.copy(), and keep that one"
        # numpy exports no such array; an OrtValue made of it otherwise would not hold its memory,
        # and whoever has the buffer could write.
        if not source.flags.writeable:
            return "a read-only array", "array.copy(), and keep that one"
    return None


class _Capsule:
    # What OrtValue.from_dlpack looks for; 1.31 takes bytes for booleans where `dtype` says so.
    def __init__(self, capsule: Any, dtype: str) -> None:
        self._capsule, self.dtype = capsule, dtype

    def __dlpack__(self) -> Any:
        return self._capsule


@functools.cache
def _knows_bool(rt: Any) -> bool:
    value = rt.OrtValue.ortvalue_from_shape_and_type([1], dlpack.ELEMENT_TYPES["bool"])
    return dlpack.layout(value.__dlpack__(), "a buffer").dtype == "bool"


def _numpy(array: Array, what: str) -> tuple[Any, Layout]:
    # Read without a capsule: numpy gives none for read-only arrays, nor for ml_dtypes' bfloat16.
    name = array.dtype.name
    if name not in dlpack.ELEMENT_TYPES or not array.dtype.isnative:
        raise InputError(
            f"{what} was given an array of dtype {array.dtype}, which cannot be bound",
            hint=f"one of {', '.join(dlpack.ELEMENT_TYPES)}, in the byte order of this machine",
        )
    steps = [s // array.itemsize for s in array.strides]
    place = Layout(array.ctypes.data, (dlpack.CPU, 0), name, array.shape, tuple(steps))
    return array, place


def _dtype(dtype: Any) -> str:
    try:
        name = str(dtype) if str(dtype) == "bfloat16" else np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in dlpack.ELEMENT_TYPES:
        raise UsageError(
            f"there are no buffers of dtype {name!r}",
            hint=f"one of {', '.join(dlpack.DTYPES.values())}",
        )
    return name


def _sizes(shape: Sequence[int]) -> list[int]:
    sizes = [int(n) for n in shape]
    if any(n < 0 for n in sizes):
        raise UsageError(f"a buffer's sizes are 0 or more, not {sizes}")
    return sizes


def _spell(device: tuple[int, int]) -> str:
    kinds = {dlpack.CPU: "cpu", dlpack.CUDA: "cuda", 4: "opencl", 7: "vulkan", 8: "metal"}
    kinds |= {10: "rocm", 13: "cuda (managed)", 14: "oneapi"}
    return f"{kinds.get(device[0], f'DLPack device type {device[0]}')}:{device[1]}"
