"""Shared libraries: what one links to, whether it loads, and what is there in its place."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import site
import struct
import sys
from contextlib import suppress
from pathlib import Path

_LOAD, _DYNAMIC = 1, 2  # program headers
_NEEDED, _STRTAB = 1, 5  # dynamic entries


def needed(library: Path) -> list[str]:
    """The NEEDED entries of a 64-bit little-endian ELF file, in order; nothing of another file.

    Reads the program headers and the dynamic section alone, as the loader does: a file of 500 MB
    costs a few pages. ELF-64 Object File Format, version 1.5.
    """
    with library.open("rb") as file:
        if file.read(6) != b"\x7fELF\x02\x01":
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _needed(data)
            except (struct.error, ValueError):  # cut short
                return []


def _needed(data: mmap.mmap) -> list[str]:
    (table,) = struct.unpack_from("<Q", data, 0x20)
    size, count = struct.unpack_from("<HH", data, 0x36)
    loads, dynamic = [], (0, 0)
    for n in range(count):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, table + n * size)
        if kind == _LOAD:
            loads.append((address, offset, length))
        elif kind == _DYNAMIC:
            dynamic = (offset, length)
    entries = [
        struct.unpack_from("<qQ", data, at)
        for at in range(dynamic[0], dynamic[0] + dynamic[1] - 15, 16)
    ]
    strings = next((value for tag, value in entries if tag == _STRTAB), None)
    start = next(
        (
            o + strings - a
            for a, o, size in loads
            if strings is not None and a <= strings < a + size
        ),
        None,
    )
    if start is None:
        return []
    names = [start + value for tag, value in entries if tag == _NEEDED]
    return [data[at : data.find(b"\0", at)].decode("ascii", "replace") for at in names]


def load(soname: str) -> ctypes.CDLL | str:
    """The library, loaded into this process, or why it cannot be.

    Where the system loader does not find it, the folders of NVIDIA's wheels are looked through:
    `preload_dlls` of ONNX Runtime looks only beside itself, and not for TensorRT. What has been
    loaded here is found by ONNX Runtime too, by its soname.
    """
    try:
        return ctypes.CDLL(soname)
    except OSError as e:
        first = _reason(e, soname)
    for folder in _wheel_folders():
        if (path := folder / soname).is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError as e:
                return f"({path}) does not load: {_reason(e, soname)}"
    return first


def _reason(error: OSError, soname: str) -> str:
    text = str(error)
    missing = text.partition(": cannot open shared object file")[0]
    if missing == soname:
        return "is not on this machine"
    return f"needs {missing}, which is not here" if missing != text else text


def _wheel_folders() -> list[Path]:
    """Where wheels put NVIDIA's libraries: nvidia/*/lib and tensorrt_libs, of every site."""
    sites = dict.fromkeys([*sys.path, *site.getsitepackages(), site.getusersitepackages()])
    found: list[Path] = []
    for folder in map(Path, filter(None, sites)):
        found += sorted(folder.glob("nvidia/*/lib"))
        found += [f for n in ("tensorrt_libs", "torch/lib") if (f := folder / n).is_dir()]
    return found


def _system_folders() -> list[Path]:
    given = [Path(f) for f in os.environ.get("LD_LIBRARY_PATH", "").split(":") if f]
    usual = [Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib")]
    return [*given, *usual, *sorted(Path("/usr/local").glob("cuda*/lib64"))]


def other_version(soname: str) -> Path | None:
    """Another major version of a library in the usual folders: the newest, or None."""
    pattern = re.compile(re.escape(base(soname)) + r"\.so\.(\d+)$")
    found = [
        file
        for folder in (*_system_folders(), *_wheel_folders())
        for file in folder.glob(f"{base(soname)}.so.*")
        if pattern.match(file.name) and file.name != soname
    ]
    return max(found, key=lambda f: major(f.name), default=None)


def path_of(soname: str) -> str:
    """The file behind a library that this process has loaded, or nothing."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.partition("/")[2]
            if path.rpartition("/")[2].startswith(soname):
                return "/" + path
    return ""


def base(soname: str) -> str:
    """libcudart of libcudart.so.13."""
    return soname.partition(".so")[0]


def major(soname: str) -> int:
    """13 of libcudart.so.13; 0 of libcudart.so."""
    match = re.search(r"\.so\.(\d+)", soname)
    return int(match.group(1)) if match else 0
