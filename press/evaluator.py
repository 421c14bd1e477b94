"""What every measure of drift has: its numbers beside their limits, the runs, the distances.

drift.py has the measure of each task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artifact import TensorSpec
from ..runtime import Session
from ..runtime.signature import Array
from ..runtime.tasks import manifest_of
from .data import Batch, batches
from .records import Records

DEFAULT_BUDGETS = {
    "embed": 0.005,
    "classify": 0.01,
    "answer": 0.01,
    "generate": 0.05,
    "translate": 0.05,
    "tensors": 0.02,
}
WORST = {"tensors": 5.0}  # the worst example may drift so many budgets; in other tasks 10
AGREEMENT = 0.98
FEW = 50  # of fewer examples that were judged, one may disagree
NEAR_TIE = 0.02  # a lead in probability below which either choice is right


@dataclass(frozen=True)
class Drift:
    """How far one graph drifts from another, and whether the budget allows it.

    Attributes:
        metric: What the numbers are.
        mean: What the budget limits.
        worst: Of the worst example.
        examples: One number for each example, in the order of the records.
        extra: Further numbers by name.
        budget: What the mean may be at most.
        worst_budget: What the worst may be at most.
        refused: Why no budget allows it: too many choices that differ. Empty where it does not.
    """

    metric: str
    mean: float
    worst: float
    examples: tuple[float, ...]
    extra: dict[str, float]
    budget: float
    worst_budget: float
    refused: str = ""

    @property
    def passed(self) -> bool:
        """Whether mean and worst are finite and within budget, and the choices agree."""
        return not self.why

    @property
    def why(self) -> str:
        """What is past its limit, as text; empty where it passed."""
        found = []
        for name, value, most in (
            ("mean", self.mean, self.budget),
            ("worst", self.worst, self.worst_budget),
        ):
            if not (math.isfinite(value) and value <= most):
                found.append(f"the {name} {self.metric} is {value:.3g}, the budget {most:.3g}")
        return "; ".join([*found, *([self.refused] if self.refused else [])])

    def summary(self) -> dict[str, Any]:
        """For the manifest: four digits, and no number that JSON lacks."""
        return {
            "metric": self.metric,
            "mean": plain(self.mean),
            "worst": plain(self.worst),
            "budget": plain(self.budget),
            "worst_budget": plain(self.worst_budget),
            "passed": self.passed,
            "why": self.why,
            "extra": {name: plain(value) for name, value in self.extra.items()},
        }


class Evaluator:
    """Compares graphs on the answers that a task gives; base of one class for each task.

    Args:
        session: The reference, with its manifest.
        records: The examples.
        batch_size: Most rows of a run.
    """

    metric = ""

    def __init__(self, session: Session, records: Records, batch_size: int) -> None:
        manifest = manifest_of(session)
        self.task, self.settings = manifest.task, manifest.settings
        self.batches = batches(session, records, batch_size)
        self.count = len(records)

    def answers(self, session: Session) -> list[Any]:
        """What a graph answers, to be handed to `drift`: for each example its rows' answers."""
        found: list[list[Any]] = [[] for _ in range(self.count)]
        for batch in self.batches:
            for record, answer in zip(batch.records, self.rows(session, batch), strict=True):
                found[record].append(answer)
        return found

    def drift(self, want: list[Any], session: Session, budget: float | None = None) -> Drift:
        """How far a graph drifts from the reference.

        Args:
            want: The `answers` of the reference.
            session: The candidate: the same inputs and outputs, in floats of any width.
            budget: For the mean; None for the task's `DEFAULT_BUDGETS`.

        Raises:
            InputError: The candidate does not run.
        """
        with np.errstate(all="ignore"):  # what is no number is looked for, not warned of
            got = self.answers(session)
            ordinary = self.ordinary(want)
            examples = [
                float(np.mean([self.distance(a, b, ordinary) for a, b in zip(*two, strict=True)]))
                for two in zip(want, got, strict=True)
            ]
            extra, refused = self.extra(want, got, examples)
        return self.judged(examples, float(np.mean(examples)), extra, refused, budget)

    def judged(
        self,
        examples: list[float],
        mean: float,
        extra: dict[str, float],
        refused: str,
        budget: float | None,
    ) -> Drift:
        """The numbers beside their limits."""
        budget = DEFAULT_BUDGETS[self.task] if budget is None else budget
        return Drift(
            metric=self.metric,
            mean=mean,
            worst=max(examples),
            examples=tuple(examples),
            extra=extra,
            budget=budget,
            worst_budget=budget * WORST.get(self.task, 10.0),
            refused=refused,
        )

    def rows(self, session: Session, batch: Batch) -> Sequence[Any]:
        """The answer of each row of one run."""
        raise NotImplementedError

    def distance(self, want: Any, got: Any, ordinary: Any) -> float:
        """Between two answers; 0 where they are the same."""
        raise NotImplementedError

    def ordinary(self, want: list[Any]) -> Any:
        """The size that an answer usually has, where `distance` is relative to it."""

    def extra(
        self, want: list[Any], got: list[Any], examples: list[float]
    ) -> tuple[dict[str, float], str]:
        """Further numbers, and why no budget would allow them."""
        return {}, ""


def run(session: Session, batch: Batch, names: list[str]) -> list[Array]:
    """The outputs of one run. A candidate may want floats of another width, or fewer heads."""
    out = session.run(_fitted(batch.feeds, session.inputs), names)
    return [out[name] for name in names]


def _fitted(feeds: Mapping[str, Array], inputs: Sequence[TensorSpec]) -> dict[str, Array]:
    fitted = dict(feeds)
    for spec in inputs:
        value = feeds.get(spec.name)
        known = spec.dtype in ("float16", "float32", "float64")
        if value is None or not known or value.dtype.kind != "f":
            continue
        if not value.size:  # a cache of no tokens, perhaps of fewer heads
            sizes = zip(spec.shape, value.shape, strict=True)
            value = np.zeros([d if isinstance(d, int) else size for d, size in sizes])
        fitted[spec.name] = value.astype(spec.dtype, copy=False)
    return fitted


# Distances -----------------------------------------------------------------------------------


def settled(distance: float, want: Array, got: Array) -> float:
    """A distance, or where it is no number: 0 between the same arrays, infinite between others."""
    if math.isfinite(distance):
        return max(distance, 0.0)  # a divergence below 0 is rounding
    return 0.0 if np.array_equal(want, got, equal_nan=True) else math.inf


def share(distance: float, size: float) -> float:
    """A distance as a share of a size, where that may be 0."""
    return distance / size if size else math.inf if distance else 0.0


def log_softmax(logits: Array) -> Array:
    """Over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def divergence(want: Array, got: Array) -> Array:
    """KL(want || got) of two arrays of logits, over the last axis."""
    return relative_entropy(log_softmax(want), log_softmax(got))


def relative_entropy(want: Array, got: Array) -> Array:
    """The same of log-probabilities. What the reference excludes adds nothing."""
    p = np.exp(want)
    return np.asarray(np.where(p == 0, 0.0, p * (want - got)).sum(-1))


def lead(probabilities: Array) -> Array:
    """By how much the likeliest leads; all of it where there is nothing else."""
    if probabilities.shape[-1] < 2:
        return np.ones(probabilities.shape[:-1])
    two = np.partition(probabilities, -2, axis=-1)[..., -2:]
    return np.asarray(two[..., 1] - two[..., 0])


def agreement(
    same: Sequence[bool], count: int, what: str = "examples"
) -> tuple[dict[str, float], str]:
    """The share that agrees, of those that are no near ties; and why that is not enough."""
    differ, judged = len(same) - sum(same), len(same)
    agrees = 1 - differ / judged if judged else 1.0
    extra = {"agreement": agrees, "near_ties": float(count - judged)}
    if agrees >= AGREEMENT - 1e-9 or (differ == 1 and judged < FEW):
        return extra, ""
    return extra, f"{differ} of {judged} {what} differ in what is chosen, 2% may"


def finite(array: Array) -> Array:
    """In float64, 0 for what is no number."""
    wide = array.astype(np.float64)
    return np.asarray(np.where(np.isfinite(wide), wide, 0.0))


def apart(want: Array, got: Array) -> Array:
    """got - want; 0 where both are the same infinity, or both no number."""
    a, b = want.astype(np.float64), got.astype(np.float64)
    return np.asarray(np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, b - a))


def plain(value: float) -> float | str:
    """Four digits of a number; as text where JSON has none such."""
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)
