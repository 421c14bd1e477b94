"""nn.Module -> base graph: an `ir.Model` of ai.onnx ops at opset 23, named as the user would.

Opset 23 is the highest that the recorded ONNX Runtime range runs with fused kernels: at it
scaled_dot_product_attention arrives as one Attention, rms_norm as RMSNormalization, gelu as
Gelu, so that no pass has to guess them back.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from ..artifact import IR_VERSION
from ..errors import ExportError
from .dims import Axis, find_shapes, fix_output_shapes, name_symbols, probe, widen
from .factory import chain, user_frames
from .names import flatten_inputs, flatten_outputs, free_name
from .source import Source, register

OPSET = 23


@dataclass
class Capture:
    """A base graph, and what the user should know of how it came to be."""

    model: ir.Model
    notes: list[str] = field(default_factory=list)


def capture(source: Source) -> Capture:
    """Export a module to its base graph.

    The inputs carry the names of `forward`'s parameters (nested ones dotted), the outputs the
    names of the output's fields, or `output`, `output_1`, ... Every axis that PyTorch lets vary
    varies, unless `source.dynamic_shapes` says otherwise.

    Raises:
        ExportError: The module does not run on its example inputs, or torch.export or the
            ONNX exporter cannot take it; `where` is the line of the user's code.
    """
    assert source.module is not None
    notes: list[str] = []
    with quiet(), torch.no_grad(), reference_mode():
        if source.dynamic_shapes is None and not source.dims:
            notes += widen(source)
        try:
            outputs = source.module(*source.args, **source.kwargs)
        except Exception as e:
            raise ExportError(
                f"the module does not run on its own example inputs: {type(e).__name__}: {e}",
                where=user_frames(e),
            ) from e
        names = flatten_outputs(register(outputs))
        _check_dtypes(source, outputs, names)
        model, fixed = _export_or_fall_back(source, notes)
        for axis, size in fixed:
            notes.append(
                f"axis {axis.at} of {axis.input} is fixed at {size} in the graph, although "
                "PyTorch takes other sizes: torch.export specialized it"
            )
    inputs = flatten_inputs(source)
    _check_counts(model, [n for n, _ in inputs], names, source)
    _rename(model, [n for n, _ in inputs], names)
    with quiet(), torch.no_grad(), reference_mode():
        notes += name_symbols(model, source)
        fix_output_shapes(model, source)
    _strip(model)
    _check_ops(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "onnxpress", None
    model.graph.name = "main"
    return Capture(model, notes)


@contextlib.contextmanager
def reference_mode() -> Iterator[None]:
    """PyTorch as it computes when every path is the plain one.

    nn.TransformerEncoder and nn.MultiheadAttention have a fast path for inference that returns
    zeros at padded positions, and that torch.export never takes: with it the module would not
    agree with itself.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _export_or_fall_back(
    source: Source, notes: list[str]
) -> tuple[ir.Model, list[tuple[Axis, int]]]:
    try:
        program, fixed = _export(source)
    except ExportError as e:
        if source.fallback is None:
            raise
        try:
            model = source.fallback()
        except Exception:  # the second way has its own many errors; the first one's line is better
            raise e from None
        notes.append(f"captured by transformers.exporters, since plain torch.export said: {e.what}")
        return model, []
    for buffer in sorted(set(program.exported_program.graph_signature.buffers_to_mutate.values())):
        notes.append(f"forward changes the buffer {buffer}; in the graph it stays as it was")
    return program.model, fixed


def _check_dtypes(source: Source, outputs: Any, names: list[str]) -> None:
    leaves = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    given = [(f"the input {n!r}", t) for n, t in flatten_inputs(source)]
    given += [(f"the output {n!r}", t) for n, t in zip(names, leaves, strict=True)]
    for what, t in given:
        if t.is_complex():
            raise ExportError(
                f"{what} is {t.dtype}: complex tensors are not of ONNX Runtime's kernels",
                hint="return torch.view_as_real(x); take real tensors and torch.view_as_complex",
            )


def _export(source: Source) -> tuple[Any, list[tuple[Axis, int]]]:
    """The ONNX program, and the axes that stayed fixed although PyTorch lets them vary."""
    module, args, kwargs = source.module, source.args, source.kwargs
    assert module is not None
    given = source.dynamic_shapes
    recurrent = any(isinstance(m, torch.nn.RNNBase) for m in module.modules())
    try:
        if given is None or not recurrent:
            shapes = find_shapes(source) if given is None else given
            exported = torch.export.export(
                module, args, kwargs, dynamic_shapes=shapes, strict=False
            )
            missed = [] if given is not None or source.dims else probe(source, exported)
            if not (missed and recurrent):
                # Told the shapes again, it keeps the names of the user's dimensions.
                return _to_onnx(exported, dynamic_shapes=given), missed
            given = find_shapes(source, exported, missed)
        # Only the ONNX exporter knows how to trace an LSTM of any length. It has to be told the
        # axes: left to find them it makes a symbol of every hidden size.
        program = _to_onnx(module, args=args, kwargs=kwargs, dynamic_shapes=given)
        left = [] if source.dynamic_shapes is not None else probe(source, program.exported_program)
        return program, left
    except Exception as e:
        raise _explain(e) from e


def _to_onnx(model: Any, **options: Any) -> Any:
    program = torch.onnx.export(
        model, opset_version=OPSET, dynamo=True, verbose=False, optimize=True, **options
    )
    assert program is not None
    return program


def _explain(error: Exception) -> ExportError:
    """The innermost cause that has a line of the user's, in the user's words."""
    causes = chain(error)
    text = "\n".join(str(e) for e in causes)
    where = next((w for e in reversed(causes) if (w := user_frames(e, most=1))), None)
    root = causes[-1]
    line = str(root).strip().splitlines()[0] if str(root).strip() else type(root).__name__
    if "data-dependent" in text.lower() or "DataDependent" in text:
        inside = _torch_function(root)
        return ExportError(
            f"what the module computes next depends on the values of a tensor: {line}",
            where=where,
            hint=f"the branch is in PyTorch's own {inside}: look for an argument that settles it "
            "(tgt_is_causal=True for a causal tgt_mask)"
            if inside
            else "a graph has no such branch: compute both sides and choose with torch.where, "
            "or use torch.cond",
        )
    if "pack_padded_sequence" in (where or "") or "pack_padded_sequence" in text:
        return ExportError(
            "pack_padded_sequence has no form in a graph",
            where=where,
            hint="run the recurrent layer on the padded batch and mask its output",
        )
    if "Constraints violated" in text or "dynamic_shapes" in text:
        fixes = re.search(r"Suggested fixes:.*?(?=\n\n|\Z)", text, re.DOTALL)
        return ExportError(
            f"the dynamic shapes do not fit the module: {line}",
            where=where,
            hint=" ".join(fixes[0].split()) if fixes else "leave them out: they are found",
        )
    return ExportError(f"torch.export cannot take the module: {line}", where=where)


def _torch_function(error: BaseException) -> str | None:
    """The function of torch.nn in which an exception came up, below the user's own line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/nn/" in f.filename]
    names = [f.name for f in frames if f.name not in ("_call_impl", "_wrapped_call_impl")]
    return names[-1] if names else None


def _check_counts(model: ir.Model, inputs: list[str], outputs: list[str], source: Source) -> None:
    if len(model.graph.inputs) != len(inputs):
        raise ExportError(
            f"the graph has {len(model.graph.inputs)} inputs, not {len(inputs)} as the example",
            where=source.spec,
        )
    if len(model.graph.outputs) != len(outputs):
        raise ExportError(
            f"the module returns something besides tensors: the graph has "
            f"{len(model.graph.outputs)} outputs, the module returns {len(outputs)} tensors",
            where=source.spec,
            hint="return tensors: torch.tensor(n) for a number",
        )


def _rename(model: ir.Model, inputs: list[str], outputs: list[str]) -> None:
    graph = model.graph
    taken: set[Any] = set(graph.inputs) | set(graph.initializers.values())
    for i, value in enumerate(graph.outputs):
        if value in taken:  # an input, a weight or an earlier output returned as it is
            node = ir.node("Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[i] = node.outputs[0]
        taken.add(graph.outputs[i])
    # An output called like an input (a cache passed through, say) gets a name of its own.
    free = {*inputs, *outputs}
    for i, name in enumerate(outputs):
        if name in inputs:
            outputs[i] = free_name(f"{name}_out", free)
            free.add(outputs[i])
    wanted = set(inputs) | set(outputs)
    ends = {id(v) for v in (*graph.inputs, *graph.outputs)}
    for value in _values(graph):
        if value.name in wanted and id(value) not in ends:
            value.name = f"{value.name}__inner"
    # Through names that nobody has, so that two inputs can swap theirs.
    for i, value in enumerate((*graph.inputs, *graph.outputs)):
        value.name = f"__end_{i}"
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from list(graph.initializers.values())
    for node in graph.all_nodes():
        yield from node.outputs


def _strip(model: ir.Model) -> None:
    """Drop what names this machine's files, and keep which module each node came from."""
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    for node in model.graph.all_nodes():
        # "['', 'layers.0', 'layers.0.attention', 'softmax']": modules from the outside in, the op.
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        node.metadata_props.clear()
        node.doc_string = None
        if modules := [scope for scope in scopes[:-1] if scope]:
            node.metadata_props["onnxpress.scope"] = modules[-1]
    for value in (*model.graph.inputs, *_values(model.graph)):
        value.metadata_props.clear()
        value.doc_string = None


def _check_ops(model: ir.Model) -> None:
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in model.graph.all_nodes() if n.domain})
    if foreign:
        raise ExportError(
            f"the graph holds ops that are not of ai.onnx: {', '.join(foreign)}",
            hint="replace the custom operator by PyTorch's own ones in the exported module",
        )
    for domain in [d for d in model.opset_imports if d]:
        del model.opset_imports[domain]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's log lines, warnings and half-graphs off the user's terminal."""
    loggers = [logging.getLogger(n) for n in ("torch", "onnxscript", "onnx_ir")]
    levels = [x.level for x in loggers]
    noise = io.StringIO()
    try:
        for x in loggers:
            x.setLevel(logging.CRITICAL)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(noise),
            contextlib.redirect_stderr(noise),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for x, level in zip(loggers, levels, strict=True):
            x.setLevel(level)
