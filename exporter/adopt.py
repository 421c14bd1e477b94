"""Sources that are ONNX files already: adopted as they are, whatever exporter wrote them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ..artifact import MAX_IR_VERSION, MAX_OPSET, open_model, sha256
from ..errors import ArtifactError, SourceError
from .source import Source


def build(spec: str, task: str | None) -> Source:
    """Open an ONNX file; its graph is not changed.

    Raises:
        SourceError: The file does not exist or is damaged, or it needs an opset or IR version
            that the recorded ONNX Runtime range does not run.
    """
    path = Path(spec)
    if task not in (None, "tensors"):
        raise SourceError(
            f"an ONNX file comes without a tokenizer, so its task is tensors, not {task}",
            where=spec,
            hint="leave --task out",
        )
    if not path.is_file():
        raise SourceError("there is no such file", where=spec)
    try:
        model = open_model(path)
    except ArtifactError as e:
        raise SourceError(e.what, where=spec) from e
    if not model.graph.outputs:
        raise SourceError("the file holds no graph", where=spec)
    opset = model.opset_imports.get("", 0)
    if opset > MAX_OPSET or (model.ir_version or 0) > MAX_IR_VERSION:
        raise SourceError(
            f"the file is of opset {opset}, IR version {model.ir_version}; ONNX Runtime runs "
            f"up to opset {MAX_OPSET}, IR version {MAX_IR_VERSION}",
            where=spec,
            hint=f"export it again with opset_version={MAX_OPSET} or lower",
        )
    return Source(
        spec=spec,
        kind="onnx",
        task="tensors",
        module=None,
        graph=model,
        weights_sha256=sha256(path, *_external(model, path)),
    )


def _external(model: ir.Model, path: Path) -> list[Path]:
    names = {
        str(v.const_value.location)
        for v in model.graph.initializers.values()
        if isinstance(v.const_value, ir.ExternalTensor)
    }
    files = [path.parent / n for n in sorted(names)]
    for file in files:
        if not file.is_file():
            raise SourceError("the file with the model's weights is missing", where=str(file))
    return files
