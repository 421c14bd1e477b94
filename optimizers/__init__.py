"""Base graph in, lowered graph for one target out. No torch, no ONNX Runtime, no sibling folder.

    pipeline.py               the passes in order, and the one loop that runs them: start here
    target.py                 what a graph is lowered for, as data
    observers.py              log, dump and verify, by ONNXPRESS_DEBUG, _DUMP and _VERIFY
    counts.py, dims.py        how many ops there are; what shapes prove
    outcome.py                what a pass returns: modified, hits, notes, and layers it missed
    explain.py                the table of layers: fused, lifted, missed, and why
    read.py, edit.py          what rules ask of a graph, and how they change it

    one pass a file, in four rooms:
    clean/                    leave less of the same: constants, shapes, no-ops, leftovers
    lift/                     raise decomposed forms to the ops that mean them
    precision/                less precision, and less of the model; a gate watches these
    lower/                    write the form that one target runs fastest

onnx_ir has the others: inlining, dead code, equal constants, equal nodes.
"""

from .counts import count_ops
from .pipeline import Step, optimize
from .target import TARGETS, Target

__all__ = ["TARGETS", "Step", "Target", "count_ops", "optimize"]
