"""Compiles the null GPU: stand-ins for the CUDA libraries that onnxruntime-gpu links to.

Which libraries, which symbols and which symbol versions are read from the provider libraries of the
wheel itself, so that nothing here is bound to its version. Every symbol gets a weak stub that
returns 0 (success in all of these libraries); the C files beside this one define those that matter.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
CUDA = Path("onnxruntime", "capi", "libonnxruntime_providers_cuda.so")
TENSORRT = CUDA.with_name("libonnxruntime_providers_tensorrt.so")
# Written by hand, by the library's name before ".so"; None: stubs alone do.
LIBRARIES = {
    "libcudart": "cudart.c",
    "libcublas": "cublas.c",
    "libcublasLt": "cublas.c",
    "libcurand": None,
}
TENSORRT_LIBRARIES = {"libnvinfer": "nvinfer.c", "libnvonnxparser": None}
CUDNN, DRIVER = "libcudnn.so.9", "libcuda.so.1"


def build(site: Path, out: Path, *, cudnn: bool = True, tensorrt: bool = False) -> dict[str, str]:
    """Compile the stand-ins into `out`, unless they are there, made of the same source and wheel.

    Args:
        site: the folder that onnxruntime-gpu is unpacked in (`pip install --target`).
        out: where the libraries are written; several processes may ask for one folder at a time.
        cudnn: whether cuDNN is there, which the CUDA provider loads when the first operator asks.
        tensorrt: TensorRT's libraries too. They let the TensorRT provider load, and with
            it `get_all_opkernel_def()` answer and the provider's options be read; where those are
            right, a TensorRT session on them ends the process.

    Returns:
        The environment variables that a child process needs: its onnxruntime is then the one of
        `site`, with a CUDA provider that believes in a device.
    """
    about = (site / CUDA).stat()
    made_of = [str(site), str(about.st_size), str(about.st_mtime_ns)]
    made_of += [path.read_text() for path in sorted(HERE.glob("*.[ch]"))]
    made_of += [Path(__file__).read_text()]
    folder = out / hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:16]
    if not folder.exists():
        work = Path(f"{folder}.{os.getpid()}")
        for part in ("cuda", "cudnn", "tensorrt"):
            (work / part).mkdir(parents=True)
        _link_time(site / CUDA, LIBRARIES, work / "cuda")
        _link_time(site / TENSORRT, TENSORRT_LIBRARIES, work / "tensorrt")
        # These are looked up by name when they are needed.
        _compile(CUDNN, _strings(site / CUDA, rb"cudnn[A-Z]\w+"), "cudnn.c", work / "cudnn")
        driver = _strings(site / CUDA, rb"cu(?:[A-Z][a-z]+){2,}\w*")
        _compile(DRIVER, driver, None, work / "cuda", versioned=False)
        try:
            work.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(work)
    parts = {"cuda": True, "cudnn": cudnn, "tensorrt": tensorrt}
    folders = [folder / part for part, wanted in parts.items() if wanted]
    return {
        "LD_LIBRARY_PATH": _in_front(*folders, of="LD_LIBRARY_PATH"),
        "PYTHONPATH": _in_front(site, of="PYTHONPATH"),
    }


def _in_front(*folders: Path, of: str) -> str:
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get(of)])])


def _link_time(provider: Path, sources: Mapping[str, str | None], folder: Path) -> None:
    """One shared library for each of `sources` that `provider` is linked to."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", _readelf("--dynamic", provider))
    # " UND cudaMalloc@libcudart.so.13 (7)": the version of a symbol is its library's soname.
    # TensorRT gives its symbols none: each of its stand-ins gets all of these.
    wanted = re.findall(r" UND (\w+)(?:@(\S+))?", _readelf("--dyn-syms", provider))
    plain = [name for name, version in wanted if not version and not name.startswith("_")]
    for soname in needed:
        kind = soname.partition(".")[0]
        if kind in sources:
            names = [name for name, version in wanted if version == soname]
            _compile(soname, names or plain, sources[kind], folder, versioned=bool(names))


def _compile(
    soname: str, names: list[str], by_hand: str | None, folder: Path, *, versioned: bool = True
) -> None:
    stubs, script = folder / f"{soname}.c", folder / f"{soname}.map"
    stubs.write_text(
        "".join(f"__attribute__((weak)) long {name}(void) {{ return 0; }}\n" for name in names)
    )
    script.write_text(f"{soname} {{ global: *; }};\n")
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", str(stubs)]
    command += [str(HERE / by_hand)] if by_hand else []
    command += [f"-Wl,--version-script={script}"] if versioned else []
    command += [f"-Wl,-soname,{soname}", "-o", str(folder / soname)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"gcc could not make {soname}:\n{made.stderr}")


def _strings(file: Path, pattern: bytes) -> list[str]:
    """The strings in a binary that are all of `pattern`."""
    found = re.findall(rb"\0(" + pattern + rb")(?=\0)", file.read_bytes())
    return sorted({name.decode() for name in found})


def _readelf(what: str, path: Path) -> str:
    return subprocess.run(
        ["readelf", "--wide", what, str(path)], check=True, capture_output=True, text=True
    ).stdout
