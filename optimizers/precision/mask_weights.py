"""Set the weights that matter least to zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ...errors import UsageError
from ..outcome import Outcome, describe
from .channels import Refusal, array_of, put, weight_of
from .removal import Numbers, check_fraction

GROUP, ZEROS = 4, 2  # 2:4


class MaskWeights(ir.passes.InPlacePass):
    """Set weights of MatMuls to zero; shapes stay.

    ```
    y = MatMul(x, w)
    -> (2:4)
    y = MatMul(x, w where two of w[0:4, n], two of w[4:8, n], ... are zero)
    ```

    Weights of one output are compared with each other: by |w|, or with activations by |w| * |x|
    (Wanda, Sun et al. 2023, arXiv:2306.11695). The pattern 2:4 is what sparse tensor cores read
    (Mishra et al. 2021, arXiv:2104.08378). TensorRT takes it where, for each output channel, two of
    every four neighbors along the input channels are zero, with kSPARSE_WEIGHTS set ("Sparsity" in
    its developer guide): along K here. Kernels of CPUs gain nothing by either pattern.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        *,
        pattern: Literal["unstructured", "2:4"] = "unstructured",
        norms: Mapping[str, Numbers] | None = None,
    ) -> None:
        """Take what to mask.

        Args:
            sparsity: How many of the weights become zero, at least 0 and below 1.
            pattern: `unstructured`, or `2:4`, whose sparsity is 0.5.
            norms: `InputNorms.norms()` of this graph; None compares weights alone.

        Raises:
            UsageError: The sparsity is none, or not that of the pattern.
        """
        super().__init__()
        self.sparsity, self.pattern, self.norms = check_fraction(sparsity), pattern, norms
        if pattern == "2:4" and sparsity != ZEROS / GROUP:
            raise UsageError(f"the pattern 2:4 has a sparsity of 0.5, not {sparsity}")

    def call(self, model: ir.Model) -> Outcome:
        """Visit every MatMul with a weight of its own; what is as sparse already is left alone."""
        found, notes = maskable(model)
        hits = 0
        for node in found:
            weight = array_of(node.inputs[1])
            masked = self._masked(node, weight)
            if isinstance(masked, str):
                notes.append(f"{describe(node)}: {masked}")
            elif masked is not None:
                put(node, 1, masked)
                hits += 1
        return Outcome(model, bool(hits), hits=hits, notes=tuple(notes))

    def _masked(
        self, node: ir.Node, weight: npt.NDArray[np.generic]
    ) -> npt.NDArray[np.generic] | str | None:
        """The weight with its zeros; None where they are there; or why there can be none."""
        k = len(weight)
        group, zeros = k, math.floor(k * self.sparsity + 1e-9)
        if self.pattern == "2:4":
            group, zeros = GROUP, ZEROS
            if k % GROUP:
                return f"K is {k}, which {GROUP} does not divide"
        scores = np.abs(weight.astype(np.float32))
        if self.norms is not None:
            norm = self.norms.get(str(node.inputs[0].name))  # type: ignore[union-attr]
            if norm is None or norm.shape != (k,) or not np.isfinite(norm).all():
                return f"there are no finite norms of its {k} channels"
            scores *= norm.astype(np.float32)[:, None]
        if not np.isfinite(scores).all():
            return "its weights are not finite"
        groups = weight.reshape(k // group, group, -1)
        if ((groups == 0).sum(1) >= zeros).all():
            return None
        order = np.argsort(scores.reshape(groups.shape), axis=1, kind="stable")
        masked = groups.copy()
        np.put_along_axis(masked, order[:, :zeros], np.zeros((), weight.dtype), axis=1)
        return masked.reshape(weight.shape)


def maskable(model: ir.Model) -> tuple[list[ir.Node], list[str]]:
    """The MatMuls of the main graph whose weight (K, N) is theirs alone, and why others are not."""
    found, notes = [], []
    for node in model.graph:
        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
            continue
        weight = node.inputs[1]
        if weight is None or ir.convenience.get_const_tensor(weight) is None:
            continue  # a product of activations, as attention has
        try:
            weight_of(node)
        except Refusal as refusal:
            notes.append(f"{describe(node)}: {refusal}")
        else:
            found.append(node)
    return found, notes
