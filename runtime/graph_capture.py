"""CUDA graphs by shape: what ONNX Runtime captures, and the addresses that must not move.

A session opened with `cuda_graph=True` records the kernels of a run and replays them, which
saves launching them one by one. The recording is for one set of shapes and for the addresses
that were bound: a replay reads and writes those, whatever is bound by then. ONNX Runtime keeps a
graph for each number that a run carries (`gpu_graph_id`) and looks at nothing else; so here each
set of shapes of each binding, a bucket, has a number of its own, and its addresses are compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ProviderError, UsageError
from .buffers import Buffer
from .placement import Placement

MAX_GRAPHS = 16
CONTROL_FLOW = ("If", "Loop", "Scan")

# ONNX Runtime captures in CUDA's global mode: another capture at the same time breaks both.
_CAPTURING = threading.Lock()


@dataclass
class Bucket:
    """One captured graph: a set of shapes, and what it was captured with.

    Attributes:
        graph_id: ONNX Runtime's number of it.
        shapes: The shapes of the inputs and outputs, in words.
        tensors: What was bound at the capture, by ("input" or "output", name). Held, for the
            graph writes to these addresses as long as the session lives.
        options: RunOptions that capture or replay it.
        captured: Whether the first run has ended.
    """

    graph_id: int
    shapes: str
    tensors: dict[tuple[str, str], Buffer]
    options: Any
    captured: bool = False

    def run(self, execute: Callable[[Any], None]) -> None:
        """Capture or replay: the first time, `execute` runs the graph, records and replays it."""
        if self.captured:
            execute(self.options)
        else:
            with _CAPTURING:
                execute(self.options)
            self.captured = True

    def check(self, tensors: Mapping[tuple[str, str], Buffer]) -> None:
        """Compare what is bound now with what the graph was captured with.

        Raises:
            UsageError: An address is another.
        """
        for (kind, name), now in tensors.items():
            then = self.tensors[kind, name]
            if now.pointer != then.pointer:
                verb = "reads" if kind == "input" else "writes"
                raise UsageError(
                    f"the {kind} {name!r} is bound at {now.pointer:#x}, and the CUDA graph of "
                    f"these shapes {verb} {then.pointer:#x}: a replay would not see the new one",
                    where=f"bucket {self.graph_id}: {self.shapes}",
                    hint=(
                        f"keep the buffer and write into it: binding.bound({name!r})"
                        ".copy_from(array); or session.bind() for another graph"
                        if kind == "input"
                        else "bind the buffer of the first run again, or session.bind() for "
                        "another graph"
                    ),
                )


class Graphs:
    """The captured graphs of one session: their numbers, and how many there may be.

    Args:
        limit: How many graphs; each holds memory until the session is closed.
    """

    def __init__(self, limit: int = MAX_GRAPHS) -> None:
        self.limit = limit
        self._count, self._lock = 0, threading.Lock()

    def new(self, shapes: str) -> int:
        """A number that no other bucket of the session has.

        Raises:
            UsageError: The session has as many as it may have.
        """
        with self._lock:
            if self._count >= self.limit:
                raise UsageError(
                    f"the session has captured {self._count} CUDA graphs, as many as it may",
                    where=shapes,
                    hint="pad inputs to fewer shapes, bind once and reuse the binding, or open "
                    "the session with cuda_graph=False",
                )
            self._count += 1
            return self._count  # 0 is every run that carries no number


def run_options(rt: Any, **entries: str) -> Any:
    """RunOptions with these config entries."""
    options = rt.RunOptions()
    for key, value in entries.items():
        options.add_run_config_entry(key, value)
    return options


def uncaptured(rt: Any) -> Any:
    """RunOptions of a run that neither captures nor replays, in a session with CUDA graphs.

    Every run of such a session whose addresses nobody guards needs them (`Session.run`): without
    a number ONNX Runtime captures under number 0, and replays into memory that it has freed.
    """
    return run_options(rt, gpu_graph_id="-1")


def check_capturable(placement: Placement, ort_name: str, where: str) -> None:
    """Refuse a graph that CUDA graphs cannot hold, by the nodes that are in the way.

    Args:
        placement: Where the nodes run, of a session opened without CUDA graphs.
        ort_name: ONNX Runtime's name of the provider that captures.
        where: The model's file.

    Raises:
        ProviderError: Nodes of control flow, nodes on other providers, or copies between host
            and device inside the graph.
    """
    flow = [n for n in placement.nodes if n.op in CONTROL_FLOW]
    outside = [n for n in placement.outside([ort_name]) if n.op not in CONTROL_FLOW]
    if flow:
        what = f"{len(flow)} nodes of control flow decide on the host what runs: {_some(flow)}"
    elif outside:
        what = f"{len(outside)} nodes do not run on {ort_name}: {_some(outside)}"
    elif placement.memcpy:
        what = f"{placement.memcpy} copies between host and device lie inside the graph"
    else:
        return
    raise ProviderError(
        f"the model cannot be captured as a CUDA graph: {what}",
        where=where,
        hint="open it with cuda_graph=False, or press the model again for this target",
    )


def _some(nodes: Sequence[object]) -> str:
    more = f" and {len(nodes) - 8} more" if nodes[8:] else ""
    return ", ".join(map(str, nodes[:8])) + more
