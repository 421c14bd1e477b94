"""Which nodes of a graph can compute in a 16-bit type, and why the others cannot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from ..outcome import SCOPE
from .float_ranges import FLOAT, Half, Unfit, ends_in_softmax, of_mask
from .float_rules import (
    ANGLES,
    CHEAP,
    COMPARISONS,
    MOVES,
    ROOTS,
    SIZES,
    Ports,
    label,
    ports,
)

INTEGERS = {
    *(ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
    *(ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64),
}


class Plan:
    """Which nodes stay in float32, why, and where the others take the 16-bit type."""

    def __init__(
        self, model: ir.Model, half: Half, keep: frozenset[str], bad: Iterable[Unfit]
    ) -> None:
        opset = model.opset_imports.get("", 0)
        self.nodes = [n for graph in model.graphs() for n in graph]
        self.stays: dict[ir.Node, str] = {}
        self.ports: dict[ir.Node, Ports] = {}
        self._unknown = keep - {
            name for name in keep if any(_is_named(n, name) for n in self.nodes)
        }
        for node in self.nodes:
            values = (*node.inputs, *node.outputs)
            if is_source(node) or takes_any(node):
                continue
            if not any(v is not None and _has_floats(v) for v in values):
                continue
            found = ports(node, opset, half.name)
            if any(_is_named(node, name) for name in keep):
                self._stay(node, "as asked")
            elif isinstance(found, str):
                self._stay(node, found)
            elif not any((*found.inputs, *found.outputs)):
                self._stay(node, "")  # it is of the type already, but for what is always float32
            elif too_high(node, half):
                self._stay(node, f"{half.name} does not hold what it is filled with")
            else:
                self.ports[node] = found
        self._keep_positions()
        for one in bad:
            if one.role == "high":
                self._stay(one.edge[0], f"{one.value.name!r} holds {one.peak:.3g}")
            elif one.role == "zero":
                self._keep_division(one)
        self._keep_moves()

    def converts(self, node: ir.Node) -> Ports | None:
        """The ports of a node that computes in the 16-bit type."""
        return None if node in self.stays else self.ports.get(node)

    def notes(self) -> list[str]:
        """One sentence for each reason and op."""
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for node, why in self.stays.items():
            if why:
                groups[node.op_type, why].append(repr(label(node)))
        said = [
            f"{op} {', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)} "
            f"stays in float32: {why}"
            for (op, why), names in groups.items()
        ]
        return [*said, *(f"no node or module is named {n!r}" for n in sorted(self._unknown))]

    def _stay(self, node: ir.Node | None, why: str) -> None:
        if node is not None and node not in self.stays and not is_source(node):
            self.stays[node] = why

    def _keep_positions(self) -> None:
        todo: list[ir.Node | None] = []
        for node in self.nodes:
            if node.domain != "":
                continue
            if node.op_type in ANGLES:
                todo += [node]
            elif node.op_type == "Cast" and node.outputs[0].dtype in INTEGERS:
                todo += [v.producer() for v in node.inputs if v is not None]
            elif node.op_type in COMPARISONS and _counts(node):
                todo += [node]
        seen: set[ir.Node] = set()
        while todo:
            at = todo.pop()
            if at is None or at in seen or at.outputs[0].dtype not in (FLOAT, ir.DataType.BOOL):
                continue
            if at.domain == "" and (at.op_type in CHEAP | ANGLES | COMPARISONS or _is_outer(at)):
                seen.add(at)
                if at in self.ports:
                    self._stay(at, "positions and angles are computed in it")
                todo += [v.producer() for v in at.inputs if v is not None and v.dtype == FLOAT]

    def _keep_division(self, one: Unfit) -> None:
        """The reader of a tiny constant, and what follows until something is divided."""
        todo, why = [one.edge[0]], f"{one.value.name!r} holds {one.peak:.3g}"
        while todo:
            node = todo.pop()
            self._stay(node, why)
            if node.op_type in ROOTS | {"Add", "Clip", "Max"} and node.domain == "":
                todo += [use.node for use in node.outputs[0].uses() if use.node not in self.stays]

    def _keep_moves(self) -> None:
        """Leave in float32 what moves numbers from nodes that stay to nodes that stay."""
        moves = {
            node
            for node in self.nodes
            if self.converts(node) and node.op_type in MOVES and node.domain == ""
        }  # fmt: skip

        def stays(node: ir.Node | None) -> bool:
            return node is not None and (node in self.stays or node in moves)

        def is_float(value: ir.Value) -> bool:
            node = value.producer()
            return node is None or stays(node) or is_source(node)

        while True:
            loose = set()
            for node in moves:
                floats = [v for v in node.inputs if v is not None and v.dtype == FLOAT]
                outer = all(is_float(v) for v in floats) and any(
                    v.const_value is None for v in floats
                )
                readers = [u.node for v in node.outputs for u in v.uses()]
                if not outer or not all(stays(r) or takes_any(r) for r in readers):
                    loose.add(node)
            if not loose:
                break
            moves -= loose
        for node in moves:
            self._stay(node, "")


def _is_named(node: ir.Node, name: str) -> bool:
    scope = node.metadata_props.get(SCOPE, "")
    return name in (label(node), scope) or scope.startswith(f"{name}.")


def _has_floats(value: ir.Value) -> bool:
    return value.type is not None and value.type.dtype == FLOAT


def filled(node: ir.Node) -> np.ndarray:
    """What a ConstantOfShape fills its output with: one number."""
    tensor = node.attributes.get_tensor("value", None)
    return np.zeros(1, np.float32) if tensor is None else tensor.numpy()


def too_high(node: ir.Node, half: Half) -> bool:
    """Whether a ConstantOfShape holds what the type cannot, and no mask."""
    if node.op_type != "ConstantOfShape" or ends_in_softmax(node.outputs[0]):
        return False
    number = float(filled(node)[0])
    return np.isfinite(number) and abs(number) > half.highest


def is_source(node: ir.Node) -> bool:
    """Whether a node gives each reader the type that it reads: Constant, and Cast to float32."""
    return (
        node.domain == ""
        and node.op_type in ("Cast", "Constant")
        and node.outputs[0].dtype == FLOAT
    )


def takes_any(node: ir.Node) -> bool:
    """Whether a node reads whatever type there is."""
    return node.domain == "" and node.op_type in {"Cast", *SIZES}


def _counts(node: ir.Node) -> bool:
    """Whether a comparison is one of positions: floats made of integers."""
    floats = [v for v in node.inputs if v is not None and v.dtype == FLOAT]
    return bool(floats) and all(of_mask(v) for v in floats) and any(map(_from_integers, floats))


def _from_integers(value: ir.Value | None, depth: int = 24) -> bool:
    node = None if value is None else value.producer()
    if node is None or node.op_type not in CHEAP or depth == 0:
        return False
    if node.op_type == "Cast":
        return node.inputs[0] is not None and node.inputs[0].dtype in INTEGERS
    return any(_from_integers(v, depth - 1) for v in node.inputs)


def _is_outer(node: ir.Node) -> bool:
    """Whether a MatMul sums nothing: frequencies [n, 1] times positions [1, length]."""
    if node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[0].shape is None:
        return False
    return len(node.inputs[0].shape) > 0 and node.inputs[0].shape[-1] == 1
