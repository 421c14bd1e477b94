"""Whether a mask hides anything: a condition on the small value that it is made of.

A mask of Attention hides nothing where it is 0 everywhere (a float, which is added to the scores)
or True everywhere (a bool). Then Attention without it gives the same, whatever its attributes.
`lower/skip_empty_masks.py` writes the condition, `merge_mask_branches.py` reads it back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..edit import constant as new_constant
from ..read import constant, is_scalar, producer, scalar

MASK = 3  # index of attn_mask among the inputs of Attention

_ALIGNED = ("Expand", "Identity")  # a copy whose dimensions are those of the source, from the right
_VIEWS = (*_ALIGNED, "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def sources(mask: ir.Value, *, aligned: bool = False) -> list[ir.Value]:
    """What a mask is made of, itself first: if one of these hides nothing, then so does the mask.

    The walk crosses views, Casts between floats, a softened mask, and the choice
    Where(seen, 0, low), behind which stands a bool in the place of a float.

    Args:
        mask: What Attention reads.
        aligned: Whether to stop where dimensions change their places: at any view but Expand.
    """
    found = [mask]
    while (source := _source(found[-1], _ALIGNED if aligned else _VIEWS)) is not None:
        found.append(source)
    return found


def _source(value: ir.Value, views: tuple[str, ...]) -> ir.Value | None:
    node = producer(value, "Where", "Cast", *views)
    if node is None:
        return None
    source = node.inputs[0]
    if node.op_type == "Where":
        zeros = constant(node.inputs[1])
        if zeros is not None and zeros.dtype != bool and not zeros.any():
            return source
        return _unsoftened(node)
    if node.op_type == "Cast":
        to = node.attributes.get_int("to", 0)
        floats = source is not None and source.dtype in _FLOATS and to in _FLOATS
        return source if floats else None
    return source


def _unsoftened(where: ir.Node) -> ir.Value | None:
    """m of Where(Equal(m, lowest), higher, m), as soften_attention_mask writes it: 0 stays 0."""
    equal = producer(where.inputs[0], "Equal")
    if equal is None or equal.inputs[0] is not where.inputs[2]:
        return None
    numbers = scalar(equal.inputs[1]), scalar(where.inputs[1])
    return where.inputs[2] if None not in numbers and numbers[0] != 0.0 else None


def hides_nothing(source: ir.Value, graph: ir.Graph) -> tuple[ir.Value, list[ir.Node]]:
    """The condition that a source hides nothing, and the nodes that compute it, for the caller to
    place.

    ```
    all = Equal(source, 0)                                    of a float; a bool says it itself
    n = Cast<uint8>(all)  least = ReduceMin<keepdims=0>(n)  empty = Cast<bool>(least)
    ```

    ONNX Runtime has a ReduceMin of bools on CPU, but refuses to reduce none at all with it; that
    of uint8 gives 255 then (tried on 1.32), which is true: what is not there hides nothing. NaN
    equals nothing, so that a mask with NaN hides something.

    Args:
        source: A bool, or a float32.
        graph: Where the 0 is kept.
    """
    nodes: list[ir.Node] = []
    truth = source
    if source.dtype != ir.DataType.BOOL:
        zero = new_constant(graph, f"{source.name}_zero", np.array(0, np.float32))
        nodes.append(ir.node("Equal", [source, zero]))
        truth = nodes[-1].outputs[0]
        nodes[-1].name = f"{source.name}_is_zero"  # else numbered, and anew in a second run
        truth.name, truth.shape = f"{source.name}_is_zero", source.shape
        truth.type = ir.TensorType(ir.DataType.BOOL)
    for op, attribute, dtype, word in (
        ("Cast", ("to", int(ir.DataType.UINT8)), ir.DataType.UINT8, "uint8"),
        ("ReduceMin", ("keepdims", 0), ir.DataType.UINT8, "least"),
        ("Cast", ("to", int(ir.DataType.BOOL)), ir.DataType.BOOL, "hides_nothing"),
    ):
        last = nodes[-1].outputs[0] if nodes else truth
        nodes.append(ir.node(op, [last], attributes=dict([attribute])))
        made = nodes[-1].outputs[0]
        nodes[-1].name = f"{source.name}_{word}"
        made.name, made.type = f"{source.name}_{word}", ir.TensorType(dtype)
        made.shape = source.shape if word == "uint8" else ir.Shape([])
    return nodes[-1].outputs[0], nodes


def means_hides_nothing(condition: ir.Value | None, mask: ir.Value) -> bool:
    """Whether `condition` is the one of `hides_nothing`, of a source of this mask."""
    flag = producer(condition, "Cast")
    least = producer(flag.inputs[0], "ReduceMin") if flag is not None else None
    number = producer(least.inputs[0], "Cast") if least is not None else None
    if flag is None or least is None or number is None:
        return False
    casts = [n.attributes.get_int("to", 0) for n in (number, flag)]
    over_all = len(least.inputs) == 1 and not {"axes", "noop_with_empty_axes"} & set(
        least.attributes
    )
    truth = number.inputs[0]
    if casts != [ir.DataType.UINT8, ir.DataType.BOOL] or not over_all or truth is None:
        return False
    made_of = sources(mask)
    equal = producer(truth, "Equal")
    if equal is not None and is_scalar(equal.inputs[1], 0.0):
        first = equal.inputs[0]
        return first is not None and first.dtype in _FLOATS and first in made_of
    return truth.dtype == ir.DataType.BOOL and truth in made_of


@dataclass(frozen=True)
class Branches:
    """The two of `If(empty) { Attention(q, k, v) } else { Attention(q, k, v, mask) }`."""

    plain: ir.Node
    masked: ir.Node


def read_branches(node: ir.Node) -> Branches | str | None:
    """The branches that `skip_empty_masks` wrote.

    Returns:
        None where `node` is nothing of that kind; a string where two Attentions are its branches,
        but it is not proved that they give the same: what failed.
    """
    if node.op_type != "If" or node.domain != "" or len(node.outputs) != 1:
        return None
    found = [_only_attention(node, name) for name in ("then_branch", "else_branch")]
    plain, masked = found
    if plain is None or masked is None:
        return None
    mask = masked.inputs[MASK] if len(masked.inputs) > MASK else None
    if mask is None or any(v is not None for v in plain.inputs[MASK:]):
        return "not the second of the branches alone has a mask"
    if plain.inputs[:MASK] != masked.inputs[:MASK] or any(
        v is not None for v in masked.inputs[MASK + 1 :]
    ):
        return "its branches read different values"
    settings = [{name: a.value for name, a in n.attributes.items()} for n in (plain, masked)]
    if settings[0] != settings[1]:
        return "its branches have different attributes"
    if not means_hides_nothing(node.inputs[0], mask):
        return f"{_name(node.inputs[0])} does not say that the mask {mask.name!r} hides nothing"
    return Branches(plain, masked)


def _only_attention(node: ir.Node, branch: str) -> ir.Node | None:
    """The Attention that a branch consists of."""
    attribute = node.attributes.get(branch)
    if attribute is None or attribute.type != ir.AttributeType.GRAPH:
        return None
    graph = attribute.as_graph()
    nodes = list(graph)
    if len(nodes) != 1 or graph.initializers or len(graph.outputs) != 1:
        return None
    (only,) = nodes
    is_attention = only.op_type == "Attention" and only.domain == "" and len(only.outputs) == 1
    return only if is_attention and graph.outputs[0] is only.outputs[0] else None


def _name(value: ir.Value | None) -> str:
    return "nothing" if value is None else repr(value.name)
