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
from pathlib import Path
from typing import Any

from ..errors import MissingPackage, ProviderError, UsageError
from . import libraries
from .wheels import check_wheels, wheel_of


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


_ONE_WHEEL = "pip uninstall -y onnxruntime onnxruntime-gpu; pip install"
_GPU = f"{_ONE_WHEEL} 'onnxruntime-gpu[cuda,cudnn]>=1.31,<1.33'"

PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("CPUExecutionProvider", "pip install 'onnxpress[cpu]'"),
    "cuda": Provider(
        "CUDAExecutionProvider",
        f"{_GPU}  (onnxruntime-gpu, with the CUDA 13 and cuDNN 9 libraries)",
        "libonnxruntime_providers_cuda.so",
    ),
    "tensorrt": Provider(
        "TensorrtExecutionProvider",
        f"{_GPU} 'tensorrt-cu13>=10.15,<11'  (onnxruntime-gpu links libnvinfer.so.10)",
        "libonnxruntime_providers_tensorrt.so",
        booleans=("False", "True"),
    ),
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        f"{_ONE_WHEEL} 'onnxruntime-openvino>=1.24,<1.25'",
        "libonnxruntime_providers_openvino.so",
        booleans=("False", "True"),
    ),
    "coreml": Provider(
        "CoreMLExecutionProvider", "it is in the onnxruntime wheel for macOS, and nowhere else"
    ),
    "directml": Provider(
        "DmlExecutionProvider",
        f"{_ONE_WHEEL} onnxruntime-directml  (Windows)",
        booleans=("False", "True"),
    ),
    "qnn": Provider("QNNExecutionProvider", f"{_ONE_WHEEL} onnxruntime-qnn  (Qualcomm, Windows)"),
    "migraphx": Provider(
        "MIGraphXExecutionProvider",
        f"{_ONE_WHEEL} onnxruntime-migraphx  (AMD ROCm, from AMD's index)",
        "libonnxruntime_providers_migraphx.so",
    ),
    "rocm": Provider(
        "ROCMExecutionProvider",
        "ONNX Runtime dropped it after 1.22: provider='migraphx' runs on the same GPUs",
        "libonnxruntime_providers_rocm.so",
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
    """The providers asked for, by short name and in order: one name, "a,b,c", or a sequence.

    Raises:
        UsageError: A name is unknown, or there is none.
    """
    given = provider.split(",") if isinstance(provider, str) else provider
    names = [n.strip() if isinstance(n, str) else n for n in given if n != ""]
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


_OPTIONS_FORM = "provider_options={'cuda': {'device_id': 1}}, by the name given as provider"


def spelled(
    asked: Mapping[str, Provider], options: ProviderOptions | None
) -> dict[str, dict[str, str]]:
    """The user's options by provider; booleans become each provider's spelling.

    Raises:
        UsageError: Options for a provider that was not asked for, or that are no options.
    """
    if options is not None and not isinstance(options, Mapping):
        raise UsageError(
            f"provider_options are options by provider, not {options!r}", hint=_OPTIONS_FORM
        )
    for name, own in (options or {}).items():
        if not isinstance(own, Mapping):
            raise UsageError(
                f"the options for {name!r} are a dictionary, not {own!r}", hint=_OPTIONS_FORM
            )
        if name not in asked:
            raise UsageError(
                f"options for the provider {name!r}, which was not asked for",
                hint=_OPTIONS_FORM,
            )
    return {
        name: {
            **p.options,
            **{
                key: p.booleans[value] if isinstance(value, bool) else str(value)
                for key, value in (options or {}).get(name, {}).items()
            },
        }
        for name, p in asked.items()
    }


def is_on(value: str) -> bool:
    """Whether ONNX Runtime takes this text of a boolean option for true."""
    return value.lower() in ("1", "true")


def check_here(rt: Any, name: str, *, cudnn_for: str = "") -> None:
    """Refuse a provider that the installed wheel lacks, or that lacks something on this machine.

    Args:
        rt: The onnxruntime module.
        name: The provider's short name.
        cudnn_for: An operator of the graph that needs cuDNN, which is loaded only then.

    Raises:
        ProviderError: Two wheels have overwritten each other; the wheel that is there and the pip
            line of the one needed; or each library that is missing or of another version.
    """
    p, folder = PROVIDERS[name], Path(rt.__file__).parent
    if name != "cpu":
        check_wheels()
    if p.ort not in rt.get_available_providers():
        wheel = wheel_of(folder)
        there = f"{wheel.name} {wheel.version}" if wheel else "onnxruntime"
        raise ProviderError(
            f"the installed {there} has no provider {name!r} ({p.ort})", hint=p.hint
        )
    if name in ("cuda", "tensorrt"):
        preload(rt)
    if p.library:
        libraries.check(name, folder / "capi" / p.library, cudnn_for=cudnn_for)


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
                where=(p.library and missing_library(Path(rt.__file__).parent / "capi" / p.library))
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


def preload(rt: Any) -> None:
    """Load the CUDA and cuDNN libraries of the nvidia wheels, where they are installed."""
    if hasattr(rt, "preload_dlls"):
        # It prints what it does not find; `libraries` says what of it matters.
        with contextlib.redirect_stdout(io.StringIO()):
            rt.preload_dlls()
