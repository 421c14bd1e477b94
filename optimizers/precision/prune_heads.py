"""Remove the attention heads that matter least."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..dims import dim, same_dim
from ..outcome import Outcome
from ..read import producer, rank
from .channels import Cut, Refusal, Span, trace
from .removal import Scope, Score, Site, check_fraction, prune

MASK, PAST = 3, (4, 5)  # indices among the inputs of Attention


class PruneHeads(ir.passes.InPlacePass):
    """Remove attention heads, and the weights that make and use them.

    ```
    q = MatMul(x, wq [768, 768])  k, v alike
    y = Attention<q_num_heads=12, kv_num_heads=12, scale=0.125>(q, k, v)
    out = Add(MatMul(y, wo [768, 768]), bo)
    -> (a quarter less)
    q = MatMul(x, wq [768, 576])
    y = Attention<q_num_heads=9, kv_num_heads=9, scale=0.125>(q, k, v)
    out = Add(MatMul(y, wo [576, 768]), bo + mean(y of the three) @ (their rows of wo))
    ```

    That whole heads can go is Michel et al. 2019 (arXiv:1905.10650) and Voita et al. 2019
    (arXiv:1905.09418). Where several query heads share a key head they go as one group; where all
    share one, each goes alone. Biases,
    RotaryEmbedding, norms within a head, and views around Attention of rank 4 shrink along; a mask
    or bias with a row for each head, as T5 has, is gathered. The scale stays, it is of the size of
    a head. Refused: a cache, whose inputs and outputs have an axis of heads.
    """

    def __init__(
        self, fraction: float, scores: Mapping[str, Score], *, scope: Scope = "layer"
    ) -> None:
        """Take what to remove.

        Args:
            fraction: Of the heads, at least 0 and below 1. Each layer keeps one head at least.
            scores: `Importance.scores()` of this graph; layers without any stay as they are.
            scope: As `removal.choose` says.

        Raises:
            UsageError: The fraction is none.
        """
        super().__init__()
        self.fraction, self.scores, self.scope = check_fraction(fraction), dict(scores), scope

    def call(self, model: ir.Model) -> Outcome:
        """Visit every Attention; those that have fewer heads than scores were pruned already."""
        return prune(model, read_heads, self.scores, self.fraction, scope=self.scope)


def read_heads(node: ir.Node) -> Site | str | None:
    """The heads of an Attention."""
    if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
        return None
    try:
        return _site(node)
    except Refusal as refusal:
        return str(refusal)


def _site(node: ir.Node) -> Site:
    if any(v is not None for v in node.inputs[PAST[0] : PAST[1] + 1]):
        raise Refusal(
            "it reads a cache of past keys and values, which has an axis of heads: the signature "
            "would change"
        )
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise Refusal("it gives out keys, values or scores, which have an axis of heads")
    q, k, v = node.inputs[:3]
    assert q is not None
    assert k is not None
    assert v is not None
    if any(value in node.inputs[MASK:] for value in (q, k, v)):
        raise Refusal("a mask of it is what it attends to")
    heads, groups = _counts(node, q, k)
    if heads == 1:
        raise Refusal("it has one head, and keeps it")
    if groups == 1:  # all query heads share one key head, and any number of them can
        units, share, shrinks = heads, 1, [q]
    else:  # query heads that share a key head are neighbors
        units, share, shrinks = groups, heads // groups, [q, k, v]
    if rank(q) == 4:
        spans = [Span(1, units, share if value is q else 1) for value in shrinks]
        out = spans[0]
    else:
        spans = [Span(2, units, _width(value, units)) for value in shrinks]
        out = Span(2, units, _width(v, groups) * share)
    cut = trace([*zip(shrinks, spans, strict=True), (node.outputs[0], out)], ends=[node])
    if len(cut.rows) != 1:
        raise Refusal(f"{len(cut.rows)} MatMuls read its output, and one projection may")
    for name in ["q_num_heads", "kv_num_heads"][: len(shrinks)]:
        if name in node.attributes:
            cut.counts[node, name] = units
    _mask(node, heads, Span(-3, units, share), cut)
    joined = cut.rows[0].inputs[0]
    assert joined is not None
    what = "heads" if share == 1 else f"groups of {share} heads"
    return Site(str(joined.name), what, units, cut, cut.rows[0])


def _counts(node: ir.Node, q: ir.Value, k: ir.Value) -> tuple[int, int]:
    """Heads of queries and of keys; the former are a multiple of the latter."""
    if rank(q) == 4:
        heads, groups = dim(q, 1), dim(k, 1)
    else:
        heads = node.attributes.get_int("q_num_heads", 0)
        groups = node.attributes.get_int("kv_num_heads", 0)
    if not isinstance(heads, int) or not isinstance(groups, int) or not groups or heads % groups:
        raise Refusal(f"{heads} heads of queries and {groups} of keys are no whole groups")
    return heads, groups


def _width(value: ir.Value, groups: int) -> int:
    size = dim(value, 2)
    if not isinstance(size, int) or size % groups:
        raise Refusal(f"{groups} heads do not divide the {size} channels of {value.name!r}")
    return size // groups


def _mask(node: ir.Node, heads: int, span: Span, cut: Cut) -> None:
    """A mask that is the same for all heads stays; of another the rows of those heads go."""
    mask = node.inputs[MASK] if len(node.inputs) > MASK else None
    if mask is None:
        return
    n, rows = rank(mask), dim(mask, -3)
    if n is None:
        raise Refusal(f"the rank of mask {mask.name!r} is not known")
    if n < 3 or rows == 1:
        return
    if rows != heads:
        raise Refusal(f"axis {n - 3} of mask {mask.name!r} is {rows}; there are {heads} heads")
    expand = producer(mask, "Expand")
    source = expand.inputs[0] if expand else None
    plain = dim(source, -3) == 1 and all(
        same_dim(dim(source, axis), dim(mask, axis)) for axis in (-2, -1)
    )
    if source is not None and plain:
        cut.inputs[node, MASK] = source  # Attention stretches it over batch and heads itself
    else:
        cut.slices[node, MASK] = Span(n - 3, span.units, span.width)
