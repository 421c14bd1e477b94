"""Text in one language in, text in another out: greedy decoding of an encoder-decoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError
from .session import Session
from .signature import Array
from .tasks import TextTask


class Translator(TextTask):
    """Translates texts with an encoder-decoder in one graph.

    The graph takes input_ids, attention_mask and decoder_input_ids, and gives logits (batch,
    target, vocab). Encoder and decoder are computed again for every token: the cost grows with
    the square of the length. There is no cache yet.

    Settings: `decoder_start_token_id`, `eos_token_ids`, `pad_token_id`, `max_length`, and where
    the model needs them `forced_bos_token_id` (the first token, such as the language) and
    `suppress_token_ids` (never chosen; Marian's padding).
    """

    def __init__(self, session: Session, *, truncate: bool = True) -> None:
        super().__init__(session, truncate=truncate)
        self._eos = np.array(self.setting("eos_token_ids"), np.int64)
        self._start: int = self.setting("decoder_start_token_id")
        self._forced: int | None = self.setting("forced_bos_token_id", None)
        self._suppress = self.setting("suppress_token_ids", None) or []

    def translate(
        self, texts: str | Sequence[str], *, max_new_tokens: int = 128, batch_size: int = 8
    ) -> list[str]:
        """The translation of each text, in order; the likeliest token at every step.

        Raises:
            InputError: An item is no str, or too long where the translator does not truncate.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        tokens = self.tokenizer.encode(texts)
        found = [""] * len(tokens)
        for rows, feeds in self.batches(tokens, batch_size):
            for row, ids in zip(rows, self._decode(feeds, max_new_tokens), strict=True):
                found[row] = self.tokenizer.decode(ids)
        return found

    def _decode(self, feeds: dict[str, Array], max_new_tokens: int) -> list[list[int]]:
        rows = len(feeds["input_ids"])
        target = np.full((rows, 1), self._start, np.int64)
        added: list[list[int]] = [[] for _ in range(rows)]
        active = np.ones(rows, bool)
        for step in range(max_new_tokens):
            target_feeds = {
                "decoder_input_ids": target,
                "decoder_attention_mask": np.ones_like(target),
            }
            out = self.session.run({**feeds, **self.feeds(target_feeds)}, ["logits"])
            logits = out["logits"][:, -1]
            logits[:, self._suppress] = -np.inf
            chosen = logits.argmax(-1).astype(np.int64)
            if step == 0 and self._forced is not None:
                chosen[:] = self._forced
            active &= ~np.isin(chosen, self._eos)
            for row in np.flatnonzero(active):
                added[row].append(int(chosen[row]))
            if not active.any():
                break
            target = np.concatenate([target, chosen[:, None]], 1)
        return added
