"""What a provider links against, and whether this machine has it: looked up before ONNX Runtime.

ONNX Runtime logs a library that is missing and goes on with the next provider. So the libraries
that the provider's own file names (its ELF NEEDED entries) are loaded here first, one by one; what
fails is told with the name, the version that was found in its place, and the pip line.

Only Linux is looked into. Elsewhere `check` finds nothing, and `providers.check_came_up` is left.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import ProviderError
from .gpu import DRIVER, devices, driver_version, int_by_pointer, kernel_driver
from .shared_objects import base, load, major, needed, other_version, path_of


@dataclass(frozen=True)
class Library:
    """One shared library by its soname: loaded, and from where, or not, and why.

    Attributes:
        soname: libcudart.so.13.
        name: What people call it, with the version that is linked: "CUDA 13 runtime".
        path: The file that was loaded; empty where none was.
        version: What the library says of itself; empty where it does not say.
        problem: Why it cannot be used; empty where it can.
        fix: The pip line, or what else mends it.
        lazy: It is loaded when a node needs it, not with the provider.
    """

    soname: str
    name: str
    path: str = ""
    version: str = ""
    problem: str = ""
    fix: str = ""
    lazy: bool = False


@dataclass(frozen=True)
class _Known:
    name: str
    package: str
    least: str = ""


# By the part of the soname before ".so". Packages of CUDA 13 carry no -cu13, cuDNN's does.
_KNOWN = {
    "libcudart": _Known("CUDA {} runtime", "nvidia-cuda-runtime"),
    "libcublas": _Known("cuBLAS {}", "nvidia-cublas"),
    "libcublasLt": _Known("cuBLASLt {}", "nvidia-cublas"),
    "libcurand": _Known("cuRAND {}", "nvidia-curand"),
    "libcudnn": _Known("cuDNN {}", "nvidia-cudnn-cu13"),
    "libnvinfer": _Known("TensorRT {}", "tensorrt-cu13", "10.15"),  # its RMSNormalization
    "libnvonnxparser": _Known("ONNX parser of TensorRT {}", "tensorrt-cu13", "10.15"),
}
_CUDNN = "libcudnn.so.9"  # not among the CUDA provider's NEEDED entries: loaded when first used
DRIVERS = {13: "580"}  # the first driver for a CUDA
GET_CUDNN = "pip install 'nvidia-cudnn-cu13>=9,<10'"
_GET_DRIVER = "install NVIDIA's driver, {} or newer: https://www.nvidia.com/drivers"


def check(provider: str, library: Path, *, cudnn_for: str = "") -> None:
    """Refuse a provider whose libraries are not all here, or whose GPU is not.

    Args:
        provider: Its short name.
        library: The provider's own shared library, inside the onnxruntime wheel.
        cudnn_for: An operator of the graph that needs cuDNN, which CUDA loads only then.

    Raises:
        ProviderError: Names every library with its problem; the hint holds the pip lines.
    """
    found = [one for one in examine(library) if cudnn_for or not one.lazy]
    bad = [one for one in found if one.problem]
    if bad:
        problems = [
            one.problem + (f", and {cudnn_for} needs it" if one.lazy else "") for one in bad
        ]
        raise ProviderError(
            f"the provider {provider!r} cannot start: {'; '.join(problems)}",
            where=str(library),
            hint=mend(bad),
        )


def mend(libraries: list[Library]) -> str:
    """The pip lines of several libraries as one, and after it what pip cannot do."""
    fixes = list(dict.fromkeys(one.fix for one in libraries if one.fix))
    pip = [f.removeprefix("pip install ") for f in fixes if f.startswith("pip install ")]
    rest = [f for f in fixes if not f.startswith("pip install ")]
    return "; ".join([*rest, *(["pip install " + " ".join(pip)] if pip else [])])


def examine(library: Path) -> list[Library]:
    """Every library of NVIDIA's that this provider needs, each tried.

    An empty list means that there is nothing to say: another system than Linux, or a provider
    that brings what it needs in its wheel.
    """
    if not sys.platform.startswith("linux") or not library.name.endswith(".so"):
        return []
    if not library.is_file():
        return [
            Library(
                library.name,
                library.name,
                problem=f"{library.name} is not in the onnxruntime package, which lists it",
                fix="pip install --force-reinstall 'onnxruntime-gpu>=1.31,<1.33'",
            )
        ]
    return list(_nvidia([s for s in needed(library) if base(s) in _KNOWN], library.name))


def _nvidia(sonames: list[str], library: str) -> Iterator[Library]:
    if not sonames:
        return
    cuda = next((major(s) for s in sonames if base(s) == "libcudart"), 13)
    yield driver(cuda)
    loaded = [_tried(soname) for soname in sonames]
    yield from loaded
    if "providers_cuda" in library and _CUDNN not in sonames:
        yield _tried(_CUDNN, lazy=True)


def driver(cuda: int = 13) -> Library:
    """The driver: there, new enough for this CUDA, and with a GPU that this process may see."""
    name, fix = "NVIDIA driver", _GET_DRIVER.format(DRIVERS.get(cuda, "newer"))
    handle = load(DRIVER)
    if isinstance(handle, str):
        return Library(DRIVER, name, problem=f"no NVIDIA driver: {DRIVER} {handle}", fix=fix)
    path, number = path_of(DRIVER), driver_version(cuda)
    version = f"CUDA {number // 1000}.{number % 1000 // 10}" if number else ""
    if number and number // 1000 < cuda:
        kernel = kernel_driver()
        return Library(
            DRIVER,
            name,
            path,
            version,
            f"the driver{f' {kernel}' if kernel else ''} is too old: it goes up to {version}, and "
            f"CUDA {cuda}.0 is needed (driver {DRIVERS.get(cuda, 'newer')} or newer)",
            fix,
        )
    count, why = devices(cuda)
    if count == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        mends = "look at `nvidia-smi`" if visible is None else "unset CUDA_VISIBLE_DEVICES"
        return Library(DRIVER, name, path, version, f"no GPU is visible{seen}{why}", mends)
    kernel = kernel_driver()
    said = f"{kernel}, up to {version}" if kernel and version else kernel or version
    return Library(DRIVER, name, path, said)


def _tried(soname: str, *, lazy: bool = False) -> Library:
    kind, number = base(soname), major(soname)
    known = _KNOWN[kind]
    name = known.name.format(number)
    fix = f"pip install '{known.package}>={known.least or number},<{number + 1}'"
    handle = load(soname)
    if not isinstance(handle, str):
        return Library(soname, name, path_of(soname), _version(kind, handle), lazy=lazy)
    problem = f"no {name}: {soname} {handle}"
    if other := other_version(soname):
        seen = known.name.format(major(other.name))
        problem = f"{seen} is here ({other}), but this onnxruntime is linked with {name} ({soname})"
        if kind == "libnvinfer":
            fix = f"pip uninstall -y tensorrt tensorrt-cu13; {fix}"
    return Library(soname, name, problem=problem, fix=fix, lazy=lazy)


def _cublas_version(handle: ctypes.CDLL) -> str:
    parts = []
    for part in range(3):  # major, minor, patch: answered without a GPU
        value = ctypes.c_int(0)
        handle.cublasGetProperty(part, ctypes.byref(value))
        parts.append(value.value)
    return ".".join(map(str, parts)) if any(parts) else ""


def _dotted(number: int, *places: int) -> str:
    parts = []
    for place in places:
        parts.append(str(number // place))
        number %= place
    return ".".join(parts)


def _cudnn_version(handle: ctypes.CDLL) -> str:
    handle.cudnnGetVersion.restype = ctypes.c_size_t
    return _dotted(int(handle.cudnnGetVersion()), 10000, 100, 1)


_VERSIONS: Mapping[str, Callable[[ctypes.CDLL], str]] = {
    "libcudart": lambda h: _dotted(int_by_pointer(h, "cudaRuntimeGetVersion"), 1000, 10),
    "libcublas": _cublas_version,
    "libcudnn": _cudnn_version,
    "libnvinfer": lambda h: _dotted(int(h.getInferLibVersion()), 10000, 100, 1),
}


def _version(base: str, handle: ctypes.CDLL) -> str:
    with suppress(AttributeError):  # a stand-in without the function
        return _VERSIONS[base](handle) if base in _VERSIONS else ""
    return ""
