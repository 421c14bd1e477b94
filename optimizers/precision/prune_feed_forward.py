"""Remove the columns of feed-forward blocks that matter least."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ..dims import dim
from ..outcome import Outcome, describe
from ..read import rank
from .channels import Refusal, Span, is_hidden, trace, weight_of
from .removal import Scope, Score, Site, check_fraction, prune

MULTIPLE = 16
"""What stays is a multiple of this: the floats of an AVX-512 register, the columns of an AMX tile,
and the depth of the int8 and fp16 steps of tensor cores. A remainder costs as much as a whole one.
"""


class PruneFeedForward(ir.passes.InPlacePass):
    """Remove columns of feed-forward blocks, and the rows that use them.

    ```
    h = Gelu(Add(MatMul(x, up [768, 3072]), b1 [3072]))
    y = Add(MatMul(h, down [3072, 768]), b2)
    -> (a quarter less)
    h = Gelu(Add(MatMul(x, up [768, 2304]), b1 [2304]))
    y = Add(MatMul(h, down [2304, 768]), b2 + mean(h of the 768) @ (their rows of down))
    ```

    A block goes from a width to another and back. Between the MatMuls stands any elementwise op,
    a gate too: `Mul(act(MatMul(x, gate)), MatMul(x, up))`; their constants shrink along. Removing
    columns and making up for their mean is FLAP, An et al. 2024 (arXiv:2312.11983).
    """

    def __init__(
        self, fraction: float, scores: Mapping[str, Score], *, scope: Scope = "layer"
    ) -> None:
        """Take what to remove.

        Args:
            fraction: Of the columns, at least 0 and below 1; rounded so that a multiple of
                `MULTIPLE` stays, unless there are fewer to begin with.
            scores: `Importance.scores()` of this graph; blocks without any stay as they are.
            scope: As `removal.choose` says.

        Raises:
            UsageError: The fraction is none.
        """
        super().__init__()
        self.fraction, self.scores, self.scope = check_fraction(fraction), dict(scores), scope

    def call(self, model: ir.Model) -> Outcome:
        """Visit every block; those that have fewer columns than scores were pruned already."""
        return prune(
            model, read_columns, self.scores, self.fraction, scope=self.scope, multiple=MULTIPLE
        )


def read_columns(node: ir.Node) -> Site | str | None:
    """The columns of the feed-forward block that ends with this MatMul."""
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return None
    hidden = node.inputs[0]
    if hidden is None or not is_hidden(hidden):
        return None
    try:
        return _site(node, hidden)
    except Refusal as refusal:
        return str(refusal)


def _site(node: ir.Node, hidden: ir.Value) -> Site:
    down = weight_of(node)
    columns, width = dim(down, 0), dim(down, 1)
    assert isinstance(columns, int)
    cut = trace([(hidden, Span((rank(hidden) or 0) - 1, columns, 1))])
    if len(cut.rows) != 1:
        raise Refusal(f"{len(cut.rows)} MatMuls read its columns, and only it may")
    for up in cut.columns:
        if (enters := dim(weight_of(up), 0)) != width:
            raise Refusal(
                f"{describe(up)} comes from {enters} channels and this goes to {width}; "
                "a feed-forward block returns to the width that it comes from"
            )
    return Site(str(hidden.name), "columns", columns, cut, node)
