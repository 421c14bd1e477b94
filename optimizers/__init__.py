"""Base graph in, lowered graph for one target out. No torch, no ONNX Runtime, no sibling folder.

    target.py                 what a graph is lowered for, as data
    pipeline.py               the passes in order, and the one loop that runs them: start here
    observers.py              log, dump and verify, by ONNXPRESS_DEBUG, _DUMP and _VERIFY
    counts.py, dims.py        how many ops there are; what shapes prove
    outcome.py                what a pass returns: modified, hits, and notes on what it declined

    one pass a file, in the order in which they run:
    fold_constants.py         compute what depends on no input, within a budget of bytes
    infer_shapes.py           give every value its type and shape
    remove_no_ops.py          remove nodes that return what they were given
    soften_attention_mask.py  keep the lowest float out of Attention's mask
    expand_attention_mask.py  give Attention a mask with a row for each query

onnx_ir has the others: inlining, dead code, equal constants, equal nodes.
"""

from .counts import count_ops
from .pipeline import Step, optimize
from .target import TARGETS, Target

__all__ = ["TARGETS", "Step", "Target", "count_ops", "optimize"]
