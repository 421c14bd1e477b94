"""Execution providers: what we call them, what they need, and how to say what is missing.

The only module that imports onnxruntime.
"""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import MissingPackage, ProviderError, UsageError


@dataclass(frozen=True)
class Provider:
    """One execution provider, as data.

    Attributes:
        ort: ONNX Runtime's name of it.
        hint: How to install what it needs.
        library: The shared library in the wheel that holds it; empty for the built-in one.
        options: Options that we always set.
        booleans: How its options spell False and True: TensorRT refuses '1', CUDA 'True'.
    """

    ort: str
    hint: str
    library: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    booleans: tuple[str, str] = ("0", "1")


_GPU = "pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu>=1.31,<1.33'"

PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", "pip install 'onnxpress[cpu]'"),
    "cuda": Provider(
        "CUDAExecutionProvider",
        f"{_GPU}  (onnxruntime-gpu, with the CUDA 13 and cuDNN 9 libraries)",
        "libonnxruntime_providers_cuda.so",
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        f"{_GPU} 'tensorrt-cu13<11'  (onnxruntime-gpu links libnvinfer.so.10)",
        "libonnxruntime_providers_tensorrt.so",
        booleans=("False", "True"),
    ),
}

ProviderOptions = Mapping[str, Mapping[str, str | int | float | bool]]


def onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        MissingPackage: It is not installed.
    """
    try:
        import onnxruntime as rt
    except ImportError:
        raise MissingPackage(
            "running a model needs onnxruntime",
            hint="pip install 'onnxpress[cpu]'  (or 'onnxpress[gpu]')",
        ) from None
    if not hasattr(rt, "InferenceSession"):  # two wheels fought over one folder, and one left
        raise MissingPackage(
            "the onnxruntime package is broken: it has no InferenceSession",
            hint="pip uninstall onnxruntime onnxruntime-gpu; pip install 'onnxpress[cpu]'",
        )
    return rt


def resolve(provider: str | Sequence[str]) -> dict[str, Provider]:
    """The providers asked for, by short name and in order.

    Raises:
        UsageError: A name is unknown, or there is none.
    """
    names = [provider] if isinstance(provider, str) else list(provider)
    for name in names:
        if name not in PROVIDERS:
            close = difflib.get_close_matches(str(name).lower(), PROVIDERS, 1)
            raise UsageError(
                f"unknown provider {name!r}",
                hint=f"did you mean {close[0]!r}?" if close else f"one of {', '.join(PROVIDERS)}",
            )
    if not names:
        raise UsageError("no provider was asked for", hint=f"one of {', '.join(PROVIDERS)}")
    return {name: PROVIDERS[name] for name in names}


def with_options(
    asked: Mapping[str, Provider], options: ProviderOptions | None
) -> list[tuple[str, dict[str, str]]]:
    """The `providers` argument of InferenceSession; booleans become each provider's spelling.

    Raises:
        UsageError: Options for a provider that was not asked for.
    """
    for name in options or {}:
        if name not in asked:
            raise UsageError(
                f"options for the provider {name!r}, which was not asked for",
                hint="provider_options={'cuda': {'device_id': 1}}, by the name given as provider",
            )
    return [
        (
            p.ort,
            {
                **p.options,
                **{
                    key: p.booleans[value] if isinstance(value, bool) else str(value)
                    for key, value in (options or {}).get(name, {}).items()
                },
            },
        )
        for name, p in asked.items()
    ]


def check_compiled_in(rt: Any, asked: Mapping[str, Provider]) -> None:
    """Refuse providers that the installed wheel does not have at all.

    Raises:
        ProviderError: Names the wheel that is there and the pip line of the one needed.
    """
    available = rt.get_available_providers()
    for name, p in asked.items():
        if p.ort not in available:
            raise ProviderError(
                f"the installed {_wheel()} has no provider {name!r} ({p.ort})", hint=p.hint
            )


def check_came_up(rt: Any, session: Any, asked: Mapping[str, Provider]) -> None:
    """Refuse a session that came up without a provider that it was asked for.

    ONNX Runtime logs a missing library and goes on without the provider; so we look.

    Raises:
        ProviderError: Names the library that is missing, where that can be found out.
    """
    got = session.get_providers()
    for name, p in asked.items():
        if p.ort not in got:
            raise ProviderError(
                f"ONNX Runtime left out the provider {name!r} without an error: "
                f"the session would run on {', '.join(got)}",
                where=missing_library(Path(rt.__file__).parent / "capi" / p.library)
                or "no library is missing: look at the driver (`nvidia-smi`)",
                hint=p.hint,
            )


def missing_library(library: Path) -> str | None:
    """What the system loader says is missing for this library, or None where it loads."""
    try:
        ctypes.CDLL(str(library))
    except OSError as e:
        # It links against its host process by symbols; those resolve only inside ONNX Runtime.
        return None if "undefined symbol" in str(e) else str(e)
    return None


def preload(rt: Any, asked: Mapping[str, Provider]) -> None:
    """Load the CUDA and cuDNN libraries of the nvidia wheels, where they are installed."""
    if set(asked) - {"cpu"} and hasattr(rt, "preload_dlls"):
        # It prints what it does not find; `check_came_up` says what of it mattered.
        with contextlib.redirect_stdout(io.StringIO()):
            rt.preload_dlls()


def _wheel() -> str:
    for name in ("onnxruntime-gpu", "onnxruntime", "onnxruntime-openvino"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return "onnxruntime"
