"""Text to ids and back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from ..errors import ArtifactError, InputError
from .signature import Array

TOKENIZER = "tokenizer.json"
_CHUNK = 1024  # texts whose Encoding objects (large) live at the same time


class TruncationWarning(UserWarning):
    """Texts were longer than the model takes, and were cut."""


class Tokens:
    """The ids and token types of one text, as int64 arrays."""

    __slots__ = ("ids", "types")

    def __init__(self, ids: Sequence[int], types: Sequence[int]) -> None:
        self.ids = np.array(ids, np.int64)
        self.types = np.array(types, np.int64)

    def __len__(self) -> int:
        return len(self.ids)


class Tokenizer:
    """tokenizer.json of an artifact, its length limit set once; safe to use from many threads.

    Args:
        directory: The artifact directory.
        max_length: Most tokens of one text, special tokens included; None for no limit.
        truncate: Cut longer texts and warn once a call. False refuses them.
        pad_id: The id that fills short rows.
        left: Pad on the left, as generation needs it: the last column is then the last token.

    Raises:
        ArtifactError: There is no tokenizer.json, or it is damaged.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_length: int | None = None,
        truncate: bool = True,
        pad_id: int = 0,
        left: bool = False,
    ) -> None:
        self.max_length, self.truncate = max_length, truncate
        self.pad_id, self.left = pad_id, left
        self._tokenizer = open_tokenizer(directory)
        if max_length is not None:
            # The library cuts, so that the special tokens at the end stay.
            self._tokenizer.enable_truncation(max_length)

    def encode(self, texts: str | Sequence[str], *, special: bool = True) -> list[Tokens]:
        """The tokens of each text; an empty text is its special tokens only.

        Args:
            texts: The texts; one str is a list of one.
            special: Add the special tokens of the tokenizer ([CLS], <s>, ...).

        Raises:
            InputError: An item is no str, or too long where `truncate` is False.
        """
        texts = check_texts(texts)
        tokens: list[Tokens] = []
        cut: list[int] = []
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            encodings = self._tokenizer.encode_batch_fast(chunk, add_special_tokens=special)
            for i, e in enumerate(encodings, start):
                if e.overflowing:
                    cut.append(_full_length(e))
                    if not self.truncate:
                        raise InputError(
                            f"text {i} has {cut[-1]} tokens; the model takes {self.max_length}",
                            hint="shorten it, or let it be cut: truncate=True, no --no-truncate",
                        )
                tokens.append(Tokens(e.ids, e.type_ids))
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(texts)} texts were cut to {self.max_length} tokens; "
                f"the longest has {max(cut)}",
                TruncationWarning,
                stacklevel=3,
            )
        return tokens

    def pad(self, tokens: Sequence[Tokens]) -> dict[str, Array]:
        """input_ids, attention_mask and token_type_ids, int64 (batch, longest)."""
        return pad(tokens, pad_id=self.pad_id, left=self.left)

    def special_tokens(self, *, pair: bool = False) -> int:
        """How many special tokens a text gets, or a pair of texts."""
        return int(self._tokenizer.num_special_tokens_to_add(pair))

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ids; special tokens are left out unless `special`."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special))


def pad(tokens: Sequence[Tokens], *, pad_id: int, left: bool = False) -> dict[str, Array]:
    """Rows of the same length, as the feeds input_ids, attention_mask and token_type_ids."""
    # A graph is not asked to take a text of no tokens: one column of padding stands for it.
    shape = (len(tokens), max([1, *map(len, tokens)]))
    ids, mask, types = np.full(shape, pad_id, np.int64), *np.zeros((2, *shape), np.int64)
    for row, t in enumerate(tokens):
        at = slice(shape[1] - len(t), None) if left else slice(0, len(t))
        ids[row, at], mask[row, at], types[row, at] = t.ids, 1, t.types
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def open_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """tokenizer.json without the padding and the truncation that it may ask for."""
    path = Path(directory) / TOKENIZER
    if not path.is_file():
        raise ArtifactError(
            "the artifact has no tokenizer.json, and its task works on text",
            where=str(path),
            hint="press it again with its tokenizer, or open model.onnx with runtime.Session",
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare Exception
        raise ArtifactError(f"tokenizer.json cannot be read: {e}", where=str(path)) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def check_texts(texts: str | Sequence[str], *, what: str = "text") -> list[str]:
    """The texts as a list; one str is a list of one.

    Raises:
        InputError: An item is no str, or holds half of a surrogate pair.
    """
    texts = [texts] if isinstance(texts, str) else texts
    try:
        texts = list(texts)
    except TypeError:
        raise InputError(f"{what}s must be a list of str, not {type(texts).__name__}") from None
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"{what} {i} is no str, but {type(text).__name__}: {text!r:.60}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise InputError(
                    f"{what} {i} is no valid text: {e.reason} at {e.start}",
                    hint="decode its bytes with errors='replace'",
                ) from None
    return texts


def _full_length(e: Any) -> int:
    special = sum(e.special_tokens_mask)
    parts = [e, *e.overflowing]
    return int(special + sum(len(p.ids) - sum(p.special_tokens_mask) for p in parts))
