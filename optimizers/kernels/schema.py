"""Names of ops and types as the tables spell them, and the type variables of a node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

NAMES = {"FLOAT": "float32", "DOUBLE": "float64"}


@dataclass(frozen=True)
class Signature:
    """The formal parameters of one op in one version.

    Attributes:
        since: The version of the op: the last opset up to now that changed it.
        inputs: For each input the names that a kernel may constrain it by: its type variable and
            the parameter's own name.
        outputs: The same of each output.
        endless: Whether the last input repeats; outputs of such ops do likewise.
    """

    since: int
    inputs: tuple[tuple[str, ...], ...]
    outputs: tuple[tuple[str, ...], ...]
    endless: bool = False


def op_name(node: ir.Node) -> str:
    """`Add`, or `com.microsoft::BiasGelu`: what tables list an op by."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def dtype_name(value: ir.Value | None) -> str | None:
    """`float16`, or `seq(float16)` of a sequence; None where nothing is known."""
    if value is None or value.dtype is None:
        return None
    name = NAMES.get(value.dtype.name, value.dtype.name.lower())
    return f"seq({name})" if isinstance(value.type, ir.SequenceType) else name


def signature(node: ir.Node, opset: int, own: Mapping[str, Mapping[str, Any]]) -> Signature | None:
    """What a node's inputs and outputs are called; None of an op that neither side knows.

    Args:
        node: The node.
        opset: The ai.onnx opset of its graph.
        own: The signatures that a table carries, of ops outside ai.onnx.
    """
    if (row := own.get(op_name(node))) is not None:
        names = [[(n.removesuffix("*"),) for n in row[side]] for side in ("inputs", "outputs")]
        endless = any(n.endswith("*") for n in row["inputs"])
        return Signature(row["since"], tuple(names[0]), tuple(names[1]), endless)
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return None
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    return Signature(
        schema.since_version,
        tuple((p.type_str, p.name) for p in schema.inputs),
        tuple((p.type_str, p.name) for p in schema.outputs),
        any(p.option == variadic for p in (*schema.inputs, *schema.outputs)),
    )


def bound(node: ir.Node, known: Signature) -> Iterator[tuple[str, ir.Value, bool]]:
    """(constraint name, value, whether it is an input) of each input and output that is there."""
    for values, names in ((node.inputs, known.inputs), (node.outputs, known.outputs)):
        for i, value in enumerate(values):
            place = min(i, len(names) - 1) if known.endless else i
            if value is not None and value.name != "" and 0 <= place < len(names):
                for name in names[place]:
                    yield name, value, values is node.inputs


def either(names: Sequence[str]) -> str:
    """`fp16 or bf16`."""
    return " or ".join(names)
