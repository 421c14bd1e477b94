"""What a 16-bit float can hold, and which constants of a graph it cannot.

A mask is the one constant that is out of range on purpose: -1e9 or -3.4028235e38 only says "not
this key". In fp16 it becomes -32768 and not the lowest float, -65504, for three reasons: -65504
plus a score below -16 is -inf, and a row of -inf throughout is NaN after a softmax; two masks
that are added are -inf together; and the Attention kernel of ONNX Runtime 1.32 takes the lowest
float for -inf (tried, fp16 on CPU: a row of -65504 gives zeros, one of -32768 the mean). Minus
infinity itself stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ...errors import UsageError
from ..read import LIMIT
from .float_rules import CHEAP, COMPARISONS, MOVES, SIZES, adds_mask

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Half:
    """A 16-bit type of floats.

    Attributes:
        name: fp16 or bf16.
        dtype: The type in ONNX.
        highest: The greatest finite number.
        mask: What a mask's "not this key" becomes: half of the lowest number.
        zero: Numbers of this magnitude and below are rounded to 0.
    """

    name: str
    dtype: ir.DataType
    highest: float
    mask: float
    zero: float

    def narrow(self, array: np.ndarray, *, mask: bool = False) -> np.ndarray:
        """The array in this type: finite stays finite, inf stays inf; a mask is cut at `mask`."""
        return self.cut(array, mask=mask).astype(self.dtype.numpy())

    def cut(self, array: np.ndarray, *, mask: bool) -> np.ndarray:
        """The array without the finite numbers that this type cannot hold, in its own type."""
        high = -self.mask if mask else self.highest
        if not array.size or (array.max() <= high and array.min() >= -high):
            return array
        return np.where(np.isinf(array), array, np.clip(array, -high, high)).astype(array.dtype)


HALVES = {
    half.name: half
    for half in (
        Half("fp16", ir.DataType.FLOAT16, 65504.0, -32768.0, 2.0**-25),
        Half(
            "bf16", ir.DataType.BFLOAT16, (2 - 2**-7) * 2.0**127, -(2 - 2**-7) * 2.0**126, 2.0**-134
        ),
    )
}


def half_of(precision: str) -> Half:
    """The type of that name.

    Raises:
        UsageError: There is no such precision.
    """
    if precision not in HALVES:
        raise UsageError(f"there is no 16-bit float {precision!r}", hint="fp16 or bf16")
    return HALVES[precision]


Edge = tuple[ir.Node, int]
"""A reader, and which of its inputs is meant."""


@dataclass(frozen=True)
class Unfit:
    """A constant that a 16-bit type cannot hold, where one node reads it.

    Attributes:
        value: The constant.
        edge: The reader.
        peak: The greatest finite magnitude in it.
        role: "mask" and "bound" can be cut without a loss; "high" and "zero" cannot.
    """

    value: ir.Value
    edge: Edge
    peak: float
    role: str


def constants(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """The constants of float32 of a model: initializers, and outputs of Constant."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype == FLOAT and not value.is_graph_input():
                yield value, tensor
        for node in graph:
            if node.op_type == "Constant" and node.domain == "" and node.outputs[0].dtype == FLOAT:
                tensor = ir.convenience.get_const_tensor(node.outputs[0])
                if tensor is not None:  # None: an argument of a function
                    yield node.outputs[0], tensor


def unfit(model: ir.Model, half: Half) -> list[Unfit]:
    """The constants that `half` cannot hold, once for each reader.

    All are read, one after the other, and none is kept. Where `half` has the range of float32,
    the large ones are weights that nothing can be wrong with, and stay on disk.
    """
    found = []
    for value, tensor in constants(model):
        if not value.uses() or (tensor.size > LIMIT and half.highest > 1e38):
            continue
        low, high = finite_range(tensor.numpy())
        peak = max(high, -low)
        if half.zero < peak <= -half.mask or peak == 0.0:
            continue
        for use in value.uses():
            edge = (use.node, use.idx)
            role = "zero" if peak <= half.zero else _role(value, edge, low, high, half.highest)
            if role == "mask" or peak > half.highest or role == "zero":
                found.append(Unfit(value, edge, peak, role))
    return found


def finite_range(array: np.ndarray) -> tuple[float, float]:
    """The least and the greatest finite number in an array; zeros where there is none."""
    if not array.size:
        return 0.0, 0.0
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        array = array[np.isfinite(array)]
        if not array.size:
            return 0.0, 0.0
        low, high = float(array.min()), float(array.max())
    return low, high


def _role(value: ir.Value, edge: Edge, low: float, high: float, highest: float) -> str:
    node, index = edge
    if node.domain == "":
        # A bound beyond everything that the type can hold binds nothing.
        if (node.op_type == "Max" or (node.op_type, index) == ("Clip", 1)) and high <= highest:
            return "bound"
        if (node.op_type == "Min" or (node.op_type, index) == ("Clip", 2)) and low >= -highest:
            return "bound"
    # Nothing is masked by a high number, unless it is turned round.
    turned = node.op_type in ("Mul", "Sub", *COMPARISONS)
    return "mask" if (turned or high <= highest) and _is_cut(value, edge) else "high"


def ends_in_softmax(value: ir.Value) -> bool:
    """Whether a very low number in `value` can do no more than to mask: all ways lead there."""
    if value.is_graph_output() or not value.uses():
        return False
    return all(_is_cut(value, (use.node, use.idx)) for use in value.uses())


def _is_cut(value: ir.Value, edge: Edge) -> bool:
    """Whether it makes no difference to a reader how low a low number is."""
    node, index = edge
    op = node.op_type
    if adds_mask(node, index):
        return True
    if node.domain != "":
        return False
    if op in SIZES or (op in ("Softmax", "LogSoftmax") and index == 0):
        return True
    others = [v for i, v in enumerate(node.inputs) if i != index and v is not None]
    if op in COMPARISONS:  # what it is compared with is cut in the same way
        return all(of_mask(v) for v in (value, *others)) or _chooses_mask(node)
    if op == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.BOOL:
        return True
    factor = op == "Mul" or (op == "Div" and index == 0)
    if factor and not all(of_mask(v) for v in others):
        return False
    if factor or op in MOVES or op in ("Add", "Clip", "Max", "Min", "Sub"):
        return node.outputs[0].dtype != ir.DataType.INT64 and ends_in_softmax(node.outputs[0])
    return False


def _chooses_mask(node: ir.Node) -> bool:
    """Whether an Equal finds a mask's lowest number in scores, to put another in its place."""
    if node.op_type != "Equal" or not any(v is not None and of_mask(v) for v in node.inputs):
        return False
    return all(
        use.node.op_type == "Where" and use.idx == 0 and ends_in_softmax(use.node.outputs[0])
        for use in node.outputs[0].uses()
    )


def of_mask(value: ir.Value, depth: int = 24) -> bool:
    """Whether a float is made of integers, bools and constants by cheap ops: no activation."""
    if value.dtype not in (FLOAT, *(half.dtype for half in HALVES.values())):
        return value.dtype is not None
    node = value.producer()
    if node is None:
        return value.is_graph_input() or value.const_value is not None
    if node.domain != "" or depth == 0:
        return False
    if node.op_type in ("Constant", "ConstantOfShape"):
        return True
    return node.op_type in CHEAP and all(
        of_mask(v, depth - 1) for v in node.inputs if v is not None
    )
