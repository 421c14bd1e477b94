"""The few calls of the CUDA runtime that ONNX Runtime's Python module does not offer.

Pinned memory, copies on a stream, and one stream that waits for another without the host. The
library is the one that the CUDA provider has loaded: the same process, the same contexts.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from typing import Any

import numpy as np

from ..errors import ProviderError
from .shared_objects import load
from .signature import Array

_NAMES = ("libcudart.so.13", "libcudart.so.12")
_LEGACY = 1  # the legacy default stream, as CUDA and DLPack number it
_DIRECTION_BY_ADDRESS, _NO_TIMING = 4, 2  # cudaMemcpyDefault, cudaEventDisableTiming


class Cudart:
    """The CUDA runtime, on one device.

    Args:
        index: The device.
    """

    def __init__(self, index: int) -> None:
        self._index, self._library = index, _load()

    def pinned(self, nbytes: int) -> Array:
        """Bytes of the host that the GPU reads directly; freed with the last array over them.

        Raises:
            ProviderError: There is no memory left to pin.
        """
        pointer = ctypes.c_void_p()
        self.call("cudaHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(nbytes), ctypes.c_uint(0))
        return np.asarray(_Pinned(self, pointer.value or 0, nbytes))

    def copy(self, target: int, source: int, nbytes: int, stream: int | None) -> None:
        """Start a copy on a stream (None: the default one); addresses tell the direction."""
        if nbytes:
            self.call(
                "cudaMemcpyAsync",
                ctypes.c_void_p(target),
                ctypes.c_void_p(source),
                ctypes.c_size_t(nbytes),
                ctypes.c_int(_DIRECTION_BY_ADDRESS),
                ctypes.c_void_p(stream),
            )

    def finish(self, stream: int | None) -> None:
        """Wait on the host until a stream has done all that it was given."""
        self.call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def event(self) -> int:
        """A point in the work of a stream, for `mark` and `wait`."""
        event = ctypes.c_void_p()
        self.call("cudaEventCreateWithFlags", ctypes.byref(event), ctypes.c_uint(_NO_TIMING))
        return event.value or 0

    def mark(self, event: int, stream: int | None) -> None:
        """Let the event stand for all that the stream was given until now."""
        self.call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def wait(self, event: int) -> None:
        """Wait on the host until the event is reached."""
        self.call("cudaEventSynchronize", ctypes.c_void_p(event))

    def forget(self, event: int) -> None:
        """Free an event; CUDA keeps what waiting streams still need of it."""
        self.call("cudaEventDestroy", ctypes.c_void_p(event))

    def order(self, first: int, then: int | None) -> None:
        """Let the stream `then` (a handle, or DLPack's number of a default one) wait for `first`.

        The host goes on at once.
        """
        event = self.event()
        try:
            self.mark(event, first)
            waiting = ctypes.c_void_p(_LEGACY if then is None else then)
            self.call("cudaStreamWaitEvent", waiting, ctypes.c_void_p(event), ctypes.c_uint(0))
        finally:
            self.forget(event)

    def call(self, name: str, *args: Any) -> None:
        """One function of the library, on this device; the thread's own device is left as it was.

        Raises:
            ProviderError: It failed; its code is in the message.
        """
        before = ctypes.c_int()
        self._call("cudaGetDevice", ctypes.byref(before))
        if before.value == self._index:
            self._call(name, *args)
            return
        self._call("cudaSetDevice", ctypes.c_int(self._index))
        try:
            self._call(name, *args)
        finally:
            self._call("cudaSetDevice", before)

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            memory = " (out of memory)" if status == 2 else ""
            raise ProviderError(
                f"{name} failed with CUDA error {status}{memory}",
                hint="smaller or fewer buffers" if memory else "look at the driver: `nvidia-smi`",
            )


class _Pinned:
    # numpy keeps this object as the base of its array, and with it the memory.
    def __init__(self, runtime: Cudart, pointer: int, nbytes: int) -> None:
        self.__array_interface__ = {
            "data": (pointer, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }
        weakref.finalize(
            self, runtime.call, "cudaFreeHost", ctypes.c_void_p(pointer)
        ).atexit = False  # the driver may be gone by then, and frees it all


@functools.cache
def _load() -> ctypes.CDLL:
    for name in _NAMES:
        library = load(name)
        if not isinstance(library, str):
            return library
    raise ProviderError(
        f"the CUDA runtime ({_NAMES[0]}) is not loaded in this process",
        hint="open the session with provider='cuda' first; `onnxpress doctor` says what is missing",
    )


class Staging:
    """Pinned memory through which one tensor goes to the device, again and again.

    Args:
        runtime: The CUDA runtime.
        nbytes: The tensor's size.
    """

    def __init__(self, runtime: Cudart, nbytes: int) -> None:
        self._runtime, self._block, self._event = runtime, runtime.pinned(nbytes), runtime.event()
        weakref.finalize(self, runtime.forget, self._event).atexit = False

    def send(self, source: Array, target: int, stream: int | None) -> None:
        """Start the copy of an array to an address; the array may be changed at once."""
        self._runtime.wait(self._event)  # the copy before may still be read
        block = self._block.view(source.dtype).reshape(source.shape)
        np.copyto(block, source)
        self._runtime.copy(target, block.ctypes.data, block.nbytes, stream)
        self._runtime.mark(self._event, stream)
