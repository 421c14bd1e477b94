"""OpenVINO on the CPU: whether it is here, and the options that decide what it computes in."""

from __future__ import annotations

import json

from . import providers

# What floats are computed in. Without the hint it is bf16 on a CPU that has AMX, and float32 on
# others: what was judged on one machine would not be what runs on the next.
HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}


def missing() -> str:
    """Why OpenVINO cannot run here, with the pip line; empty where it can."""
    one = providers.PROVIDERS["openvino"]
    rt = providers.onnxruntime()
    if one.ort in rt.get_available_providers():
        return ""
    return f"the installed onnxruntime {rt.__version__} has no {one.ort}: {one.hint}"


def options(precision: str) -> dict[str, str]:
    """Provider options under which a graph computes in this precision: fp32, bf16 or int8.

    In int8, what is not quantized stays in float32.
    """
    hint = {"CPU": {"INFERENCE_PRECISION_HINT": HINTS[precision]}}
    return {"device_type": "CPU", "load_config": json.dumps(hint, sort_keys=True)}
