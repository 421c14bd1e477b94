"""What kind of JSON each field of a manifest is: it may come from anyone, so it is checked.

A kind is a type (`int` takes no bool, `float` takes an int), a text that it must be, a tuple of
kinds of which one must fit, `[kind]` for a list, `{str: kind}` for an object of any names, or
`{"name": kind, "other?": kind}` for an object with these fields, where other? may be absent.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", NoneType: "null"}

_SPECS = [{"name": str, "dtype": str, "shape": [(int, str)]}]
_DISTANCE = (float, "inf", "-inf", "nan")
_ID = (int, NoneType)
_EXAMPLES = {"from": str, "examples": int, "sha256": str}

MANIFEST: dict[str, Any] = {
    "format": int,
    "sha256": str,
    "task": str,
    "source": {"spec": str, "kind": str, "weights_sha256": str, "notes?": [str]},
    "target": {"provider?": str, "precision?": str, "opset?": int},
    "inputs": _SPECS,
    "outputs": _SPECS,
    "settings?": {
        "max_length?": _ID,
        "pad_token_id?": _ID,
        "pooling?": (str, NoneType),
        "normalize?": bool,
        "prompt?": (str, NoneType),
        "labels?": [str],
        "problem?": str,
        "stride?": int,
        "eos_token_ids?": [int],
        "bos_token_id?": _ID,
        "context_length?": _ID,
        "chat?": (str, NoneType),
        "decoder_start_token_id?": int,
        "forced_bos_token_id?": _ID,
        "suppress_token_ids?": ([int], NoneType),
    },
    "kv?": (
        {
            "dtype": ("float32", "float16", "bfloat16", "float64"),
            "head_dim": int,
            "kv_heads": int,
            "layers": int,
            "past": str,
            "present": str,
            "layout?": ("concat", "shared"),
            "lengths?": str,
            "total?": str,
            "window?": int,
        },
        NoneType,
    ),
    "ops?": {str: int},
    "passes?": [{"name": str, "changed": bool, "ops": {str: int}, "notes": [str], "hits?": int}],
    "fusions?": (
        [
            {
                "kind": str,
                "fused": int,
                "lifted": int,
                "missed": [{"node": str, "reason": str}],
            }
        ],
        NoneType,
    ),
    "parity?": (
        {
            "reference": str,
            "points": [{"point": str, "max_abs": _DISTANCE}],
            "max_abs": {str: _DISTANCE},
            "tolerance?": str,
            "passed": bool,
            "allowed_drift?": bool,
            "worst": str,
            "undefined?": int,
        },
        NoneType,
    ),
    "precision?": (
        {
            "asked": str,
            "precision": str,
            "recipe": {str: (str, int, float, bool, [str])},
            "calibration": _EXAMPLES,
            "search": _EXAMPLES,
            "given": {"calibration": (str, NoneType), "eval": (str, NoneType)},
            "eval": _EXAMPLES,
            "drift": {
                "metric": str,
                "mean": _DISTANCE,
                "worst": _DISTANCE,
                "budget": _DISTANCE,
                "worst_budget": _DISTANCE,
                "passed": bool,
                "allowed": bool,
                "why": str,
                "extra": {str: _DISTANCE},
            },
            "layers": [
                {
                    "name": str,
                    "kind": str,
                    "precision": str,
                    "sensitivity": (*_DISTANCE, NoneType),
                    "alpha": (float, NoneType),
                    "reason": str,
                }
            ],
            "candidates": [
                {
                    "name": str,
                    "drift": (*_DISTANCE, NoneType),
                    "worst": (*_DISTANCE, NoneType),
                    "passed": bool,
                    "kept": bool,
                    "bytes": _ID,
                    "float_layers": _ID,
                    "why": str,
                }
            ],
            "pruned": (
                {"heads": float, "ffn": float, "weights": float, "pattern": str},
                NoneType,
            ),
            "notes": [str],
        },
        NoneType,
    ),
    "placement?": (
        {
            "provider": str,
            "kernels": str,
            "nodes": int,
            "elsewhere": [{"node": str, "op": str, "why": str}],
        },
        NoneType,
    ),
    "runtime?": {
        "onnxruntime?": str,
        "optimize?": bool,
        "disabled_optimizers?": [str],
        "padding?": {str: "right"},
        "shapes?": {str: [int]},
        "provider_options?": {str: str},
    },
    "tools?": {str: str},
    "files": {str: {"bytes": int, "sha256": str}},
}


def complaint(value: Any, kind: Any, at: str = "the manifest") -> str | None:
    """Where a value is not of its kind, as a sentence; None where all of it is."""
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(kind, tuple):
        found = [complaint(value, k, at) for k in kind]
        return None if None in found else found[0]
    if isinstance(kind, list):
        if not isinstance(value, list):
            return f"{at} is no list"
        parts = [(v, kind[0], f"{at}[{i}]") for i, v in enumerate(value)]
    elif isinstance(kind, dict):
        if not isinstance(value, dict):
            return f"{at} is no object"
        if str in kind:
            parts = [(v, kind[str], f"{at}: {name}") for name, v in value.items()]
        for name in kind if str not in kind else ():
            key = name.removesuffix("?")
            if key in value:
                parts.append((value[key], kind[name], f"{at}: {key}"))
            elif key == name:
                return f"{at} lacks {key}"
    elif isinstance(kind, str):
        return None if value == kind else f"{at} is not {kind!r}"
    elif type(value) is not kind and not (kind is float and type(value) is int):
        return f"{at} is no {_NAMES[kind]}"
    return next((said for part in parts if (said := complaint(*part))), None)
