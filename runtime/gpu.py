"""The driver and the GPU of this process, asked by ctypes: no package of NVIDIA's is needed."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .shared_objects import load

DRIVER = "libcuda.so.1"


def int_by_pointer(handle: ctypes.CDLL, function: str) -> int:
    """What a function of one int* writes there; 0 where the library has no such function."""
    value = ctypes.c_int(0)
    with suppress(AttributeError):
        getattr(handle, function)(ctypes.byref(value))
    return value.value


def driver_version(cuda: int) -> int:
    """The newest CUDA of the driver as 1000 * major + 10 * minor; 0 where nobody says."""
    runtime = load(f"libcudart.so.{cuda}")
    if not isinstance(runtime, str) and (n := int_by_pointer(runtime, "cudaDriverGetVersion")):
        return n
    handle = load(DRIVER)
    return 0 if isinstance(handle, str) else int_by_pointer(handle, "cuDriverGetVersion")


def kernel_driver() -> str:
    """The version of the driver's kernel module, such as 580.65.06, or nothing."""
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        if match := re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text):
            return match.group(1)
    return ""


def devices(cuda: int) -> tuple[int | None, str]:
    """Number of GPUs that this process sees, None where nobody says; and CUDA's words."""
    runtime = load(f"libcudart.so.{cuda}")
    if isinstance(runtime, str):
        return None, ""
    count = ctypes.c_int(0)
    code = int(runtime.cudaGetDeviceCount(ctypes.byref(count)))
    if code in (0, 100):  # success, no device
        return count.value if code == 0 else 0, ""
    text = ""
    with suppress(AttributeError):
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        text = (runtime.cudaGetErrorString(code) or b"").decode(errors="replace")
    return 0, f": {text or f'CUDA error {code}'}"


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, its memory and what of it is free in bytes, its compute capability."""

    name: str
    memory: int
    free: int
    capability: str


def gpu(cuda: int = 13) -> Gpu | None:
    """The current GPU of this process, or None where none answers."""
    runtime = load(f"libcudart.so.{cuda}")
    if isinstance(runtime, str) or not devices(cuda)[0]:
        return None
    free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
    device = ctypes.c_int(0)
    runtime.cudaGetDevice(ctypes.byref(device))
    if runtime.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)):
        return None
    name, capability = card(device.value, cuda) or ("", "")
    return Gpu(name, total.value, free.value, capability)


def card(device: int, cuda: int = 13) -> tuple[str, str] | None:
    """Name and compute capability of a GPU by its number, or None where none answers.

    Unlike `gpu`, it takes no memory of the GPU: no context is made there.
    """
    runtime = load(f"libcudart.so.{cuda}")
    if isinstance(runtime, str) or not 0 <= device < (devices(cuda)[0] or 0):
        return None
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    properties = ctypes.create_string_buffer(8192)  # cudaDeviceProp begins with char name[256]
    runtime.cudaDeviceGetAttribute(ctypes.byref(major), 75, device)
    runtime.cudaDeviceGetAttribute(ctypes.byref(minor), 76, device)
    runtime.cudaGetDeviceProperties(properties, device)
    name = properties.raw[:256].split(b"\0")[0].decode(errors="replace")
    return name, f"{major.value}.{minor.value}"
