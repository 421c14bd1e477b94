"""Tensors that stay where they are: on a session's device, or in memory of the host."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, UsageError
from . import dlpack
from .cudart import Staging
from .dlpack import Layout
from .signature import Array

if TYPE_CHECKING:
    from .memory import Memory


class Buffer:
    """One tensor in memory of a fixed address; made by `Session.buffer` or `Binding.run`.

    Other libraries share it without a copy: `torch.from_dlpack(buffer)`, `cupy.from_dlpack`,
    `jax.dlpack.from_dlpack`. What they make of it keeps the memory alive, also after the Buffer
    is gone; a Buffer keeps its session open. What is written into one is seen in all.

    Attributes:
        shape: The sizes.
        dtype: "float32", "float16", "bfloat16", "bool", "int64", ...
        device: "cpu", "pinned" (memory of the host that the GPU reads directly), or "cuda:0".
        pointer: The address of the first element; 0 for a tensor without elements.
    """

    def __init__(self, value: Any, memory: Memory, device: str) -> None:
        self.value, self.memory = value, memory
        self.device = device
        self.dtype = dlpack.DTYPES[value.element_type()]
        self.shape: tuple[int, ...] = tuple(value.shape())
        self.pointer: int = value.data_ptr()
        self.shared = False  # someone else may be writing into it, on a stream of theirs
        self._staging: Staging | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * dlpack.storage(self.dtype).itemsize

    @property
    def on_host(self) -> bool:
        """Whether the host can read it: "cpu" and "pinned"."""
        return not self.device.startswith("cuda")

    def numpy(self) -> Array:
        """A copy on the host, in its shape; waits until the device has written it.

        bfloat16, which numpy lacks, comes as float32 of the same values.
        """
        bits = self._bits()
        if self.dtype != "bfloat16":
            return bits
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def _bits(self) -> Array:
        if self.on_host:
            return self._host().copy()
        out = np.empty(self.shape, dlpack.storage(self.dtype))
        self.memory.fetch(out.ctypes.data, self.pointer, self.nbytes)
        return out

    def view(self) -> Array:
        """The memory itself as a numpy array, for buffers on the host: writing changes the buffer.

        Raises:
            UsageError: It is on a device, or bfloat16.
        """
        if not self.on_host:
            raise UsageError(
                f"a buffer on {self.device} is not in the host's memory",
                hint="buffer.numpy() copies it; torch.from_dlpack(buffer) shares it on the device",
            )
        if self.dtype == "bfloat16":
            raise UsageError(
                "numpy has no bfloat16", hint="torch.from_dlpack(buffer), or buffer.numpy()"
            )
        return self._host()

    def _host(self) -> Array:
        if self.dtype != "bfloat16":
            array: Array = self.value.numpy()  # shares, and keeps the memory alive
            return array
        return dlpack.host_array(Layout(self.pointer, (1, 0), self.dtype, self.shape, None))

    def copy_from(self, array: Any) -> None:
        """Write a tensor of the same dtype and shape into this memory; the address stays.

        Args:
            array: A numpy array, a Buffer, or anything with `__dlpack__`, on the host or on this
                buffer's device, where it must be contiguous. It may be changed as soon as this
                returns. From the host to a GPU it goes through pinned memory, on the session's
                stream.

        Raises:
            InputError: Its dtype or shape is another, it lies on another device, or it lies on a
                device and is not contiguous.
        """
        self.write(*self.memory.source(array, "the buffer"))

    def write(self, source: Any, place: Layout) -> None:
        """`copy_from` for what `Memory.source` gave."""
        memory = self.memory
        for got, want, kind in (
            (place.dtype, self.dtype, "dtype"),
            (place.shape, self.shape, "shape"),
        ):
            if got != want:
                shown = [list(v) if isinstance(v, tuple) else v for v in (want, got)]
                raise InputError(f"the buffer has the {kind} {shown[0]}, and was given {shown[1]}")
        if not self.nbytes:
            return
        on_host = place.device[0] != dlpack.CUDA
        if not on_host and not place.contiguous:
            raise InputError(
                f"the buffer was given a tensor on {memory.device} that is not contiguous, of the "
                f"strides {list(place.strides or ())}",
                hint="tensor.contiguous()",
            )
        if self.on_host and on_host:
            np.copyto(self._host(), host_bits(source, place))
        elif self.on_host:
            memory.fetch(self.pointer, place.pointer, self.nbytes)
        elif on_host:
            if self._staging is None:
                self._staging = Staging(memory.cuda, self.nbytes)
            memory.send(self._staging, host_bits(source, place), self.pointer)
        else:
            memory.put(self.pointer, place.pointer, self.nbytes)
            memory.finish()

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule of this memory, without a copy.

        Args:
            stream: The consumer's CUDA stream as DLPack has it. Where the session runs on a
                stream of the caller's (`user_compute_stream`), the consumer's stream is made to
                wait for it on the device; elsewhere the run has ended already.
            max_version: Read by nothing: the first version of the protocol says all there is.
            dl_device: The device wanted; only this buffer's own.
            copy: True is refused.

        Raises:
            BufferError: A copy, or another device, was asked for (as the protocol has it).
        """
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError(f"a buffer on {self.device} is handed over where it lies, uncopied")
        if not self.on_host:
            self.memory.publish(stream)
        self.shared = True
        capsule = self.value.__dlpack__()
        if self.dtype == "bool":  # which ONNX Runtime 1.31 calls uint8
            dlpack.retype(capsule, dlpack.UINT, dlpack.BOOL)
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's (device type, index): (1, 0) on the host, (2, index) on a GPU."""
        return (dlpack.CPU, 0) if self.on_host else (dlpack.CUDA, self.memory.index)

    def __repr__(self) -> str:
        return f"Buffer({self.dtype}{list(self.shape)} on {self.device}, at {self.pointer:#x})"


def host_bits(source: Any, place: Layout) -> Array:
    """What `Memory.source` gave for a tensor on the host, as numpy: bfloat16 as uint16."""
    if isinstance(source, np.ndarray):
        return source.view(dlpack.storage(place.dtype))
    return dlpack.host_array(place)
