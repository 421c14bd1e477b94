"""Text in, answers out, for graphs that run once: embed, classify, answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypedDict, overload

import numpy as np

from ..artifact import Manifest
from ..errors import ArtifactError, InputError
from .session import Session
from .signature import Array
from .tokenization import Tokenizer, Tokens, check_texts, open_tokenizer, pad


class Label(TypedDict):
    """One label and its probability; of a regression, its value."""

    label: str
    score: float


class Answer(TypedDict):
    """A stretch of the context: `context[start:end] == answer`, and its probability."""

    answer: str
    score: float
    start: int
    end: int


class TextTask:
    """A session with a manifest and the tokenizer that feeds it; the base of the text tasks.

    Args:
        session: An open artifact directory.
        truncate: Cut texts that are longer than the model takes, with a TruncationWarning;
            False refuses them.

    Raises:
        ArtifactError: The session has no manifest, or it lacks a setting of the task.
    """

    limited = True  # whether the tokenizer holds texts to max_length

    def __init__(self, session: Session, *, truncate: bool = True) -> None:
        self.session = session
        self.manifest = manifest_of(session)
        self.tokenizer = Tokenizer(
            session.path.parent,
            max_length=self.setting("max_length", None) if self.limited else None,
            truncate=truncate,
            pad_id=self.setting("pad_token_id", None) or 0,
        )
        self._names = {i.name for i in session.inputs}

    def setting(self, name: str, *default: Any) -> Any:
        """A setting of the manifest; without a default it must be there."""
        settings = self.manifest.settings
        if name not in settings and not default:
            raise ArtifactError(
                f"the manifest has no setting {name!r}, which the task "
                f"{self.manifest.task!r} needs",
                where=str(self.session.path.parent),
            )
        return settings.get(name, *default)

    def batches(
        self, tokens: Sequence[Tokens], batch_size: int
    ) -> Iterator[tuple[Array, dict[str, Array]]]:
        """Rows and their feeds. Sorted by length: a batch of one length computes no padding."""
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        order = np.argsort([-len(t) for t in tokens], kind="stable")
        for start in range(0, len(tokens), batch_size):
            rows = order[start : start + batch_size]
            yield rows, self.feeds(self.tokenizer.pad([tokens[i] for i in rows]))

    def feeds(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """Those of the arrays that the graph takes."""
        return {name: a for name, a in arrays.items() if name in self._names}


class Embedder(TextTask):
    """Texts to vectors.

    Settings: `pooling` ("mean", "cls", "max", or None where the graph pools), `normalize`,
    `max_length`, `pad_token_id`, and `prompt` (put before every text) where the model has one.
    """

    def embed(self, texts: str | Sequence[str], *, batch_size: int = 32) -> Array:
        """One float32 vector for each text, in order: (texts, dim).

        Raises:
            InputError: An item is no str, or too long where the embedder does not truncate.
        """
        pooling, normalize = self.setting("pooling"), self.setting("normalize", False)
        output = "last_hidden_state" if pooling else "sentence_embedding"
        spec = next((o for o in self.session.outputs if o.name == output), None)
        if spec is None:
            raise ArtifactError(f"the graph has no output {output!r}, for pooling {pooling!r}")
        if prompt := self.setting("prompt", None):
            texts = [f"{prompt}{text}" for text in check_texts(texts)]
        tokens = self.tokenizer.encode(texts)
        dim = spec.shape[-1] if isinstance(spec.shape[-1], int) else 0
        vectors = np.zeros((len(tokens), dim), np.float32)
        for rows, feeds in self.batches(tokens, batch_size):
            pooled = self.session.run(feeds, [output])[output].astype(np.float32, copy=False)
            if pooling:
                pooled = pool(pooled, feeds["attention_mask"], pooling)
            if normalize:
                norm = np.linalg.norm(pooled, axis=1, keepdims=True)
                pooled = pooled / np.maximum(norm, 1e-12)
            if not vectors.shape[1]:  # the signature did not know the dimension
                vectors = np.zeros((len(tokens), pooled.shape[1]), np.float32)
            vectors[rows] = pooled
        return vectors


def pool(hidden: Array, mask: Array, how: str) -> Array:
    """(batch, sequence, dim) to (batch, dim) over the real tokens, as sentence-transformers does.

    Raises:
        ArtifactError: `how` is none of mean, cls and max.
    """
    real = mask[:, :, None].astype(np.float32)
    match how:
        case "mean":
            return np.asarray((hidden * real).sum(1) / np.maximum(real.sum(1), 1e-9))
        case "cls":
            return hidden[:, 0]
        case "max":
            return np.asarray(np.where(real > 0, hidden, np.float32(-1e9)).max(1))
    raise ArtifactError(f"unknown pooling {how!r}", hint="mean, cls, max, or null")


class Classifier(TextTask):
    """Texts to labels.

    Settings: `labels`, `problem` ("single": one label is true, softmax; "multi": each may be,
    sigmoid; "regression": the score is the number itself), `max_length`, `pad_token_id`.
    """

    @overload
    def classify(  # type: ignore[overload-overlap]  # an int that may be 1 is typed as any int
        self, texts: str | Sequence[str], *, top_k: Literal[1] = 1, batch_size: int = 32
    ) -> list[Label]: ...
    @overload
    def classify(
        self, texts: str | Sequence[str], *, top_k: int | None, batch_size: int = 32
    ) -> list[list[Label]]: ...
    def classify(
        self, texts: str | Sequence[str], *, top_k: int | None = 1, batch_size: int = 32
    ) -> list[Label] | list[list[Label]]:
        """The label of each text with its probability: [{"label": ..., "score": ...}, ...].

        Args:
            texts: The texts; one str is a list of one.
            top_k: With any value but 1, a list for each text: the k likeliest labels, best
                first; None for all of them.
            batch_size: Texts of one run.

        Raises:
            InputError: An item is no str, or too long where the classifier does not truncate.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k must be at least 1, or None for all; not {top_k}")
        labels, problem = self.setting("labels"), self.setting("problem", "single")
        if problem not in ("single", "multi", "regression"):
            raise ArtifactError(f"unknown problem {problem!r}", hint="single, multi or regression")
        tokens = self.tokenizer.encode(texts)
        found: list[list[Label]] = [[] for _ in tokens]
        for rows, feeds in self.batches(tokens, batch_size):
            logits = self.session.run(feeds, ["logits"])["logits"].astype(np.float64)
            if logits.shape[1] != len(labels):
                raise ArtifactError(
                    f"the graph gives {logits.shape[1]} logits, the manifest {len(labels)} labels"
                )
            scores = logits
            if problem != "regression":
                scores = softmax(logits) if problem == "single" else 0.5 + 0.5 * np.tanh(logits / 2)
            for row, score in zip(rows, scores, strict=True):
                best = np.argsort(-score, kind="stable")[:top_k]
                found[row] = [{"label": labels[j], "score": float(score[j])} for j in best]
        return [f[0] for f in found] if top_k == 1 else found


class Answerer(TextTask):
    """A question and a text to the stretch of the text that answers it.

    Settings: `max_length`, `pad_token_id`, and `stride` (tokens that two windows over a long
    text share; a quarter of max_length where it is missing).
    """

    limited = False  # its windows are cut by a tokenizer of their own

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        limit = self.setting("max_length")
        self._stride = self.setting("stride", limit // 4)
        self._room = limit - self.tokenizer.special_tokens(pair=True)
        self._windows = open_tokenizer(session.path.parent)
        self._windows.enable_truncation(limit, stride=self._stride, strategy="only_second")

    def answer(
        self, question: str, context: str, *, longest: int = 30, batch_size: int = 8
    ) -> Answer:
        """The best answer within the context.

        A context that is longer than the model takes is read in windows that overlap; nothing
        is cut off. The score is the product of the probabilities of start and end in their
        window, in which the first token ([CLS]) stands for "not here".

        Args:
            question: The question.
            context: The text to search.
            longest: Most tokens of an answer.
            batch_size: Windows of one run.

        Raises:
            InputError: One is no str, the context is empty, or the question leaves no room.
        """
        check_texts([question], what="question")
        check_texts([context], what="context")
        asked = len(self.tokenizer.encode(question, special=False)[0])
        # The library panics where a window would hold no more than the stride.
        if self._room - asked <= self._stride:
            raise InputError(
                f"the question is too long: at most {self._room - self._stride - 1} tokens leave "
                "room for the text"
            )
        first = self._windows.encode(question, context)
        windows = [first, *first.overflowing]
        best: tuple[float, int, int] | None = None
        for start in range(0, len(windows), batch_size):
            part = windows[start : start + batch_size]
            tokens = [Tokens(w.ids, w.type_ids) for w in part]
            feeds = self.feeds(pad(tokens, pad_id=self.tokenizer.pad_id))
            out = self.session.run(feeds, ["start_logits", "end_logits"])
            for w, s, e in zip(part, out["start_logits"], out["end_logits"], strict=True):
                span = _best_span(w, s, e, longest)
                if span and (best is None or span[0] > best[0]):
                    best = span
        if best is None:
            raise InputError("the context is empty: there is no answer in it")
        score, at, end = best
        return {"answer": context[at:end], "score": score, "start": at, "end": end}


def _best_span(
    window: Any, start_logits: Array, end_logits: Array, longest: int
) -> tuple[float, int, int] | None:
    """Probability of the best span of one window, and its characters in the context."""
    inside = np.array([i for i, s in enumerate(window.sequence_ids) if s == 1], np.int64)
    if not len(inside):
        return None
    # Probabilities over the context and the first token, for "not in this window".
    among = np.concatenate([[0], inside])
    starts = softmax(start_logits[among].astype(np.float64))[1:]
    ends = softmax(end_logits[among].astype(np.float64))[1:]
    both = starts[:, None] * ends[None, :] - np.tri(len(inside), k=-1)  # no end before its start
    both[np.triu_indices(len(inside), longest)] = -1
    i, j = np.unravel_index(int(both.argmax()), both.shape)
    offsets = window.offsets
    return float(both[i, j]), offsets[inside[i]][0], offsets[inside[j]][1]


def softmax(logits: Array) -> Array:
    """Over the last axis, without overflow."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def manifest_of(session: Session) -> Manifest:
    """The manifest of a session.

    Raises:
        ArtifactError: It was opened from a bare model.onnx.
    """
    if session.manifest is None:
        raise ArtifactError(
            "a task needs an artifact with a manifest", where=str(session.path.parent)
        )
    return session.manifest
