"""What a pass of ours returns."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass
class Outcome(ir.passes.PassResult):
    """A `PassResult` that also explains itself.

    Attributes:
        hits: How many rewrites were made.
        notes: What was declined, where, and why with the value seen; one sentence each.
    """

    hits: int = 0
    notes: tuple[str, ...] = ()
