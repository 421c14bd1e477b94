"""What a pass of ours returns."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Miss:
    """A part of the graph that is nearly what a rule rewrites.

    Attributes:
        kind: What it would have become: Attention, Gelu, ...
        node: The node at which the rule stopped, as `describe` writes it.
        reason: The first condition that did not hold, with the value seen.
    """

    kind: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.node}: {self.reason}"


@dataclass
class Outcome(ir.passes.PassResult):
    """A `PassResult` that also explains itself.

    Attributes:
        hits: How many rewrites were made.
        notes: What was declined, where, and why with the value seen; one sentence each.
        misses: Layers that stay unfused, and why.
    """

    hits: int = 0
    notes: tuple[str, ...] = ()
    misses: tuple[Miss, ...] = ()


def too_old(model: ir.Model, since: int, what: str) -> Outcome | None:
    """What a pass returns where the opset lacks what it writes; None where it has it."""
    opset = model.opset_imports.get("", 0)
    if opset >= since:
        return None
    return Outcome(model, False, notes=(f"the opset is {opset}, and {what} from opset {since}",))


def describe(node: ir.Node) -> str:
    """A node as messages name it: its op, its name and, where known, the module it comes from."""
    scope = node.metadata_props.get(SCOPE, "")
    return f"{node.op_type} {node.name!r}" + (f" of {scope}" if scope else "")


SCOPE = "onnxpress.scope"  # written by the exporter: the module that a node comes from
