"""What the ONNX parser of TensorRT imports, and what of it TensorRT then refuses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import onnx_ir as ir

from ..read import constant, rank
from .schema import Signature, bound, dtype_name, signature
from .table import PRECISIONS, Kernels


class Importers(Kernels):
    """The importers of a parser: one for each op type, whatever the version.

    Args:
        name: The provider's short name.
        content: `importers` lists for each op its `types`, and what else it asks for: `ranks` of
            inputs, `without` (inputs that must be left out), `outputs` (how many may be used),
            `declares` (how many there may be),
            `constants` (inputs that must be constants), `zeros` (constants that must be zero),
            `attributes` (the values that they may have; the first is the default), `main` (the
            input whose type counts, where it is no input of the first output's type), `writes`
            (types of the first output). Beside it, `types` are those of tensors at all, and
            `opsets` the first and the last opset.
    """

    def __init__(self, name: str, content: Mapping[str, Any]) -> None:
        super().__init__(name, {**content, "ops": content["importers"]})
        self._everywhere = frozenset(content["types"])
        self._first, self._last = content["opsets"]

    def refusal(self, node: ir.Node, opset: int) -> str | None:
        """Why the parser refuses a node; or None. Types and ranks must be known of all its values.

        The parser picks an importer by the op's type and ignores its domain, so that an op of
        another domain is imported as something else, or not at all: it is refused here.
        """
        if node.domain:
            return f"no importer for ops of {node.domain}"
        if not self._first <= opset <= self._last:
            return f"importers for opset {self._first} to {self._last}, not for {opset}"
        if node.op_type not in self._ops:
            return "no importer"
        known = signature(node, opset, {})
        if known is None:
            return f"no importer for opset {opset}, which does not know it"
        return next(self._objections(node, known, self._ops[node.op_type]), None)

    def has(self, op: str, precision: Literal["fp32", "fp16", "bf16"]) -> bool:
        """Whether an op is imported in a precision."""
        return PRECISIONS[precision] in self._ops.get(op, {}).get("types", ())

    def takes(self, node: ir.Node, opset: int, dtype: str, instead: str) -> bool:
        """Whether the importer takes `dtype`; `instead` is what the node has now."""
        return not node.domain and dtype in self._ops.get(node.op_type, {}).get("types", ())

    def _objections(self, node: ir.Node, known: Signature, row: Mapping[str, Any]) -> Iterator[str]:
        yield from self._unknown(node.inputs)
        main = _main(node, known, row)
        if main is not None and dtype_name(main) not in row["types"]:
            yield f"no importer for {dtype_name(main)} (it takes {', '.join(row['types'])})"
        first = dtype_name(node.outputs[0])
        if "writes" in row and first not in row["writes"]:
            yield f"no importer that writes {first} (it writes {', '.join(row['writes'])})"
        yield from _demands(node, known, row)
        yield from self._unknown(value for value in node.outputs if _used(value))

    def _unknown(self, values: Iterable[ir.Value | None]) -> Iterator[str]:
        for value in values:
            if value is None or value.name == "":
                continue
            dtype = dtype_name(value)
            if dtype is None or value.shape is None:
                unknown = "shape" if dtype else "type"
                yield f"no way to take '{value.name}': its {unknown} is unknown"
            elif dtype not in self._everywhere:
                yield f"no tensors of {dtype}"


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _main(node: ir.Node, known: Signature, row: Mapping[str, Any]) -> ir.Value | None:
    """The value whose type an importer goes by: an input of the first output's type variable."""
    if "main" in row:
        index: int = row["main"]
        return node.inputs[index]
    inputs = [(name, value) for name, value, is_input in bound(node, known) if is_input]
    wanted = set(known.outputs[0]) if known.outputs else set()
    own = [value for name, value in inputs if name in wanted]
    return next(iter(own or [value for _, value in inputs]), None)


def _demands(node: ir.Node, known: Signature, row: Mapping[str, Any]) -> Iterator[str]:
    """What an importer asks for beyond types."""
    there = dict(enumerate(node.inputs))
    for i, wanted in row.get("ranks", {}).items():
        value = there.get(int(i))
        if value is not None and rank(value) not in (None, wanted):
            yield f"an importer for {_called(known, int(i))} of rank {wanted} only"
    for i in row.get("without", ()):
        if there.get(i) is not None:
            yield f"no importer that reads {_called(known, i)}"
    used = [i for i, value in enumerate(node.outputs) if _used(value)]
    if used and used[-1] >= row.get("outputs", len(node.outputs)):
        yield f"no importer that writes {known.outputs[used[-1]][1]}"
    if len(named := [value for value in node.outputs if value.name]) > row.get("declares", 99):
        yield f"an importer for {row['declares']} output alone, and this has {len(named)}"
    for i in row.get("constants", ()):
        value = there.get(i)
        if value is not None and value.const_value is None and constant(value) is None:
            yield f"an importer that wants {_called(known, i)} constant"
    for i in row.get("zeros", ()):
        point = there.get(i)
        array = None if point is None or point.const_value is None else point.const_value.numpy()
        if point is not None and (array is None or array.any()):
            yield f"an importer that wants {_called(known, i)} to be zero"
    for name, values in row.get("attributes", {}).items():
        attribute = node.attributes.get(name)
        given = values[0] if attribute is None else attribute.value
        if given not in values:
            yield f"an importer that wants {name} = {', '.join(map(str, values))}, not {given}"


def _called(known: Signature, index: int) -> str:
    return known.inputs[index][1] if index < len(known.inputs) else f"input {index}"
