"""Prompts in, continuations out: greedy decoding over a key-value cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypedDict

import numpy as np

from ..errors import ArtifactError, InputError, UsageError
from .session import Session
from .shared_cache import SharedCache, SharedRows
from .signature import Array
from .tasks import TextTask, softmax
from .tokenization import Tokens

_ENDLESS = int(np.iinfo(np.int64).max)  # the context of a model that has no positions to run out


class Word(TypedDict):
    """One possible next token: its text, its id and its probability."""

    word: str
    id: int
    probability: float


class Generator(TextTask):
    """Continues texts, token by token.

    Graph: input_ids, position_ids and past_key_values in, logits and present out, and the
    attention_mask, or in the layout "shared" the rows' lengths; `manifest.kv` names the cache and
    its layout. A graph of that layout may also have an output `next_token`, int64 (batch,): the
    likeliest id after each row, so that a step copies no logits to the host. Settings:
    `eos_token_ids`, `pad_token_id`, `bos_token_id`, `context_length` (None: no limit), and `chat`
    (one user turn as text, with {prompt} in it).

    In the layout "shared" the cache is kept between calls: at most twice what the largest batch
    took, which is 2 x layers x kv_heads x head_dim numbers a token, for as many tokens as the
    longest prompt and `max_new_tokens` make, rounded up to a power of two or to the context.

    Raises:
        ArtifactError: The manifest says nothing of the cache, or lacks a setting.
    """

    limited = False  # a prompt that is cut would be answered wrongly: too long is an error

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.tokenizer.left = True
        kv = self.manifest.kv
        if kv is None:
            raise ArtifactError(
                "the manifest has no `kv`: it does not say what the cache of the graph is",
                where=str(session.path.parent),
            )
        self._kv = kv
        self._eos = np.array(self.setting("eos_token_ids"), np.int64)
        self._context: int = self.setting("context_length") or _ENDLESS
        self._shared: SharedCache | None = None
        if kv.get("layout") == "shared":
            self._shared = SharedCache(session, kv, limit=self._context)

    def feeds(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """All of the arrays: a layout without an attention mask still has to know the padding."""
        return arrays

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = 32,
        chat: bool = False,
        batch_size: int = 8,
    ) -> list[str]:
        """What the model says after each prompt, without the prompt, in order.

        It always takes the likeliest token. It stops at the end-of-text token, after
        `max_new_tokens`, or where the context is full.

        Args:
            prompts: The prompts; one str is a list of one.
            max_new_tokens: Most tokens to add.
            chat: Put each prompt into the model's chat turn first.
            batch_size: Prompts decoded together.

        Raises:
            InputError: A prompt is no str, fills the context, or is empty for a model without
                a begin-of-text token.
            UsageError: `chat` for a model that has no chat turn.
        """
        tokens = self._encode(prompts, chat=chat)
        texts = [""] * len(tokens)
        for rows, feeds in self.batches(tokens, batch_size):
            added = self.generate_ids(
                feeds["input_ids"], feeds["attention_mask"], max_new_tokens=max_new_tokens
            )
            for row, ids in zip(rows, added, strict=True):
                texts[row] = self._text(tokens[row], ids)
        return texts

    def generate_ids(
        self, input_ids: Array, attention_mask: Array | None = None, *, max_new_tokens: int = 32
    ) -> list[list[int]]:
        """The ids added to each row, without the end-of-text token.

        Args:
            input_ids: int64 (batch, sequence), padded on the left.
            attention_mask: int64 (batch, sequence), 0 for padding; None for no padding.
            max_new_tokens: Most ids to add to a row.

        Raises:
            InputError: A row is empty or fills the context, or the arrays do not fit the graph.
            OnnxpressError: There is no memory for the cache; it says how much that takes.
        """
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens must not be negative: {max_new_tokens}")
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check(input_ids, mask)
        lengths = mask.sum(1)
        added: list[list[int]] = [[] for _ in lengths]
        if not added or not max_new_tokens:
            return added
        active = np.ones(len(lengths), bool)
        with self._rows(input_ids, mask, max_new_tokens) as rows:
            tokens = rows.first()
            for step in range(1, max_new_tokens + 1):
                active &= ~np.isin(tokens, self._eos)
                for row in np.flatnonzero(active):
                    added[row].append(int(tokens[row]))
                # A row that is full has its last token, and stops; others go on.
                active &= lengths + step < self._context
                if step == max_new_tokens or not active.any():
                    break
                tokens = rows.next(tokens, active)
        return added

    def next_word(self, prompt: str, k: int = 5) -> list[Word]:
        """The k likeliest next tokens after one prompt, likeliest first.

        Raises:
            InputError: The prompt is no str, or too long; or k is below 1.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, not {k}")
        if not isinstance(prompt, str):
            raise InputError(f"the prompt is no str, but {type(prompt).__name__}")
        feeds = self.tokenizer.pad(self._encode(prompt))
        input_ids, mask = feeds["input_ids"], feeds["attention_mask"]
        self._check(input_ids, mask)
        with self._rows(input_ids, mask, 1) as rows:
            probabilities = softmax(rows.scores()[0].astype(np.float64))
        best = np.argsort(-probabilities, kind="stable")[:k]
        return [
            {
                "word": self.tokenizer.decode([i], special=True),
                "id": int(i),
                "probability": float(probabilities[i]),
            }
            for i in best
        ]

    def _check(self, input_ids: Array, mask: Array) -> None:
        """Refuse prompts that are empty, fill the context, or are padded on the right."""
        if input_ids.ndim != 2 or input_ids.shape != mask.shape:
            raise InputError(
                f"input_ids and attention_mask must both be (batch, sequence); they are "
                f"{list(input_ids.shape)} and {list(mask.shape)}"
            )
        lengths = mask.sum(1)
        for row in np.flatnonzero((lengths == 0) | (lengths >= self._context)):
            if lengths[row]:
                raise InputError(
                    f"prompt {row} of the batch has {lengths[row]} tokens; the context of "
                    f"{self._context} leaves no room to answer",
                    hint="shorten the prompt",
                )
            raise InputError(f"prompt {row} of the batch has no tokens")
        if len(mask) and not mask[:, -1].all():
            raise InputError("the rows must be padded on the left: each ends in a real token")

    def _rows(
        self, input_ids: Array, mask: Array, new_tokens: int
    ) -> AbstractContextManager[_ConcatRows | SharedRows]:
        if self._shared:
            return self._shared.rows(input_ids, mask, new_tokens)
        return nullcontext(_ConcatRows(self.session, self._kv, input_ids, mask, self._context))

    def _encode(self, prompts: str | Sequence[str], *, chat: bool = False) -> list[Tokens]:
        if chat:
            turn = self.setting("chat", None)
            if not turn:
                raise UsageError(
                    "the artifact has no chat turn",
                    hint="press it with transformers installed, if it has a chat template",
                )
            prompts = [prompts] if isinstance(prompts, str) else prompts
            prompts = [turn.replace("{prompt}", str(p)) for p in prompts]
        # A chat turn spells its special tokens out.
        tokens = self.tokenizer.encode(prompts, special=not chat)
        bos = self.setting("bos_token_id", None)
        for i, t in enumerate(tokens):
            if not len(t):
                if bos is None:
                    raise InputError(f"prompt {i} is empty, and the model has no begin-of-text")
                tokens[i] = Tokens([bos], [0])
        return tokens

    def _text(self, prompt: Tokens, ids: list[int]) -> str:
        # Some tokenizers drop the space before a first token: decode it behind its prompt.
        before = self.tokenizer.decode(prompt.ids)
        both = self.tokenizer.decode([*prompt.ids, *ids])
        return both[len(before) :] if both.startswith(before) else self.tokenizer.decode(ids)


class _ConcatRows:
    """One call over a cache that every run takes, and gives back longer by its tokens.

    Plain runs, their outputs fed back as they are: on the CPU that was as fast as OrtValues and
    faster than IO binding (30 layers, ms a token at past 16 / 512: 7.5 / 15.9, 7.4 / 16.2, 7.8 /
    17.8). A graph that concatenates its cache copies it either way.
    """

    def __init__(
        self, session: Session, kv: Mapping[str, Any], input_ids: Array, mask: Array, context: int
    ) -> None:
        self._session, self._mask, self._context = session, mask, context
        self._names = {i.name for i in session.inputs}
        self._held = mask.sum(1)
        places = [{"layer": n, "part": p} for n in range(kv["layers"]) for p in ("key", "value")]
        self._cache = [(kv["past"].format(**p), kv["present"].format(**p)) for p in places]
        empty = np.zeros((len(mask), kv["kv_heads"], 0, kv["head_dim"]), kv["dtype"])
        positions = np.maximum(mask.cumsum(1) - 1, 0)
        self._past = dict.fromkeys([past for past, _ in self._cache], empty)
        self._feeds = self._fed(input_ids, positions)

    def scores(self) -> Array:
        """Run the prompts: the logits behind the last token of each, (batch, vocabulary)."""
        return self._session.run(self._feeds, ["logits"])["logits"][:, -1]

    def first(self) -> Array:
        """Run the prompts: the likeliest next id of each, int64 (batch,)."""
        return self._likeliest(self._session.run(self._feeds, self._outputs()))

    def next(self, tokens: Array, active: Array) -> Array:
        """Add a token to each row: the likeliest id to follow, int64 (batch,).

        Args:
            tokens: int64 (batch,), what was chosen last.
            active: Read by nothing: a row that has stopped grows on with the others.
        """
        self._mask = np.concatenate([self._mask, np.ones((len(tokens), 1), np.int64)], 1)
        # Rows that have stopped stay at a position that the model has.
        feeds = self._fed(tokens[:, None], np.minimum(self._held, self._context - 1)[:, None])
        self._held = self._held + 1
        # What we made from a run that passed the check needs no check at every token.
        return self._likeliest(self._session.run_unchecked(feeds, self._outputs()))

    def _fed(self, ids: Array, positions: Array) -> dict[str, Array]:
        feeds = {"input_ids": ids, "attention_mask": self._mask, "position_ids": positions}
        feeds |= self._past
        return {name: array for name, array in feeds.items() if name in self._names}

    def _outputs(self) -> list[str]:
        return ["logits", *(present for _, present in self._cache)]

    def _likeliest(self, out: dict[str, Array]) -> Array:
        self._past = {past: out[present] for past, present in self._cache}
        return np.asarray(out["logits"][:, -1].argmax(-1))
