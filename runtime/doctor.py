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

from ..artifact import ORT_RANGE
from ..errors import OnnxpressError
from .providers import PROVIDERS
from .session import Session

# y = Add(x, x) on float[2], opset 21: made with onnx_ir, which need not be installed here.
_ADD = "CAo6NQoOCgF4CgF4EgF5IgNBZGQSAWdaDwoBeBIKCggIARIECgIIAmIPCgF5EgoKCAgBEgQKAggCQgQKABAV"

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
    found += [_provider(name) for name in PROVIDERS]
    found += [_extra(name) for name in EXTRAS]
    return found


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have none
        return os.cpu_count() or 1


def _onnxruntime() -> Check:
    have = {n: v for n in ("onnxruntime", "onnxruntime-gpu") if (v := _version(n))}
    if not have:
        fix = _pip_line("cpu", ["onnxruntime"])
        return Check("onnxruntime", False, "not installed", fix)
    detail = ", ".join(f"{n} {v}" for n, v in have.items())
    if len(have) > 1:
        return Check(
            "onnxruntime",
            False,
            f"{detail}: both provide one module, and the later one hides the other",
            f"pip uninstall -y onnxruntime onnxruntime-gpu; {_pip_line('cpu', ['onnxruntime'])}",
        )
    name, version = next(iter(have.items()))
    low, high = (_numbers(part) for part in ORT_RANGE.split(","))
    if not low <= _numbers(version) < high:
        return Check(
            "onnxruntime",
            False,
            f"{detail}; artifacts are checked on {ORT_RANGE}",
            f"pip install '{name}{ORT_RANGE}'",
        )
    return Check("onnxruntime", True, detail)


def _provider(name: str) -> Check:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(base64.b64decode(_ADD))
        try:
            placement = Session(path, provider=name).placement()
        except OnnxpressError as e:
            return Check(f"provider {name}", False, e.what, e.hint or "")
    return Check(f"provider {name}", True, f"ran a node: {placement}")


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
