"""Add a residual inside a norm, for targets whose kernel does.

Contract: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftskiplayernormalization
On the CPU provider the fused kernel is slower than Add and LayerNormalization apart (534 us with a
bias against 109 at 128 x 768), so that only other targets list it.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase

from ..dims import dim, same_dim, same_shape
from ..outcome import Outcome
from ..read import producer, rank
from .rules import fuse


class _Rule(RewriteRuleClassBase):
    def pattern(self, op: Any, x: Any, skip: Any, scale: Any, bias: Any) -> Any:
        total = op.Add(x, skip, _outputs=["total"])
        return op.LayerNormalization(total, scale, bias, _outputs=["y"]), total

    def check(  # type: ignore[override]
        self,
        context: Any,
        x: ir.Value,
        skip: ir.Value,
        scale: ir.Value,
        bias: ir.Value,
        y: ir.Value,
        **_: Any,
    ) -> MatchResult:
        result = MatchResult()
        norm = y.producer()
        assert norm is not None
        n, axis = rank(x), norm.attributes.get_int("axis", -1)
        if n != 3:
            return result.fail(f"the kernel wants rank 3, not {n}", x)
        if axis not in (-1, n - 1):
            return result.fail(f"the norm is over axis {axis}, not the last", y)
        for v in (scale, bias):
            if rank(v) != 1 or not same_dim(dim(v, 0), dim(x, -1)):
                return result.fail(f"scale or shift has shape {v.shape}", v)
        if x.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return result.fail(f"no kernel for {x.dtype.name if x.dtype else None}", x)
        if len(norm.outputs) > 1:
            return result.fail("the mean or the deviation is read too", y)
        if not (same_shape(x, skip) or _one_for_all(skip, x)):
            return result.fail(f"the sum broadcasts: {x.shape} and {skip.shape}", skip)
        return result

    def rewrite(
        self,
        op: Any,
        x: ir.Value,
        skip: ir.Value,
        scale: ir.Value,
        bias: ir.Value,
        y: ir.Value,
        total: ir.Value,
        **_: Any,
    ) -> Any:
        norm = y.producer()
        assert norm is not None
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        values, *inner = _unbiased(x)
        out, _mean, _deviation, summed = op.SkipLayerNormalization(
            values, skip, scale, bias, *inner,
            epsilon=epsilon, _domain="com.microsoft", _version=1, _outputs=4,
        )  # fmt: skip
        return out, summed


class _Swapped(_Rule):
    def pattern(self, op: Any, x: Any, skip: Any, scale: Any, bias: Any) -> Any:
        total = op.Add(skip, x, _outputs=["total"])
        return op.LayerNormalization(total, scale, bias, _outputs=["y"]), total


def _one_for_all(skip: ir.Value, x: ir.Value) -> bool:
    """Whether `skip` is [1, length, size] or [length, size]: one for the whole batch."""
    if rank(skip) not in (2, 3) or not all(same_dim(dim(skip, a), dim(x, a)) for a in (-1, -2)):
        return False
    return rank(skip) == 2 or dim(skip, 0) == 1


def _unbiased(x: ir.Value) -> tuple[ir.Value, ...]:
    """(values, bias) where `x` is their sum, read by no one else; the bias has one dimension."""
    add = producer(x, "Add")
    if add is None or len(x.uses()) > 1 or x.is_graph_output():
        return (x,)
    for a, b in (add.inputs, reversed(add.inputs)):
        if a is not None and b is not None and rank(b) == 1 and same_shape(a, x):
            return (a, b) if same_dim(dim(b, 0), dim(x, -1)) else (x,)
    return (x,)


class FuseSkipLayerNormalization(ir.passes.InPlacePass):
    """Write SkipLayerNormalization.

    ```
    m = Add(x, bias)                               bias of one dimension, where there is one
    s = Add(m, skip)  y = LayerNormalization(s, scale, shift)
    ->
    y, _, _, s = com.microsoft.SkipLayerNormalization(x, skip, scale, shift, bias)
    ```

    The sum stays at hand as the last output, for pre-norm models that add to it again.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Apply the rule to the whole graph."""
        return fuse(model, [_Rule, _Swapped])
