"""onnxpress: PyTorch Transformers to verified, optimized ONNX artifacts, and what runs them.

    onnxpress.press("my_model.py:build", "out/")     source -> checked, optimized artifact
    onnxpress.export("my_model.py:build", "out/")    the same without lowering for a target
    onnxpress.optimize("model.onnx", "out/")         an ONNX file, or an artifact once more
    model = onnxpress.load("out/")                   Embedder, Classifier, ..., or Session

`import onnxpress` loads neither torch nor onnx nor onnxruntime; each verb loads what it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# The function and its module share a name: bound here, once the module is imported, the
# function stays, whoever imports the module later.
from .errors import OnnxpressError
from .press import export, optimize, press

if TYPE_CHECKING:
    from .runtime import Session, load

__all__ = ["OnnxpressError", "Session", "export", "load", "optimize", "press"]


def __getattr__(name: str) -> Any:
    if name in ("Session", "load"):
        from . import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
