"""What calibration and the gate run on: real texts, ragged and padded, and never random tokens.

records.py reads what the user gave; texts/ holds a small set of our own for each task that takes
text. Three sets never share an example where there are enough of them: ranges are taken from the
first, choices (smoothing, layers left in float) are made on the second, and the gate judges on the
third, which nothing before it has seen.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..artifact import TensorSpec
from ..errors import InputError, UsageError
from ..runtime import Answerer, Embedder, Generator, Session, Translator, TruncationWarning, task_of
from ..runtime.signature import Array
from ..runtime.tasks import TextTask, manifest_of
from ..runtime.tokenization import Tokens
from .records import FORMS, Records, for_task, load

TEXTS = Path(__file__).with_name("texts")
MOST_TOKENS = 256  # of a text that a language model reads: its logits are as many vocabularies
MOST_SOURCE, MOST_TARGET = 128, 32  # of a translation, each word of which is a run of the graph

Feeds = dict[str, Array]


# Sets of records -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sets:
    """The examples of each use, as the task takes them.

    Attributes:
        calibration: What ranges, importances and biases are taken from.
        search: What choices are made on.
        evaluation: What the gate judges on.
        notes: What the user should know of them.
    """

    calibration: Records
    search: Records
    evaluation: Records
    notes: tuple[str, ...] = ()


def prepare(
    task: str,
    inputs: Sequence[TensorSpec] = (),
    *,
    calibration: str | os.PathLike[str] | None = None,
    evaluation: str | os.PathLike[str] | None = None,
) -> Sets:
    """Read what the user gave, or take our own sets, and keep the three uses apart.

    Args:
        task: embed, classify, answer, generate, translate or tensors.
        inputs: Of the graph; needed for tensors.
        calibration: The user's file, or None.
        evaluation: The user's file for the gate, or None: then it is held out of `calibration`,
            and where that is None too it is the default evaluation set.

    Raises:
        InputError: A file that cannot be read, or that does not suit the task.
        UsageError: There is no default set for the task, or nothing is left to judge on.
    """
    given = None if calibration is None else for_task(load(calibration), task, inputs)
    judged = None if evaluation is None else for_task(load(evaluation), task, inputs)
    notes = []
    # One example cannot be divided; what a graph of tensors takes, nobody else knows.
    single = given is not None and len(set(map(_key, given.items))) == 1 and task != "tensors"
    if judged is None and (given is None or single):
        judged = default_set(task, "eval")
        notes.append(f"no --eval: the gate judges on {judged.where}, {len(judged)} examples")
    if given is None:
        given = default_set(task, "calibration")
        notes.append(f"no --calibration: it uses {given.where}, {len(given)} examples")
    sets = split(given, judged)
    return replace(sets, notes=(*notes, *sets.notes))


def default_set(task: str, which: Literal["calibration", "eval"]) -> Records:
    """Our own small set for a task: 128 texts for calibration and 96 for the gate (`which` is
    "calibration" or "eval"), on other subjects; for answer 16 and 16 questions with contexts.

    Raises:
        UsageError: The task is tensors: nobody but the user knows what its inputs mean.
    """
    if task == "tensors":
        raise UsageError(
            "there is no default calibration data for the task tensors: only you know what its "
            "inputs are, and random numbers would calibrate it for nothing that it ever meets",
            hint=f"give --calibration (and --eval): {FORMS}",
        )
    found = load(TEXTS / f"{'answer_' if task == 'answer' else ''}{which}.jsonl")
    where = "the default calibration set" if which == "calibration" else "the default eval set"
    places = tuple(f"{where}, line {n}" for n in range(1, len(found) + 1))
    return for_task(Records(where, found.items, found.sha256, places), task)


def split(calibration: Records, evaluation: Records | None = None) -> Sets:
    """Keep the uses apart: one example in four of `calibration` is for the search.

    Without `evaluation`, one in four is held out for the gate before that. Always the same ones,
    spread over the file. An example that calibration has too is left out of the evaluation, and
    one that calibration has twice counts once.

    Raises:
        InputError: Every example of the evaluation is one of calibration too.
    """
    notes: list[str] = []
    first: dict[Any, int] = {}
    for i, item in enumerate(calibration.items):
        first.setdefault(_key(item), i)
    rows = list(first.values())
    if len(rows) < len(calibration):
        twice = len(calibration) - len(rows)
        notes.append(f"{calibration.where}: {twice} examples were there twice and count once")
    if evaluation is None:
        kept, held = _quarter(rows)
        evaluation = calibration.some(held, f"a quarter of {calibration.where}, held out")
        notes.append(
            f"no --eval: the gate judges on {len(held)} of the {len(rows)} examples of "
            f"{calibration.where}"
        )
        if not kept:
            evaluation = calibration.some(held)
            notes.append("the one example is calibrated on, too: the gate proves little")
        rows = kept or held
    else:
        fresh = [i for i, item in enumerate(evaluation.items) if _key(item) not in first]
        if not fresh:
            raise InputError(
                "every example to judge on is one of calibration too: the gate would prove nothing",
                where=evaluation.where,
                hint="give other examples with --eval, or leave it out: a quarter is held out then",
            )
        if len(fresh) < len(evaluation):
            known = len(evaluation) - len(fresh)
            notes.append(f"{evaluation.where}: {known} examples are of calibration and left out")
            evaluation = evaluation.some(fresh)
    kept, searched = _quarter(rows)
    if not kept:
        kept = searched
        notes.append(f"{calibration.where} leaves one example to calibrate on; ranges need more")
    return Sets(calibration.some(kept), calibration.some(searched), evaluation, tuple(notes))


def _quarter(rows: list[int]) -> tuple[list[int], list[int]]:
    """Three quarters and one; of fewer than four the last one is the quarter."""
    step = min(4, len(rows))
    held = rows[step - 1 :: step] if step == 4 else rows[-1:]
    return [i for i in rows if i not in set(held)], held


def _key(item: Any) -> Any:
    """What makes two examples the same; spaces and case do not make them others."""
    if isinstance(item, str):
        return " ".join(item.split()).casefold()
    parts = sorted(item.items())
    if all(isinstance(value, str) for _, value in parts):
        return tuple((name, _key(value)) for name, value in parts)
    arrays = [(name, np.asarray(value)) for name, value in parts]
    return tuple((n, a.dtype.name, a.shape, sha256(a.tobytes()).digest()) for n, a in arrays)


# Feeds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One run of the graph.

    Attributes:
        records: The number of the record that each row is of; for tensors the one record.
        feeds: The arrays that the graph takes.
        positions: For each row, those of its logits that count: of an answer the first token and
            the context, of a language model the real tokens. Empty for the other tasks.
        targets: For each row of a language model, the token that truly follows at the first of
            those positions, and on.
    """

    records: tuple[int, ...]
    feeds: Feeds
    positions: tuple[Array, ...] = ()
    targets: tuple[Array, ...] = ()


def feeds_of(session: Session, records: Records, batch_size: int = 8) -> list[Feeds]:
    """The arrays that the graph takes for the records; `real_tokens` says which are no padding.

    See `batches`.
    """
    return [batch.feeds for batch in batches(session, records, batch_size)]


def real_tokens(feeds: Mapping[str, Array]) -> Array | None:
    """Which tokens are no padding, bool (batch, sequence); None where the graph has no mask.

    None of an encoder-decoder, too, whose values are of either side.
    """
    mask = feeds.get("attention_mask")
    if "decoder_input_ids" in feeds:  # a value of the decoder may have the encoder's shape
        return None
    return None if mask is None or mask.ndim != 2 else mask.astype(bool)


def batches(session: Session, records: Records, batch_size: int = 8) -> list[Batch]:
    """The runs of a graph over the records, by its task and with its own tokenizer.

    Lengths are mixed on purpose, so that there is padding, as there is when it is used; one
    record in eight runs alone, without any. Texts are cut to what the model takes: generate to
    256 tokens with an empty cache, translate to 128, with the first 32 tokens of the reference's
    own translation for the decoder. An answer is as many rows as its context has windows.

    Args:
        session: The reference: its manifest says the task, its directory has the tokenizer.
        records: Texts, pairs or arrays.
        batch_size: Most rows of a run.

    Raises:
        InputError: A record that the task does not take.
    """
    task = manifest_of(session).task
    records = for_task(records, task, session.inputs)
    if task == "tensors":
        return [Batch((i,), item) for i, item in enumerate(records.items)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        makers = {"answer": _Windows, "generate": _Reader, "translate": _Teacher}
        made = makers[task](session) if task in makers else task_of(session, task)
        assert isinstance(made, TextTask)
        rows = list(_rows(made, records))
        return [_batch(made, [rows[i] for i in few]) for few in _mixed(len(rows), batch_size)]


def _mixed(count: int, batch_size: int) -> Iterator[list[int]]:
    """Row numbers of each batch: one in eight alone, the others together in no order of length."""
    order = np.random.default_rng(0).permutation(count).tolist()
    alone = max(1, count // 8)
    yield from ([i] for i in order[:alone])
    for start in range(alone, count, batch_size):
        yield order[start : start + batch_size]


_Row = tuple[int, Tokens, Array]  # the record, its tokens, and the positions that count


def _rows(task: TextTask, records: Records) -> Iterator[_Row]:
    for i, (item, place) in enumerate(zip(records.items, records.places, strict=True)):
        try:
            if isinstance(task, _Windows):
                found = task.windows(item["question"], item["context"])
            elif isinstance(task, _Reader | _Teacher):
                found = [(tokens, np.arange(len(tokens))) for tokens in task.tokens(item)]
            else:
                prompt = task.setting("prompt", None) if isinstance(task, Embedder) else None
                encoded = task.tokenizer.encode(f"{prompt or ''}{item}")
                found = [(tokens, np.arange(0)) for tokens in encoded]
        except InputError as e:
            raise InputError(f"record {i + 1}: {e.what}", where=place, hint=e.hint) from None
        for tokens, positions in found:
            if not len(tokens):
                raise InputError(f"record {i + 1} has no tokens", where=place)
            yield i, tokens, positions


def _batch(task: TextTask, rows: Sequence[_Row]) -> Batch:
    arrays = task.tokenizer.pad([tokens for _, tokens, _ in rows])
    records = tuple(record for record, *_ in rows)
    if isinstance(task, _Reader):
        mask = arrays["attention_mask"]
        real = tuple(np.flatnonzero(row) for row in mask)
        ids = tuple(tokens.ids[1:] for _, tokens, _ in rows)
        return Batch(records, task.first(arrays["input_ids"], mask), real, ids)
    feeds = task.feeds(arrays)
    if isinstance(task, _Teacher):
        more, targets = task.forced(feeds)
        at = tuple(np.arange(len(ids) + 1) for ids in targets)
        return Batch(records, {**feeds, **more}, at, targets)
    return Batch(records, feeds, tuple(positions for *_, positions in rows))


class _Windows(Answerer):
    """The windows in which an answerer reads a context."""

    def windows(self, question: str, context: str) -> list[tuple[Tokens, Array]]:
        """The tokens of each, and where its first token and the context stand."""
        asked = len(self.tokenizer.encode(question, special=False)[0])
        if self._room - asked <= self._stride:  # the library would panic
            raise InputError("the question leaves no room for the context")
        first = self._windows.encode(question, context)
        found = []
        for w in (first, *first.overflowing):
            inside = [i for i, s in enumerate(w.sequence_ids) if s == 1]
            found.append((Tokens(w.ids, w.type_ids), np.array([0, *inside], np.int64)))
        return found


class _Reader(Generator):
    """A language model that reads a text once, from an empty cache."""

    def tokens(self, text: str) -> list[Tokens]:
        """The text, cut to `MOST_TOKENS` and to less than the context."""
        most = min(MOST_TOKENS, self._context - 1)
        return [_cut(t, most, 0) for t in self._encode(text)]

    def first(self, input_ids: Array, mask: Array) -> Feeds:
        """The feeds of that one run; its cache is empty, and grows by concatenation."""
        kv = self.manifest.kv
        assert kv is not None
        places = [{"layer": n, "part": p} for n in range(kv["layers"]) for p in ("key", "value")]
        empty = np.zeros((len(mask), kv["kv_heads"], 0, kv["head_dim"]), kv["dtype"])
        feeds: Feeds = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
            **dict.fromkeys((kv["past"].format(**p) for p in places), empty),
        }
        return {name: array for name, array in feeds.items() if name in self._names}


class _Teacher(Translator):
    """An encoder-decoder that is fed what it says itself."""

    def tokens(self, text: str) -> list[Tokens]:
        """The text, cut to `MOST_SOURCE`; the special token at its end stays."""
        return [_cut(t, MOST_SOURCE, 1) for t in self.tokenizer.encode(text)]

    def forced(self, feeds: Feeds) -> tuple[Feeds, tuple[Array, ...]]:
        """The decoder's feeds, its own greedy translation after the start, and those ids."""
        targets = [np.array(ids, np.int64) for ids in self._decode(feeds, MOST_TARGET)]
        shape = len(targets), 1 + max(map(len, targets))
        ids, mask = np.full(shape, self.tokenizer.pad_id, np.int64), np.zeros(shape, np.int64)
        for row, target in enumerate(targets):
            ids[row, 0], mask[row, : len(target) + 1] = self._start, 1
            ids[row, 1 : len(target) + 1] = target
        more = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        return self.feeds(more), tuple(targets)


def _cut(tokens: Tokens, most: int, last: int) -> Tokens:
    """At most so many tokens, of which so many are the last ones."""
    if len(tokens) <= most:
        return tokens
    kept = [*range(most - last), *range(len(tokens) - last, len(tokens))]
    return Tokens(tokens.ids[kept].tolist(), tokens.types[kept].tolist())
