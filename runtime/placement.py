"""Where the nodes of a session run, as ONNX Runtime recorded it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# How protobuf writes `op_type` (field 4 of a node): tag, length, text. Counting these bytes keeps
# the onnx package out of the process.
_MEMCPY = (b"\x22\x0eMemcpyFromHost", b"\x22\x0cMemcpyToHost")


@dataclass(frozen=True)
class PlacedNode:
    """One node: its name (may be empty), operator (`domain::Name` outside ai.onnx), provider."""

    name: str
    op: str
    provider: str

    def __str__(self) -> str:
        return f"{self.op} {self.name!r}" if self.name else self.op


@dataclass(frozen=True)
class Placement:
    """Every node of a session with its provider.

    Attributes:
        nodes: The nodes, as they were when they were given to providers.
        memcpy: Copies between host and device inside the graph; None where ONNX Runtime could
            not say (a graph that is split with TensorRT cannot be written down).
    """

    nodes: tuple[PlacedNode, ...]
    memcpy: int | None

    @property
    def counts(self) -> dict[str, int]:
        """Number of nodes per provider (ONNX Runtime's name of it)."""
        return dict(Counter(n.provider for n in self.nodes))

    def outside(self, providers: Collection[str]) -> list[PlacedNode]:
        """The nodes that run on none of these providers (ONNX Runtime's names)."""
        return [n for n in self.nodes if n.provider not in providers]

    def __str__(self) -> str:
        nodes = ", ".join(f"{n} on {p}" for p, n in sorted(self.counts.items()))
        return f"{nodes or 'no nodes'}; memcpy: {'unknown' if self.memcpy is None else self.memcpy}"


def placed_nodes(session: Any) -> tuple[PlacedNode, ...]:
    """The nodes of an InferenceSession that was opened with recording on."""
    return tuple(
        PlacedNode(n.name, f"{n.domain}::{n.op_type}" if n.domain else n.op_type, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for n in part.get_nodes()
    )


def count_memcpy(graph: Path) -> int:
    """Number of Memcpy nodes in a serialized graph (its weights in another file)."""
    data = graph.read_bytes()
    return sum(data.count(op) for op in _MEMCPY)
