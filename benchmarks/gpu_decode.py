"""Decoding over a shared cache, on sessions and tensors that the caller chooses.

`runtime.Generator` does this for users, with a tokenizer; here it is bare, to be held against
PyTorch and timed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxpress.runtime import Session

Array = npt.NDArray[Any]


class Decoding:
    """The buffers of one batch, bound as past and as present.

    Args:
        session: A graph with GroupQueryAttention.
        kv: The layout of its cache.
        batch: Rows.
        capacity: Tokens of a row that there is room for.
        frozen: Tell the kernel that rows are as long as there is room for, whatever they are: a
            captured CUDA graph reads that number once.
    """

    def __init__(
        self, session: Session, kv: dict[str, Any], batch: int, capacity: int, *, frozen: bool
    ) -> None:
        self.session, self.kv, self.capacity, self.frozen = session, kv, capacity, frozen
        self.names = {i.name for i in session.inputs}
        shape = (batch, kv["kv_heads"], capacity, kv["head_dim"])
        blank = session.buffer(shape, kv["dtype"], device="cpu")
        ctypes.memset(blank.pointer, 0, blank.nbytes)
        self.cells = []
        for layer in range(kv["layers"]):
            for part in ("key", "value"):
                cell = session.buffer(shape, kv["dtype"])
                # By way of the first one: each that the host writes keeps pinned memory for it.
                cell.copy_from(self.cells[0][2] if self.cells else blank)
                past, present = (kv[w].format(layer=layer, part=part) for w in ("past", "present"))
                self.cells.append((past, present, cell))
        self.one: Any = None

    def bind(self) -> Any:
        """A binding with the cache in place."""
        binding = self.session.bind(["logits", *(present for _, present, _ in self.cells)])
        for past, present, cell in self.cells:
            binding.input(past, cell)
            binding.output(present, cell)
        return binding

    def feed(self, binding: Any, ids: Array, positions: Array, lengths: Array) -> None:
        """Bind what changes from run to run.

        Args:
            binding: Of `bind`.
            ids: int64 (batch, sequence).
            positions: int64 (batch, sequence).
            lengths: (batch), tokens of each row with these.
        """
        total = self.capacity if self.frozen and ids.shape[1] == 1 else int(lengths.max())
        arrays = {
            "input_ids": np.ascontiguousarray(ids),
            "position_ids": np.ascontiguousarray(positions.astype(np.int64)),
            self.kv["lengths"]: (lengths - 1).astype(np.int32),
            self.kv["total"]: np.array([total], np.int32),
        }
        for name, array in arrays.items():
            if name in self.names:
                binding.input(name, array)

    def prompt(self, ids: Array, lengths: Array) -> Array:
        """Logits of every position of prompts that are padded on the right, on the host."""
        binding = self.bind()
        self.feed(binding, ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape), lengths)
        return np.asarray(binding.run()["logits"].numpy(), np.float32)

    def step(self, tokens: Array, lengths: Array) -> Array:
        """Logits after one more token of each row, (batch, vocabulary), on the host."""
        if self.one is None:
            self.one = self.bind()
        self.feed(self.one, tokens[:, None], lengths[:, None] - 1, lengths)
        return np.asarray(self.one.run()["logits"].numpy(), np.float32)[:, 0]


class DeviceLoop:
    """Greedy steps that stay on the device: the token chosen is the next one's input.

    The rows hold `filled` tokens at every step, so that all steps cost the same.

    Args:
        decoding: Its cache and session.
        batch: Rows.
        filled: Tokens in each row, the new one included.
        device: torch's name of the session's device.
    """

    def __init__(self, decoding: Decoding, batch: int, filled: int, device: str) -> None:
        import torch

        def ints(shape: tuple[int, ...], value: int, dtype: Any) -> Any:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.ids = ints((batch, 1), 7, torch.int64)
        kv, names = decoding.kv, decoding.names
        self.held = {
            "input_ids": self.ids,
            "position_ids": ints((batch, 1), filled - 1, torch.int64),
            kv["lengths"]: ints((batch,), filled - 1, torch.int32),
        }
        self.binding = decoding.bind()
        total = decoding.capacity if decoding.frozen else filled
        self.binding.input(kv["total"], np.array([total], np.int32))
        for name, tensor in self.held.items():
            if name in names:
                self.binding.input(name, tensor)
        logits = next(o for o in decoding.session.outputs if o.name == "logits")
        # Torch's own memory, so that choosing needs no hand-over.
        self.logits = torch.empty(
            (batch, 1, logits.shape[-1]), dtype=getattr(torch, logits.dtype), device=device
        )
        self.binding.output("logits", self.logits)

    def step(self) -> None:
        self.binding.run()
        self.ids.copy_(self.logits.argmax(-1))
