"""Sources that are ONNX files already: adopted as they are, whatever exporter wrote them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ..artifact import MAX_IR_VERSION, MAX_OPSET, TensorSpec, evaluate, open_model, sha256
from ..errors import ArtifactError, SourceError
from .source import Source


def build(spec: str, task: str | None) -> Source:
    """Open an ONNX file; its graph is not changed, but for names of dimensions (`namings`).

    Raises:
        SourceError: The file does not exist or is damaged, it needs an opset or IR version that
            the recorded ONNX Runtime range does not run, or it takes or gives what is no tensor
            of numbers.
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
    _check_kinds(model.graph, spec)
    return Source(
        spec=spec,
        kind="onnx",
        task="tensors",
        module=None,
        graph=model,
        weights_sha256=sha256(path, *_external(model, path)),
    )


def namings(inputs: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, ...]]:
    """The inputs with a name for every dimension that varies without one, in the ways to try.

    A name is a promise that the sizes are equal, so that the way that ties least comes first:
    `batch` for every first axis, and a name of its own for each other; then one name for each
    axis over all inputs; then every axis on its own. Names that the file gives stay.
    """
    given = [d for spec in inputs for d in spec.shape if isinstance(d, str) and d.isidentifier()]
    known = dict.fromkeys(given, 1)

    def named(spec: TensorSpec, *, shared: bool, batch: bool) -> TensorSpec:
        own = re.sub(r"\W", "_", spec.name)
        own = own if own.isidentifier() else f"input_{own}"
        shape = list(spec.shape)
        for axis, dim in enumerate(shape):
            if evaluate(dim, known) is not None:
                continue
            if shared or (batch and not axis):
                theirs = (s.shape[axis] for s in inputs if s.rank > axis)
                default = f"axis_{axis}" if axis else "batch"
                shape[axis] = next((d for d in theirs if d in known), default)
            else:
                shape[axis] = f"{own}_axis_{axis}"
        return replace(spec, shape=tuple(shape))

    for shared, batch in ((False, True), (True, True), (False, False)):
        yield tuple(named(spec, shared=shared, batch=batch) for spec in inputs)


def name_dims(graph: ir.Graph, inputs: Sequence[TensorSpec]) -> None:
    """Write the names of dimensions into a graph."""
    shapes = {spec.name: spec.shape for spec in inputs}
    for value in graph.inputs:
        if value.name in shapes:
            value.shape = ir.Shape(shapes[value.name])


def _check_kinds(graph: ir.Graph, spec: str) -> None:
    inputs = [v for v in graph.inputs if v.name not in graph.initializers]
    for side, values in (("input", inputs), ("output", graph.outputs)):
        for value in values:
            number = isinstance(value.type, ir.TensorType) and value.dtype != ir.DataType.STRING
            if value.type is not None and not number:
                raise SourceError(
                    f"the {side} {value.name!r} is of type {value.type}; an artifact takes and "
                    "gives tensors of numbers and booleans",
                    where=spec,
                    hint="export it again without strings, sequences and maps "
                    "(scikit-learn: zipmap=False, and class numbers for labels)",
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
