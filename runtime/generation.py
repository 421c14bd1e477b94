"""Prompts in, continuations out: greedy decoding over a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from ..errors import ArtifactError, InputError, UsageError
from .session import Session
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

    Graph: input_ids, attention_mask, position_ids and past_key_values in, logits and present
    out; `manifest.kv` names the cache. Settings: `eos_token_ids`, `pad_token_id`,
    `bos_token_id`, `context_length` (None: no limit), and `chat` (one user turn as text, with
    {prompt} in it).

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
        places = [
            {"layer": n, "part": part} for n in range(kv["layers"]) for part in ("key", "value")
        ]
        self._past = [kv["past"].format(**p) for p in places]
        self._outputs = ["logits", *(kv["present"].format(**p) for p in places)]
        self._heads, self._dim, self._dtype = kv["kv_heads"], kv["head_dim"], kv["dtype"]
        self._eos = np.array(self.setting("eos_token_ids"), np.int64)
        self._context: int = self.setting("context_length") or _ENDLESS

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
        """
        if max_new_tokens < 0:
            raise InputError(f"max_new_tokens must not be negative: {max_new_tokens}")
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        feeds = self._first(input_ids, mask)
        lengths = mask.sum(1)
        added: list[list[int]] = [[] for _ in lengths]
        active = np.ones(len(lengths), bool)
        run = self.session.run
        for step in range(max_new_tokens):
            # Plain run, outputs fed back as they are: on the CPU it was as fast as OrtValues and
            # faster than IO binding (30 layers, ms a token at past 16 / 512: 7.5 / 15.9, 7.4 /
            # 16.2, 7.8 / 17.8). A graph that concatenates its cache copies it either way; only
            # a cache of shared buffers would save that.
            out = run(feeds, self._outputs)
            tokens = out["logits"][:, -1].argmax(-1)
            active &= ~np.isin(tokens, self._eos)
            for row in np.flatnonzero(active):
                added[row].append(int(tokens[row]))
            # A row that is full has its last token, and stops; others go on.
            active &= lengths + step + 1 < self._context
            if not active.any():
                break
            mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], 1)
            # Rows that have stopped stay in the batch, at a position that the model has.
            positions = np.minimum(lengths + step, self._context - 1)
            feeds = {
                "input_ids": tokens.astype(np.int64)[:, None],
                "attention_mask": mask,
                "position_ids": positions[:, None],
                **{past: out[present] for past, present in self._cache()},
            }
            feeds = self.feeds(feeds)
            # What we made from a run that passed the check needs no check at every token.
            run = self.session.run_unchecked
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
        out = self.session.run(self._first(feeds["input_ids"], feeds["attention_mask"]), ["logits"])
        probabilities = softmax(out["logits"][0, -1].astype(np.float64))
        best = np.argsort(-probabilities, kind="stable")[:k]
        return [
            {
                "word": self.tokenizer.decode([i], special=True),
                "id": int(i),
                "probability": float(probabilities[i]),
            }
            for i in best
        ]

    def _first(self, input_ids: Array, mask: Array) -> dict[str, Array]:
        """The feeds of the first run: the whole prompts, and a cache of no tokens."""
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
        empty = np.zeros((len(mask), self._heads, 0, self._dim), self._dtype)
        return self.feeds(
            {
                "input_ids": input_ids,
                "attention_mask": mask,
                "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
                **dict.fromkeys(self._past, empty),
            }
        )

    def _cache(self) -> list[tuple[str, str]]:
        return list(zip(self._past, self._outputs[1:], strict=True))

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
