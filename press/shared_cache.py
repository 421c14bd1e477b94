"""Graphs with one buffer for past and present, held against graphs that join the two.

A graph with `layout: shared` in its manifest's `kv` (see FuseGroupQueryAttention) has inputs of its
own: tokens of a row lie one after the other in a buffer, padding is on the right, and how much of
the buffer is filled is told in numbers. Its reference takes a mask, and a cache that holds padding
too. `as_concat` translates, so that one check serves both; `seen_alone` takes out of the check what
the mask hides, for there is nothing to compare: a shared buffer has no place for padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ..exporter import Reference

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Run = Callable[[dict[str, Array]], Mapping[str, Array]]


def as_concat(run: Run, kv: Mapping[str, Any]) -> Callable[[Feeds], dict[str, Array]]:
    """Run a shared-cache graph with the feeds and the outputs of the graph that it was made of.

    The real tokens of each row move to the front, those of its cache as well; buffers have room for
    all of them. Several new tokens after a cache run row by row, for the kernel takes no batch of
    them; everything else runs as one batch, rows of different lengths together.

    Where a layer has a window, the real tokens of a row have to be next to each other, as padding
    on the left or on the right leaves them: a window counts the padding between two tokens in the
    one graph, and not in the other.

    Args:
        run: Feeds of the shared graph to all of its outputs, in its order.
        kv: `Manifest.kv` of the shared graph: layers, the dtype and the names of the cache, of the
            lengths and of the total, and the window.

    Returns:
        A function of input_ids (batch, sequence), attention_mask (batch, past + sequence; none
        hides nothing), position_ids where the graph reads them, and caches of (batch, kv_heads,
        past, head_dim) to logits (batch, sequence, vocabulary) and caches of past + sequence. What
        the mask hides is NaN in all of them.
    """
    return _Adapter(run, kv)


def seen_alone(reference: Reference) -> Reference:
    """A reference that says NaN of logits and caches where its mask hides the token.

    NaN is what `exporter.check` counts as undefined and does not compare. The first output has to
    be logits, all others caches.
    """

    def seen(feeds: dict[str, Array]) -> list[Array]:
        ids, mask = feeds["input_ids"], feeds.get("attention_mask")
        found = reference.run(feeds)
        if mask is None:
            return list(found)
        hidden = np.asarray(mask) == 0
        logits, *caches = (np.array(a) for a in found)
        logits[hidden[:, hidden.shape[1] - ids.shape[1] :]] = np.nan
        for cache in caches:
            cache.swapaxes(1, 2)[hidden] = np.nan
        return [logits, *caches]

    return replace(reference, run=seen)


@dataclass(frozen=True)
class _Rows:
    """What runs together.

    Attributes:
        rows: Which rows of the batch.
        length: How many tokens of each are fed; rows with fewer are filled up.
    """

    rows: list[int]
    length: int


class _Adapter:
    """See `as_concat`."""

    def __init__(self, run: Run, kv: Mapping[str, Any]) -> None:
        self.run = run
        places = [(n, part) for n in range(kv["layers"]) for part in ("key", "value")]
        past, present = ([kv[way].format(layer=n, part=p) for n, p in places] for way in _WAYS)
        self.past_of: dict[str, str] = dict(zip(present, past, strict=True))
        self.lengths, self.total = kv["lengths"], kv["total"]
        self.dtype = kv["dtype"]
        self.least = int(kv.get("window") or 1)

    def __call__(self, feeds: Feeds) -> dict[str, Array]:
        ids = feeds["input_ids"]
        caches = {name: feeds[name] for name in self.past_of.values()}
        past = next(iter(caches.values())).shape[2]
        shape = (len(ids), past + ids.shape[1])
        mask = np.asarray(feeds.get("attention_mask", np.ones(shape))) != 0
        made: dict[str, Array] = {}
        for group in _groups(mask[:, :past].sum(1), mask[:, past:].sum(1)):
            out = self.run(self._feeds(feeds, mask, past, group))
            for name, value in out.items():
                if name not in made:
                    made[name] = self._blank(name, value, feeds, shape)
                self._scatter(made[name], value, mask, past, group, cache=name in self.past_of)
        return made

    def _feeds(self, feeds: Feeds, mask: Array, past: int, group: _Rows) -> dict[str, Array]:
        rows, length = group.rows, group.length
        before, new = mask[rows, :past], mask[rows, past:]
        found = {}
        for name, value in feeds.items():
            if name in ("input_ids", "position_ids"):
                found[name] = np.zeros((len(rows), length), value.dtype)
                for to, row, seen in zip(found[name], rows, new, strict=True):
                    to[: seen.sum()] = value[row, seen]
        # A row without a token gets one of no meaning: no row may be empty.
        totals = before.sum(1) + np.maximum(new.sum(1), 1)
        capacity = max(int(totals.max()), length, self.least)
        for name in self.past_of.values():
            value = feeds[name]
            heads, size = value.shape[1], value.shape[3]
            found[name] = np.zeros((len(rows), heads, capacity, size), self.dtype)
            for to, row, seen in zip(found[name], rows, before, strict=True):
                to[:, : seen.sum()] = value[row][:, seen]
        found[self.lengths] = (totals - 1).astype(np.int32)
        found[self.total] = np.array([totals.max()], np.int32)
        return found

    def _blank(self, name: str, like: Array, feeds: Feeds, shape: tuple[int, int]) -> Array:
        if name in self.past_of:
            sizes: tuple[int, ...] = (shape[0], like.shape[1], shape[1], like.shape[3])
        else:
            sizes = (*feeds["input_ids"].shape, *like.shape[2:])
        return np.full(sizes, np.nan, like.dtype)

    @staticmethod
    def _scatter(
        to: Array, value: Array, mask: Array, past: int, group: _Rows, *, cache: bool
    ) -> None:
        for row, found in zip(group.rows, value, strict=True):
            seen = mask[row] if cache else mask[row, past:]
            if cache:
                to[row][:, seen] = found[:, : seen.sum()]
            else:
                to[row, seen] = found[: seen.sum()]


_WAYS = ("past", "present")


def _groups(before: Sequence[int], new: Sequence[int]) -> Iterator[_Rows]:
    """Which rows run together: first prompts, single tokens, and each chunk by itself."""
    rows = list(range(len(new)))
    if not any(before):
        yield _Rows(rows, max(*new, 1))
    elif max(new, default=0) <= 1:
        yield _Rows(rows, 1)
    else:
        yield from (_Rows([row], max(int(new[row]), 1)) for row in rows)
