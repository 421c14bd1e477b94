"""What works on this machine: packages, versions and providers, each tried and not only listed.

`get_available_providers()` names what was compiled in, not what works; so every provider is asked
to run a model of one node.
"""

from __future__ import annotations

import base64
import importlib.metadata
import os
import platform
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import OnnxpressError
from .gpu import gpu
from .libraries import Library
from .libraries import examine as examine_library
from .providers import PROVIDERS, onnxruntime, preload
from .session import Session
from .wheels import declared, duplicates, leave_one, wheels

# y = Add(x, x) on float[2], opset 21: made with onnx_ir, which need not be installed here.
_ADD = "CAo6NQoOCgF4CgF4EgF5IgNBZGQSAWdaDwoBeBIKCggIARIECgIIAmIPCgF5EgoKCAgBEgQKAggCQgQKABAV"

# Told of on every machine; the others where the wheel has them.
USUAL = ("cpu", "cuda", "tensorrt")

# What each extra is for, and the packages of it.
EXTRAS = {
    "export": ("exporting and pressing", ("torch", "onnx", "onnx-ir", "onnxscript", "safetensors")),
    "hf": ("Hugging Face models outside models/, GGUF", ("transformers", "gguf")),
}


@dataclass(frozen=True)
class Check:
    """One thing: its name, whether it works, what was seen, and the pip line that mends it."""

    name: str
    works: bool
    detail: str
    fix: str = ""


def examine() -> list[Check]:
    """Try everything; the first line is this machine, and nothing raises."""
    found = [
        Check(
            "python",
            sys.version_info >= (3, 11),
            f"{platform.python_version()} on {platform.machine()}, {_cores()} usable cores",
            "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer",
        ),
        _onnxruntime(),
    ]
    found += _providers()
    found += [_extra(name) for name in EXTRAS]
    return found


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have none
        return os.cpu_count() or 1


def _onnxruntime() -> Check:
    name, have = "onnxruntime", wheels()
    if not have:
        return Check(name, False, "not installed", _pip_line("cpu", ["onnxruntime"]))
    if twice := duplicates():
        detail = f"{' and '.join(map(str, twice))} have overwritten each other's files"
        return Check(name, False, f"{detail} in {twice[0].folder}", leave_one(twice))
    first, detail = have[0], str(have[0])
    if have[1:]:
        detail += f" (before {', '.join(map(str, have[1:]))} on the path)"
    low, high = (_numbers(part) for part in declared(first).split(","))
    if not low <= _numbers(first.version) < high:
        detail = f"{detail}; artifacts are checked on {declared(first)}"
        return Check(name, False, detail, f"pip install '{first.name}{declared(first)}'")
    return Check(name, True, detail)


def _providers() -> list[Check]:
    """NVIDIA's parts where the wheel has its providers, then every provider, tried on a node."""
    try:
        rt = onnxruntime()
    except OnnxpressError:
        return [_provider(name) for name in USUAL]
    here = rt.get_available_providers()
    found: dict[str, Check] = {}
    names = [n for n in PROVIDERS if n in USUAL or PROVIDERS[n].ort in here]
    for name in names:
        if name in ("cuda", "tensorrt") and PROVIDERS[name].ort in here:
            preload(rt)
            file = Path(rt.__file__).parent / "capi" / PROVIDERS[name].library
            for one in examine_library(file):
                found.setdefault(one.soname, _library(one))
    card = gpu() if found else None
    if card:
        sizes = f"{card.memory / 2**30:.1f} GiB, {card.free / 2**30:.1f} free"
        text = f"{card.name}, {sizes}, compute capability {card.capability}"
        found["gpu"] = Check("GPU", True, text)
    return [*found.values(), *(_provider(name) for name in names)]


def _library(one: Library) -> Check:
    where = f" ({one.path})" if one.path else ""
    detail = one.problem.removeprefix(f"no {one.name}: ") or f"{one.version or one.soname}{where}"
    return Check(one.name, not one.problem, detail, one.fix)


def _provider(name: str) -> Check:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(base64.b64decode(_ADD))
        try:
            session = Session(path, provider=name)
            session.run({"x": np.ones(2, np.float32)})
            return Check(f"provider {name}", True, f"ran a node: {session.placement()}")
        except OnnxpressError as e:
            return Check(f"provider {name}", False, e.what, e.hint or "look at `nvidia-smi`")


def _extra(name: str) -> Check:
    purpose, packages = EXTRAS[name]
    versions = {p: _version(p) for p in packages}
    missing = [p for p, v in versions.items() if not v]
    if missing:
        fix = _pip_line(name, missing)
        return Check(f"extra {name}", False, f"{purpose}: no {', '.join(missing)}", fix)
    have = ", ".join(f"{p} {v}" for p, v in versions.items())
    return Check(f"extra {name}", True, f"{purpose}: {have}")


def _pip_line(extra: str, missing: list[str]) -> str:
    """The pip line for the missing packages of an extra, with the versions that we declare."""
    declared = importlib.metadata.requires("onnxpress") or []
    wanted = {r.split(";")[0].strip() for r in declared if f'extra == "{extra}"' in r}
    lines = [r for p in missing for r in wanted if re.split(r"[<>=!~ \[]", r)[0] == p]
    return "pip install " + " ".join(f"'{r}'" for r in lines or missing)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:2])
