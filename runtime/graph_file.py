"""What a message needs to know of a model.onnx, read without the onnx package in the process.

Operators, names and types of nodes, and the signature: the fields of onnx.proto3 that hold them,
by number. Weights are stepped over.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import TensorSpec

# TensorProto.DataType by number.
_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    8: "object", 9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64",
    16: "bfloat16", 21: "uint4", 22: "int4",
}  # fmt: skip
_WHOLE = ("int64", "int32", "bool")  # what sizes are computed in
_CONTROL = ("If", "Loop", "Scan")


@dataclass(frozen=True)
class Node:
    """One node of the main graph: `op` is `domain::Name` outside ai.onnx.

    Attributes:
        name: Its name; may be empty.
        op: Its operator.
        dtypes: Types of its inputs and outputs as far as the file says them, each once.
        shapes_only: It computes on sizes alone: all that it reads goes back to Shape and Size.
    """

    name: str
    op: str
    dtypes: tuple[str, ...]
    shapes_only: bool


@dataclass(frozen=True)
class GraphFile:
    """A graph as its file holds it: the nodes in order, and the inputs that are no weights."""

    nodes: tuple[Node, ...]
    inputs: tuple[TensorSpec, ...]

    def find(self, name: str, op: str) -> Node | None:
        """The node of that name and operator; without a name, the only kind of its operator."""
        same = [n for n in self.nodes if n.op == op]
        if name:
            return next((n for n in same if n.name == name), None)
        kinds = {(n.dtypes, n.shapes_only) for n in same}
        return same[0] if len(kinds) == 1 else None

    def control_flow(self) -> Node | None:
        """The first node that holds graphs of its own, or None."""
        return next((n for n in self.nodes if n.op in _CONTROL), None)


def read_graph(path: Path) -> GraphFile:
    """The nodes and the signature of a model.onnx.

    Raises:
        ValueError: It is no protobuf message.
        OSError: It cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            graph = next((v for n, v in _fields(data, (0, len(data))) if n == 7), None)
            return _graph(data, graph) if isinstance(graph, tuple) else GraphFile((), ())
        except (IndexError, TypeError) as e:
            raise ValueError(f"{path} is no ONNX model") from e


Span = tuple[int, int]


def _fields(data: Any, span: Span) -> Iterator[tuple[int, int | Span]]:
    """The fields of a message: the number, and an integer or where its bytes begin and end."""
    at, end = span
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
        elif kind == 2:
            size, at = _varint(data, at)
            if at + size > end:
                raise ValueError("a field ends behind its message")
            yield key >> 3, (at, at + size)
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _texts(data: Any, span: Span, number: int) -> list[str]:
    return [
        bytes(data[v[0] : v[1]]).decode("utf-8", "replace")
        for n, v in _fields(data, span)
        if n == number and isinstance(v, tuple)
    ]


def _text(data: Any, span: Span, number: int) -> str:
    return next(iter(_texts(data, span, number)), "")


def _spans(data: Any, span: Span, number: int) -> list[Span]:
    return [v for n, v in _fields(data, span) if n == number and isinstance(v, tuple)]


def _number(data: Any, span: Span, number: int) -> int:
    return next((v for n, v in _fields(data, span) if n == number and isinstance(v, int)), 0)


def _graph(data: Any, span: Span) -> GraphFile:
    parts: dict[int, list[Span]] = {n: [] for n in (1, 5, 11, 12, 13)}
    for number, value in _fields(data, span):
        if number in parts and isinstance(value, tuple):
            parts[number].append(value)
    types: dict[str, str] = {}
    weights = set()
    for tensor in parts[5]:
        name = _text(data, tensor, 8)
        weights.add(name)
        types[name] = _DTYPES.get(_number(data, tensor, 2), "?")
    specs = {n: [_spec(data, one) for one in parts[n]] for n in (11, 12, 13)}
    types |= {s.name: s.dtype for n in (11, 12, 13) for s in specs[n]}
    nodes = tuple(_nodes(data, parts[1], types, weights))
    return GraphFile(nodes, tuple(s for s in specs[11] if s.name not in weights))


def _nodes(
    data: Any, spans: list[Span], types: dict[str, str], weights: set[str]
) -> Iterator[Node]:
    fixed, sizes = set(weights), set[str]()
    for span in spans:
        ins, outs = _texts(data, span, 1), _texts(data, span, 2)
        kind, domain = _text(data, span, 4), _text(data, span, 7)
        read = [name for name in ins if name and name not in fixed]
        if kind == "Constant":
            fixed.update(outs)
        whole = all(types.get(name, "int64") in _WHOLE for name in outs)
        shapes_only = kind in ("Shape", "Size") or (
            whole and bool(read) and all(name in sizes for name in read)
        )
        if shapes_only:
            sizes.update(outs)
        if kind in ("Shape", "Size"):
            types.setdefault(outs[0], "int64")
        for attribute in _spans(data, span, 5):
            if kind == "Cast" and _text(data, attribute, 1) == "to":
                types.setdefault(outs[0], _DTYPES.get(_number(data, attribute, 3), "?"))
        known = tuple(dict.fromkeys(types[n] for n in (*ins, *outs) if n in types))
        op = kind if domain in ("", "ai.onnx") else f"{domain}::{kind}"
        yield Node(_text(data, span, 3), op, known, shapes_only)


def _spec(data: Any, span: Span) -> TensorSpec:
    dtype, shape = "?", list[int | str]()
    for holder in _spans(data, span, 2):  # TypeProto
        for tensor in _spans(data, holder, 1):  # its tensor_type
            dtype = _DTYPES.get(_number(data, tensor, 1), "?")
            for dims in _spans(data, tensor, 2):
                for dim in _spans(data, dims, 1):
                    size = [v for n, v in _fields(data, dim) if n == 1 and isinstance(v, int)]
                    shape.append(size[0] if size else _text(data, dim, 2) or "?")
    return TensorSpec(_text(data, span, 1), dtype, tuple(shape))
