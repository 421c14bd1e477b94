"""Decoding over one buffer a layer, which is the past and the present of every run."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np

from ..errors import OnnxpressError
from .binding import Binding
from .buffers import Buffer
from .session import Session
from .signature import Array

_SMALLEST = 64  # tokens; a buffer for fewer would soon be too small and save next to nothing
TOKEN = "next_token"  # the output of a graph that chooses the likeliest token itself


class SharedCache:
    """The buffers of a graph of the layout "shared", kept from one call to the next.

    Each layer has one buffer for its keys and one for its values, (batch, kv_heads, capacity,
    head_dim) on the session's device, bound as past and as present at once: the kernel of
    com.microsoft GroupQueryAttention writes each new token behind those of its row, and nothing
    is copied. Rows are padded on the right; `seqlens_k` says where each ends.

    Args:
        session: An open artifact whose manifest says `kv.layout: shared`.
        kv: `manifest.kv`: the names of the cache, and the shape of an entry.
        limit: Most tokens of a row, those of the prompt included.
    """

    def __init__(self, session: Session, kv: Mapping[str, Any], *, limit: int) -> None:
        self.session, self._kv, self._limit = session, kv, limit
        self._idle: list[_Lane] = []  # the longest unused first
        self._lock = threading.Lock()
        # While one thread captures a CUDA graph, no other may use the device.
        self._captured = session.cuda_graph
        self._turn: AbstractContextManager[object] = (
            threading.Lock() if self._captured else nullcontext()
        )

    @contextmanager
    def rows(self, input_ids: Array, mask: Array, new_tokens: int) -> Iterator[SharedRows]:
        """Buffers for these prompts and `new_tokens` more tokens a row, for one call.

        Args:
            input_ids: int64 (batch, sequence).
            mask: int64 (batch, sequence), 1 for the tokens of a prompt, wherever they stand.
            new_tokens: Most tokens that will be chosen for a row; the last of them is not kept.

        Raises:
            OnnxpressError: There is no memory for the buffers.
        """
        need = int(mask.sum(1).max(initial=1)) + max(new_tokens - 1, 0)
        with self._turn:
            lane = self._take(len(mask), min(need, self._limit))
            try:
                yield SharedRows(lane, input_ids, mask)
            finally:
                self._give_back(lane)

    def _take(self, batch: int, tokens: int) -> _Lane:
        with self._lock:
            fits = [a for a in self._idle if a.batch == batch and a.capacity >= tokens]
            if self._captured:  # a captured graph is replayed by the thread that made it
                fits = [a for a in fits if a.thread == threading.get_ident()]
            if fits:
                lane = min(fits, key=lambda a: a.capacity)
                self._idle.remove(lane)
                return lane
            # One that has become too small would not be used again.
            self._drop([a for a in self._idle if a.batch == batch and a.capacity < tokens])
        capacity = max(_SMALLEST, 1 << (tokens - 1).bit_length())
        # The kernel of a local window wants room for all of the window.
        capacity = max(min(capacity, self._limit), self._kv.get("window", 0))
        make = partial(_Lane, self.session, self._kv, batch, capacity, captured=self._captured)
        try:
            return make()
        except OnnxpressError:
            with self._lock:
                self._drop(self._idle)
        return make()

    def _give_back(self, lane: _Lane) -> None:
        with self._lock:
            self._idle.append(lane)
            # Batches of two sizes (the last of a list is often smaller) or two threads keep
            # theirs; what lies idle is never more than two of the largest.
            most = 2 * max(a.nbytes for a in self._idle)
            while sum(a.nbytes for a in self._idle) > most and not self._captured:
                self._drop(self._idle[:1])

    def _drop(self, lanes: Sequence[_Lane]) -> None:
        # What a graph was captured with stays for as long as the session, wanted or not.
        if not self._captured:
            gone = {id(a) for a in lanes}
            self._idle = [a for a in self._idle if id(a) not in gone]


class SharedRows:
    """One call: its prompts, and how far each row of the buffers is filled.

    Args:
        lane: The buffers; this call's alone until it ends.
        input_ids: int64 (batch, sequence).
        mask: int64 (batch, sequence), 1 for the tokens of a prompt.
    """

    def __init__(self, lane: _Lane, input_ids: Array, mask: Array) -> None:
        self._lane = lane
        self._held = mask.sum(1)  # tokens of each row in the cache after the next run
        # Real tokens to the front; no column is kept that is padding in every row, for which
        # the buffers need not have room.
        order = np.argsort(mask == 0, axis=1, kind="stable")[:, : self._held.max(initial=1)]
        self._ids = np.take_along_axis(input_ids, order, 1)

    def scores(self) -> Array:
        """Run the prompts: the logits behind the last token of each, (batch, vocabulary)."""
        return self._prompts("logits")

    def first(self) -> Array:
        """Run the prompts: the likeliest next id of each, int64 (batch,)."""
        return self._likeliest(self._prompts(self._lane.choice))

    def next(self, tokens: Array, active: Array) -> Array:
        """Add a token to each row that is active: the likeliest id to follow, int64 (batch,).

        The others idle: they write to the slot of their last token again, and grow no longer.

        Args:
            tokens: int64 (batch,), what was chosen last.
            active: bool (batch,), the rows that go on.
        """
        self._held = self._held + active
        return self._likeliest(self._lane.step(tokens, self._held))

    def _prompts(self, output: str) -> Array:
        """One row of `output` for each prompt."""
        lane, last, rows = self._lane, self._held - 1, np.arange(len(self._held))
        if output == TOKEN:
            return lane.prompts(self._ids, self._held, output)
        if not lane.on_host and lane.choice == output and self._ids.shape[1] > 1:
            # The logits of every position would go to the host, and one is wanted: the last
            # token of each row runs once more instead, into its own slot.
            lane.prompts(self._ids, self._held, None)
            return lane.step(self._ids[rows, last], self._held)
        out = lane.prompts(self._ids, self._held, output)
        # A graph may compute the logits of the last position only.
        return np.asarray(out[rows, np.minimum(last, out.shape[1] - 1)])

    def _likeliest(self, out: Array) -> Array:
        return out.copy() if out.ndim == 1 else np.asarray(out.argmax(-1))


class _Lane:
    """The buffers of one call at a time: the cache, and the feeds and the output of one step.

    What a step touches keeps its address for as long as the lane lives: a captured CUDA graph
    reads and writes nothing else.
    """

    def __init__(
        self,
        session: Session,
        kv: Mapping[str, Any],
        batch: int,
        capacity: int,
        *,
        captured: bool,
    ) -> None:
        self.session, self.batch, self.capacity = session, batch, capacity
        self._captured = captured
        self.thread = threading.get_ident()
        self._lengths, self._total = kv["lengths"], kv["total"]
        shape = (batch, kv["kv_heads"], capacity, kv["head_dim"])
        places = [{"layer": n, "part": p} for n in range(kv["layers"]) for p in ("key", "value")]
        size = 2 if kv["dtype"] == "bfloat16" else np.dtype(kv["dtype"]).itemsize
        self.nbytes = len(places) * math.prod(shape) * size
        try:
            cells = _cells(session, len(places), shape, kv["dtype"])
        except OnnxpressError as e:
            raise OnnxpressError(
                f"the cache of {batch} rows of {capacity} tokens takes {self.nbytes:,} bytes, and "
                f"there is no memory for it: {e.what}",
                where=str(session.path),
                hint="a smaller batch_size, a smaller max_new_tokens, or shorter prompts",
            ) from e
        self.on_host = cells[0].on_host
        self._cells = [
            (kv["past"].format(**place), kv["present"].format(**place), cell)
            for place, cell in zip(places, cells, strict=True)
        ]
        self._names = {i.name for i in session.inputs}
        outputs = {o.name: o for o in session.outputs}
        self.choice = TOKEN if TOKEN in outputs else "logits"
        self._step = self._bind(self.choice)
        feeds: dict[str, tuple[tuple[int, ...], str, str | None]] = {
            "input_ids": ((batch, 1), "int64", None),
            "position_ids": ((batch, 1), "int64", None),
            self._lengths: ((batch,), "int32", None),
            self._total: ((1,), "int32", "cpu"),  # every provider's kernel reads it on the host
        }
        self._feeds = {n: session.buffer(*how) for n, how in feeds.items() if n in self._names}
        if self._total in self._feeds:
            self._feeds[self._total].copy_from(np.array([capacity], np.int32))
        for name, buffer in self._feeds.items():
            self._step.input(name, buffer)
        spec = outputs[self.choice]
        width = spec.shape[-1]
        if self.choice == TOKEN:
            self._step.output(TOKEN, session.buffer((batch,), spec.dtype))
        elif isinstance(width, int):
            self._step.output("logits", session.buffer((batch, 1, width), spec.dtype))

    def prompts(self, ids: Array, held: Array, output: str | None) -> Array:
        """Run whole prompts into the empty cache; `output` of it, or an empty array for None.

        Args:
            ids: int64 (batch, sequence), padded on the right.
            held: int64 (batch,), the tokens of each row; the most of them is `sequence`.
            output: The output wanted; what it holds for other positions than a row's last is
                not to be used.
        """
        # No two prompts are of one length for long, and each recording would hold memory.
        binding = self._bind(output, capture=False)
        positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        for name, array in self._arrays(ids, positions, held, ids.shape[1]).items():
            binding.input(name, array)
        out = binding.run()
        return _on_host(out[output]) if output else np.empty(0)

    def step(self, tokens: Array, held: Array) -> Array:
        """Run one token of each row: `choice` of it, (batch,) or (batch, vocabulary).

        Args:
            tokens: int64 (batch,).
            held: int64 (batch,), the tokens of each row with this one.
        """
        # The total is read when the kernels are launched, so a captured graph would go on with
        # that of its first run; there it is as large as it can become. The rows' own lengths
        # are read on the device, and they are what is attended to.
        total = self.capacity if self._captured else int(held.max())
        arrays = self._arrays(tokens[:, None], held[:, None] - 1, held, total)
        for name, array in arrays.items():
            self._feeds[name].copy_from(array)
        out = _on_host(self._step.run()[self.choice])
        return out if self.choice == TOKEN else out[:, 0]

    def _arrays(self, ids: Array, positions: Array, held: Array, total: int) -> dict[str, Array]:
        feeds = {
            "input_ids": ids,
            "position_ids": positions.astype(np.int64),
            self._lengths: (held - 1).astype(np.int32),
            self._total: np.array([total], np.int32),
        }
        return {name: array for name, array in feeds.items() if name in self._names}

    def _bind(self, output: str | None, *, capture: bool = True) -> Binding:
        presents = [present for _, present, _ in self._cells]
        binding = self.session.bind([output, *presents] if output else presents, capture=capture)
        for past, present, cell in self._cells:
            binding.input(past, cell)
            binding.output(present, cell)
        return binding


def _cells(session: Session, count: int, shape: tuple[int, ...], dtype: str) -> list[Buffer]:
    cells = [session.buffer(shape, dtype) for _ in range(count)]
    if not cells[0].on_host:
        # Kernels on a GPU read whole tiles and give what lies behind a row's end the weight 0;
        # but 0 times a NaN that was left in that memory is a NaN.
        zeros = session.buffer(shape, dtype, device="cpu")
        ctypes.memset(zeros.pointer, 0, zeros.nbytes)
        # By way of one buffer: each that is written from the host keeps pinned memory for it.
        blank = session.buffer(shape, dtype)
        blank.copy_from(zeros)
        for cell in cells:
            cell.copy_from(blank)
    return cells


def _on_host(buffer: Buffer) -> Array:
    """A result as an array: of the buffer's own memory, where the host has it."""
    if buffer.on_host and buffer.dtype != "bfloat16":
        return buffer.view()
    return buffer.numpy()
