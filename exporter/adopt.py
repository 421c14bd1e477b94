"""Sources that are ONNX files already: adopted as they are, whatever exporter wrote them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ..artifact import MAX_IR_VERSION, MAX_OPSET, TensorSpec, evaluate, open_model, sha256
from ..errors import ArtifactError, SourceError
from .source import Source

AGAIN = "copy the file again, or export it again"


def build(spec: str, task: str | None) -> Source:
    """Open an ONNX file; its graph is not changed, but for names of dimensions (`namings`).

    Raises:
        SourceError: The file does not exist or is damaged, it needs an opset or IR version that
            the recorded ONNX Runtime range does not run, it takes or gives what is no tensor
            of numbers, or its weights are not where it says.
    """
    path = Path(spec)
    if task not in (None, "tensors"):
        raise SourceError(
            f"an ONNX file comes without a tokenizer, so its task is tensors, not {task}",
            where=spec,
            hint="leave --task out",
        )
    if not path.is_file():
        raise SourceError("there is no such file", where=spec, hint="give the path of an ONNX file")
    try:
        model = open_model(path)
    except ArtifactError as e:
        raise SourceError(e.what, where=spec, hint=e.hint or AGAIN) from e
    if not model.graph.outputs:
        raise SourceError("the file holds no graph", where=spec, hint=AGAIN)
    imports = model.opset_imports
    opset = imports.get("", imports.get("ai.onnx", 0))  # two names of one domain
    if imports.get("ai.onnx", opset) != opset:
        raise SourceError(
            f"the file imports two opsets of ai.onnx: {opset} and {imports['ai.onnx']}",
            where=spec,
            hint="export it again, with one opset",
        )
    if opset > MAX_OPSET or (model.ir_version or 0) > MAX_IR_VERSION:
        raise SourceError(
            f"the file is of opset {opset}, IR version {model.ir_version}; ONNX Runtime runs "
            f"up to opset {MAX_OPSET}, IR version {MAX_IR_VERSION}",
            where=spec,
            hint=f"export it again with opset_version={MAX_OPSET} or lower",
        )
    _check_kinds(model.graph, spec)
    _check_names(model.graph, spec)
    _check_reads(model.graph, spec)
    _check_functions(model, spec)
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


def _check_names(graph: ir.Graph, spec: str) -> None:
    names = [value.name for value in graph.outputs]
    for name in names:
        if names.count(name) > 1:
            raise SourceError(
                f"the output {name!r} is given twice",
                where=spec,
                hint="export it again, with a name for each output",
            )
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.shape is None:
            continue
        # A name that two initializers have means the later one, here and to ONNX Runtime; but
        # onnx_ir keeps the first one's type and shape, which must fit then.
        pairs = zip(value.shape, tensor.shape, strict=False)
        if (
            value.dtype != tensor.dtype
            or len(value.shape) != len(tensor.shape)
            or any(isinstance(stated, int) and stated != size for stated, size in pairs)
        ):
            raise SourceError(
                f"the initializer {value.name!r} is given twice, or is not what it is said to be: "
                f"{value.dtype}{value.shape}, and its tensor is {tensor.dtype}{tensor.shape}",
                where=spec,
                hint="export it again",
            )


def _check_reads(graph: ir.Graph, spec: str) -> None:
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.inputs:
            if value is None or value.producer() or value.is_graph_input():
                continue
            if not value.is_initializer():
                raise SourceError(
                    f"{node.op_type} {node.name!r} reads {value.name!r}, which nothing gives; "
                    "sparse initializers are not read",
                    where=spec,
                    hint="export it again, with dense weights",
                )


def _check_functions(model: ir.Model, spec: str) -> None:
    for function in model.functions.values():
        for domain, version in function.opset_imports.items():
            if model.opset_imports.get(domain, version) != version:
                raise SourceError(
                    f"the function {function.domain}::{function.name} imports opset {version} of "
                    f"{domain or 'ai.onnx'}, and the model opset {model.opset_imports[domain]}",
                    where=spec,
                    hint="export it again, with one opset",
                )


def _external(model: ir.Model, path: Path) -> list[Path]:
    """The files with the model's weights, each as long as its tensors need."""
    needs: dict[str, tuple[int, str]] = {}  # by name of the file: bytes, for which tensor
    for tensor in _external_tensors(model):
        size = (tensor.offset or 0) + (tensor.nbytes if tensor.length is None else tensor.length)
        name = os.fspath(tensor.location)
        needs[name] = max(needs.get(name, (0, "")), (size, str(tensor.name)))
    for name in needs:
        # By its name alone: in a cache of Hugging Face's, the file is a link to another folder.
        if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir:
            raise SourceError(
                f"the file keeps its weights outside of its folder, in {name}",
                where=str(path),
                hint="save it again with the weights beside it",
            )
    for name, (size, tensor_name) in needs.items():
        file = path.parent / name
        if not file.is_file():
            raise SourceError(
                "the file with the model's weights is missing",
                where=str(file),
                hint="copy it to where the model is",
            )
        if (have := file.stat().st_size) < size:
            raise SourceError(
                f"the file with the model's weights is cut short: {have} bytes, "
                f"tensor {tensor_name} needs {size}",
                where=str(file),
                hint="copy it again",
            )
    return [path.parent / name for name in sorted(needs)]


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for attribute in node.attributes.values():
            if isinstance(attribute.value, ir.ExternalTensor):  # of a Constant
                yield attribute.value
