"""Which nodes of a graph a provider would leave to another one, before any session is opened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

import onnx_ir as ir

from .kernels import PRECISIONS, TABLES, Importers, Kernels, kernels
from .kernels.schema import dtype_name, either, op_name
from .read import constant
from .target import Target

SIZES_ON_CPU = "ONNX Runtime computes sizes on the CPU"
SMALL = 100  # elements: constants that ONNX Runtime copies to the CPU for a computation of sizes
# It does not move what reads these to the CPU.
HALVES = frozenset({"float16", "bfloat16"})
FLOAT8 = "float8"
INTEGER_LAYERS = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
    }
)


@dataclass(frozen=True)
class Unplaced:
    """A node that the provider does not compute.

    Attributes:
        node: Its name, or its first output's where it has none.
        op: Its op, as `Add` or `com.microsoft::BiasGelu`.
        dtypes: The types of its inputs, each once, in their order.
        why: What is missing.
        fix: What the user can do.
    """

    node: str
    op: str
    dtypes: tuple[str, ...]
    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.op.rpartition('::')[2]} '{self.node}': {self.why}; {self.fix}"


def unplaced(model: ir.Model, target: Target) -> list[Unplaced]:
    """The nodes that `target`'s provider leaves to the CPU, in the order of the graph.

    ONNX Runtime decides the same way when it partitions a graph: a kernel must be registered for
    op, version and types; then it moves what only computes sizes from host memory to host memory
    (`GetCpuPreferredNodes` in its framework/fallback_cpu_capability.cc) to the CPU. Its own
    optimizers run before, and may remove some of the nodes named here.

    Args:
        model: A lowered graph with the types of its values, as InferShapes leaves them. Branches
            and bodies are looked into.
        target: Whose kernels; empty for a provider that there is no table of (`TABLES`).
    """
    if target.name not in TABLES:
        return []
    table, opset = kernels(target.name), model.opset_imports.get("", target.opset)
    return list(_in_graph(model.graph, table, opset, ""))


def _in_graph(graph: ir.Graph, table: Kernels, opset: int, inside: str) -> Iterator[Unplaced]:
    refused = {
        node: refusal for node in graph if (refusal := table.refusal(node, opset)) is not None
    }
    on_cpu = _sizes(graph, refused, table) if table.sizes_on_host else frozenset()
    for node in graph:
        if node in refused:
            why = f"{table.label} has {refused[node]}{inside}"
            yield _unplaced(node, why, _fix(node, refused[node], table, opset))
        elif node in on_cpu:
            fix = f"press it for {table.name}, which reads sizes whole, or allow fallback"
            yield _unplaced(node, SIZES_ON_CPU + inside, fix)
        for attribute in node.attributes.values():
            where = f" (in {attribute.name} of {node.op_type} '{_name(node)}')"
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _in_graph(attribute.as_graph(), table, opset, where)


def _unplaced(node: ir.Node, why: str, fix: str) -> Unplaced:
    dtypes = dict.fromkeys(filter(None, map(dtype_name, node.inputs)))
    return Unplaced(_name(node), op_name(node), tuple(dtypes), why, fix)


def _name(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or ""


# What ONNX Runtime moves -----------------------------------------------------------------------


def _sizes(graph: ir.Graph, refused: Iterable[ir.Node], table: Kernels) -> frozenset[ir.Node]:
    """Nodes with a kernel that go to the CPU all the same, since all that they read lies there."""
    order = {node: i for i, node in enumerate(graph)}
    nodes, foreign = list(order), set(refused)
    given = {value for value in graph.inputs if not value.is_initializer()}
    host: set[ir.Value] = set()
    queue: list[int] = []

    def pour(values: Iterable[ir.Value]) -> None:
        for value in values:
            host.add(value)
            for reader in value.consumers():
                if reader in order:
                    heappush(queue, order[reader])

    for node in nodes:
        if node not in foreign:
            pour(node.outputs[i] for i in table.host_outputs(node) if i < len(node.outputs))
    moved: set[ir.Node] = set()
    visited: set[int] = set()
    while queue:
        index = heappop(queue)
        if index in visited:
            continue
        visited.add(index)
        node = nodes[index]
        if node in foreign:
            pour(node.outputs)
        elif all(
            _goes_along(value, given, host, i in table.host_inputs(node))
            for i, value in enumerate(node.inputs)
        ):
            moved.add(node)
            pour(node.outputs)
    return frozenset(moved)


def _goes_along(
    value: ir.Value | None, given: set[ir.Value], host: set[ir.Value], read_from_host: bool
) -> bool:
    """Whether an input lets its node move: small constants and graph inputs do, and host memory
    that the kernel would copy to the device; nothing in half precision does, and no gap."""
    dtype = dtype_name(value)
    if value is None or dtype in HALVES or (dtype or "").startswith(FLOAT8):
        return False
    if value in given or ((fixed := constant(value)) is not None and fixed.size <= SMALL):
        return True
    return value in host and not read_from_host


# What helps ------------------------------------------------------------------------------------


def _fix(node: ir.Node, why: str, table: Kernels, opset: int) -> str:
    again = f"press it for {table.name}"
    seen = [dtype for dtype in map(dtype_name, (*node.inputs, *node.outputs)) if dtype]
    if "string" in seen:
        return "keep text out of the graph, where the tokenizer is"
    if isinstance(table, Importers):
        return _fix_import(node, why, again)
    floats = [dtype for dtype in seen if dtype in {*PRECISIONS.values(), "float64"}]
    for dtype in dict.fromkeys(floats):
        others = {p: d for p, d in PRECISIONS.items() if d != dtype}
        good = [p for p, d in others.items() if table.takes(node, opset, d, dtype)]
        if good and dtype == "float64":
            return "make the model float32 before it is exported, as model.float() does"
        if good:
            return f"press with --precision {either(good)}"
    if node.op_type in INTEGER_LAYERS:
        return "press with --precision fp16 or bf16, or int8 for a target that has integer kernels"
    return f"{again}, or allow fallback"


def _fix_import(node: ir.Node, why: str, again: str) -> str:
    if node.domain:
        return f"{again}: ops of another provider are left out"
    if why.endswith("is unknown"):
        return (
            "give the graph's inputs types and shapes, and optimize it again, which infers the rest"
        )
    if node.op_type in INTEGER_LAYERS:
        return "press with --precision int8 for it: symmetric int8 without zero points"
    if node.op_type == "Attention":
        return f"{again}: Attention then has one output, and the cache is outside it"
    return f"{again}, or allow fallback"
