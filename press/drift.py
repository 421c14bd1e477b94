"""Drift: how far what a graph answers lies from what its float32 original answers, by task.

What a user of the task sees is compared, and nothing else: the vector of a text, the label of a
text, the next token after every real token. Padding is not looked at. A number that is none where
the reference has one is an infinite drift, which no budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..errors import ArtifactError
from ..runtime import Session
from ..runtime.signature import Array
from ..runtime.tasks import manifest_of, pool, softmax
from .data import Batch
from .evaluator import (
    DEFAULT_BUDGETS,
    NEAR_TIE,
    Drift,
    Evaluator,
    agreement,
    apart,
    divergence,
    finite,
    lead,
    log_softmax,
    plain,
    relative_entropy,
    run,
    settled,
    share,
)
from .records import Records

__all__ = ["DEFAULT_BUDGETS", "Drift", "Evaluator", "evaluator_of", "worst_examples"]

KEPT_BYTES = 1 << 29  # of a reference's logits; what is more is computed again for each candidate
_ROWS = 32  # positions whose vocabularies are compared at a time, in float64


def evaluator_of(session: Session, records: Records, *, batch_size: int = 8) -> Evaluator:
    """The evaluator of a session's task, over records.

    Args:
        session: The reference, with its manifest; its directory has the tokenizer.
        records: See `data.prepare`.
        batch_size: Most rows of a run; language models take half as many.

    Raises:
        InputError: A record that the task does not take.
        ArtifactError: A setting that the task does not know.
    """
    return _EVALUATORS[manifest_of(session).task](session, records, batch_size)


def worst_examples(records: Records, drift: Drift, k: int = 10) -> list[dict[str, Any]]:
    """The k examples that drift most, worst first: `where`, a short `text` and `drift`."""
    order = sorted(range(len(drift.examples)), key=lambda i: -drift.examples[i])[:k]
    return [
        {
            "where": records.places[i],
            "text": _short(records.items[i]),
            "drift": plain(drift.examples[i]),
        }
        for i in order
    ]


class Embeddings(Evaluator):
    """embed: 1 - cosine of the final vectors; extra has the mean and the least cosine."""

    metric = "1 - cosine"

    def rows(self, session: Session, batch: Batch) -> Sequence[Any]:
        """The pooled vector of each text."""
        how = self.settings.get("pooling")
        out = run(session, batch, ["last_hidden_state" if how else "sentence_embedding"])[0]
        if not how:
            return list(out)
        return list(pool(out.astype(np.float32), batch.feeds["attention_mask"], how))

    def distance(self, want: Array, got: Array, ordinary: None) -> float:
        """Half the square of the way between the two directions, which is the same number."""
        a, b = (v.astype(np.float64) / np.linalg.norm(v.astype(np.float64)) for v in (want, got))
        return settled(0.5 * float(((a - b) ** 2).sum()), want, got)

    def extra(
        self, want: list[Any], got: list[Any], examples: list[float]
    ) -> tuple[dict[str, float], str]:
        """The cosines."""
        return {
            "mean_cosine": 1 - float(np.mean(examples)),
            "min_cosine": 1 - max(examples),
        }, ""


class Labels(Evaluator):
    """classify: KL(reference || candidate) of the labels' distribution, in nats.

    Where each label may be true, the sum over the labels; of a regression, the difference
    relative to the score, or to the mean score where that is larger.

    An example agrees where every choice is the same; choices by a lead of less than 2% are near
    ties and set aside. Less than 98% agreement is refused whatever the budget, but on fewer than
    50 examples one may disagree.
    """

    def __init__(self, session: Session, records: Records, batch_size: int) -> None:
        super().__init__(session, records, batch_size)
        self.problem = self.settings.get("problem", "single")
        if self.problem not in ("single", "multi", "regression"):
            raise ArtifactError(f"unknown problem {self.problem!r}")
        regression = self.problem == "regression"
        self.metric = "relative difference" if regression else "KL divergence (nats)"

    def rows(self, session: Session, batch: Batch) -> Sequence[Any]:
        """The logits of each text."""
        return list(run(session, batch, ["logits"])[0].astype(np.float64))

    def choices(self, logits: Array) -> Array:
        """(choices, options): one choice among the labels, or yes or no for each of them."""
        if self.problem == "multi":
            return np.stack([logits, np.zeros_like(logits)], -1)
        return logits[None]

    def ordinary(self, want: list[Any]) -> float:
        """The mean size of a score."""
        return float(np.mean([np.linalg.norm(v) for (v,) in want]))

    def distance(self, want: Array, got: Array, ordinary: float) -> float:
        """The divergence, summed over the choices."""
        if self.problem == "regression":
            size = max(float(np.linalg.norm(want)), ordinary)
            return settled(share(float(np.linalg.norm(want - got)), size), want, got)
        nats = divergence(self.choices(want), self.choices(got))
        return settled(float(nats.sum()), want, got)

    def extra(
        self, want: list[Any], got: list[Any], examples: list[float]
    ) -> tuple[dict[str, float], str]:
        """The agreement."""
        if self.problem == "regression":
            return {}, ""
        same = []
        for (a,), (b,) in zip(want, got, strict=True):
            p, q = softmax(self.choices(a)), softmax(self.choices(b))
            if (decided := lead(p) >= NEAR_TIE).any():
                same.append(bool((p.argmax(-1) == q.argmax(-1))[decided].all()))
        return agreement(same, self.count)


class Spans(Evaluator):
    """answer: KL(reference || candidate) of where the answer starts and of where it ends, averaged.

    Over the first token, which stands for "not here", and the context, as the task reads them;
    the mean over the windows of a long context. The agreement is that of the best span, by the
    rules of classify; one that stands in two windows is a near tie with itself.
    """

    metric = "KL divergence (nats)"
    longest = 30  # tokens of an answer, as the task has it

    def rows(self, session: Session, batch: Batch) -> Sequence[Any]:
        """(2, positions): the logits of start and end."""
        both = np.stack(run(session, batch, ["start_logits", "end_logits"])).astype(np.float64)
        return [both[:, row, at] for row, at in enumerate(batch.positions)]

    def distance(self, want: Array, got: Array, ordinary: None) -> float:
        """The mean of both divergences."""
        return settled(float(divergence(want, got).mean()), want, got)

    def extra(
        self, want: list[Any], got: list[Any], examples: list[float]
    ) -> tuple[dict[str, float], str]:
        """The agreement."""
        same = []
        for a, b in zip(want, got, strict=True):
            p, q = self._spans(a), self._spans(b)
            if p.size and lead(p) >= NEAR_TIE:
                same.append(bool(p.argmax() == q.argmax()))
        return agreement(same, self.count)

    def _spans(self, windows: list[Array]) -> Array:
        """The probability of every span of an example, window after window."""
        found = []
        for logits in windows:
            start, end = softmax(logits)[:, 1:]
            both = start[:, None] * end[None, :]
            found.append((np.triu(both) - np.triu(both, self.longest)).ravel())
        return np.concatenate(found)


class NextTokens(Evaluator):
    """generate and translate: KL(reference || candidate) of the next token, in nats a token.

    After every real token of the text; of a translation, after every token of the reference's
    own. The mean is over tokens, an example's number the mean over its own. extra has `top1`,
    the share of tokens for which the likeliest next one is the same, and where there are tokens
    with a true successor the `perplexity_ratio`: the candidate's perplexity on them over the
    reference's.

    A vocabulary for every token is too much to keep for many texts: the reference's logits are
    kept up to `KEPT_BYTES`, as they are, and beyond that the reference runs again beside each
    candidate. So nothing is rounded or left out, and the cost is at most one more run.
    """

    metric = "KL divergence (nats a token)"

    def __init__(self, session: Session, records: Records, batch_size: int) -> None:
        super().__init__(session, records, max(1, batch_size // 2))
        self._never = self.settings.get("suppress_token_ids") or []

    def answers(self, session: Session) -> list[Any]:
        """For each run, what gives its rows' logits: the memory, or the session once more."""
        found: list[Callable[[], Sequence[Array]]] = []
        room = KEPT_BYTES
        for batch in self.batches:
            again = partial(self.rows, session, batch)
            if room > 0:
                rows = again()
                room -= sum(row.nbytes for row in rows)
                again = partial(list, rows) if room >= 0 else again
            found.append(again)
        return found

    def rows(self, session: Session, batch: Batch) -> Sequence[Array]:
        """(real tokens, vocabulary) of each row."""
        logits = run(session, batch, ["logits"])[0]
        return [logits[row, at] for row, at in enumerate(batch.positions)]

    def drift(self, want: list[Any], session: Session, budget: float | None = None) -> Drift:
        """See `Evaluator.drift`."""
        diverged: list[Array] = [np.zeros(0)] * self.count
        surprise = np.zeros(2)  # of the reference, of the candidate: nats, over all targets
        same = targets = 0
        with np.errstate(all="ignore"):
            for batch, reference in zip(self.batches, want, strict=True):
                two = zip(reference(), self.rows(session, batch), strict=True)
                for record, known, (a, b) in zip(batch.records, batch.targets, two, strict=True):
                    parts = list(self._compare(a, b, known))
                    diverged[record] = np.concatenate([kl for kl, *_ in parts])
                    same += sum(equal for _, equal, _ in parts)
                    surprise += sum(nats for *_, nats in parts)
                    targets += len(known)
            tokens = np.concatenate(diverged)
            extra = {"top1": same / len(tokens)}
            if targets:
                ratio = float(np.exp((surprise[1] - surprise[0]) / targets))
                extra["perplexity_ratio"] = math.inf if math.isnan(ratio) else ratio
        examples = [float(a.mean()) for a in diverged]
        return self.judged(examples, float(tokens.mean()), extra, "", budget)

    def _compare(
        self, want: Array, got: Array, targets: Array
    ) -> Iterator[tuple[Array, int, Array]]:
        """Divergences, equal choices and nats of the targets, a few positions at a time."""
        for start in range(0, len(want), _ROWS):
            part = slice(start, start + _ROWS)
            a, b = (logits[part].astype(np.float64) for logits in (want, got))
            a[:, self._never] = b[:, self._never] = -np.inf
            equal = int((a.argmax(-1) == b.argmax(-1)).sum())
            a, b = log_softmax(a), log_softmax(b)
            kl = relative_entropy(a, b)
            for row in np.flatnonzero(~np.isfinite(kl) | (kl < 0)):
                kl[row] = settled(float(kl[row]), a[row], b[row])
            ids = targets[part]
            at = np.arange(len(ids))
            yield kl, equal, np.array([-a[at, ids].sum(), -b[at, ids].sum()])


class Tensors(Evaluator):
    """tensors: ||got - want|| / ||want|| of each output of floats, and the largest of those.

    Outputs are judged one by one, so that a small one cannot hide beside a large one. An output
    that is nearly zero for one example is held against a thousandth of its mean norm. Outputs of
    other types have to agree, in at least 98% of their elements; the share is `agreement`.
    """

    metric = "relative error"

    def rows(self, session: Session, batch: Batch) -> Sequence[Any]:
        """The outputs by name."""
        names = [spec.name for spec in session.outputs]
        return [dict(zip(names, run(session, batch, names), strict=True))]

    def ordinary(self, want: list[Any]) -> dict[str, float]:
        """The mean norm of each output."""
        return {
            name: float(np.mean([np.linalg.norm(finite(outputs[name])) for (outputs,) in want]))
            for name, array in want[0][0].items()
            if array.dtype.kind == "f"
        }

    def distance(self, want: Any, got: Any, ordinary: Mapping[str, float]) -> float:
        """The relative error of the worst output."""
        worst = 0.0
        for name, usual in ordinary.items():
            a, b = want[name], got[name]
            if a.shape != b.shape:
                return math.inf
            size = max(float(np.linalg.norm(finite(a))), 1e-3 * usual)
            error = share(float(np.linalg.norm(apart(a, b))), size)
            worst = max(worst, settled(error, a, b))
        return worst

    def extra(
        self, want: list[Any], got: list[Any], examples: list[float]
    ) -> tuple[dict[str, float], str]:
        """The largest difference, and the agreement of what is not of floats."""
        largest, same = 0.0, [np.zeros(0, bool)]
        for (a,), (b,) in zip(want, got, strict=True):
            for name in a:
                if a[name].shape != b[name].shape:
                    largest = math.inf
                elif a[name].dtype.kind != "f":
                    same.append((a[name] == b[name]).ravel())
                elif a[name].size:
                    most = float(np.abs(apart(a[name], b[name])).max())
                    largest = max(largest, math.inf if math.isnan(most) else most)
        if len(same) == 1:
            return {"max_abs": largest}, ""
        shares, refused = agreement(np.concatenate(same).tolist(), 0, "elements")
        return {"max_abs": largest, "agreement": shares["agreement"]}, refused


_EVALUATORS: dict[str, type[Evaluator]] = {
    "embed": Embeddings,
    "classify": Labels,
    "answer": Spans,
    "generate": NextTokens,
    "translate": NextTokens,
    "tensors": Tensors,
}


def _short(item: Any) -> str:
    """An example in one line of at most 160 characters."""
    if isinstance(item, str):
        text = " ".join(item.split())
    elif all(isinstance(value, str) for value in item.values()):
        text = " | ".join(" ".join(value.split()) for value in item.values())
    else:
        text = ", ".join(f"{name}: {a.dtype}{list(a.shape)}" for name, a in item.items())
    return text if len(text) <= 160 else text[:157] + "..."
