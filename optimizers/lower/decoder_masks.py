"""What the mask of a decoder's attention hides, found by trying it.

GroupQueryAttention hides what comes later, what lies outside of a window, and what is not of the
row; it takes no mask that says so. So a mask may only go where it hides the very same. Every
exporter spells it in its own way (comparisons of ranges, Trilu, slices of a table, tokens that are
counted), and what matters is what comes out: the mask is computed for batches, caches and padding
of many kinds, and each real query has to see

    key j of its row, if attention_mask[j], j <= i, and i - j < window      (i: its place)

What a query of padding sees is nobody's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..dims import dim
from .formulas import Formula, Unreadable

DEEP = -1e4  # the mildest number that is in use for "minus infinity"; float16 has none below -65504
FAR = (8, 64, 512, 4160, 1 << 15, 1 << 18, 1 << 20)  # lengths at which a window is looked for
NO_WINDOW = -1  # as the kernel spells it
SQUARE = 4160  # the longest text to try with a mask that is computed for all of its queries


@dataclass(frozen=True)
class Inputs:
    """The inputs of a decoder by what they mean.

    Attributes:
        ids: (batch, sequence).
        mask: (batch, past + sequence), 0 for padding; None where the graph has none.
        positions: (batch, sequence), or None.
        caches: (batch, kv_heads, past, head_dim) each.
    """

    ids: ir.Value
    mask: ir.Value | None
    positions: ir.Value | None
    caches: tuple[ir.Value, ...]


@dataclass(frozen=True)
class Case:
    """Sizes and padding to try.

    Attributes:
        past: Length of the cache.
        length: New tokens.
        mask: bool (batch, past + length), True for a real token.
    """

    past: int
    length: int
    mask: np.ndarray

    def __str__(self) -> str:
        padding = "no padding" if self.mask.all() else "padding"
        return f"batch {len(self.mask)}, past {self.past}, {self.length} new, {padding}"

    def feeds(self, inputs: Inputs) -> dict[ir.Value, np.ndarray]:
        """Values of the inputs; the numbers in caches are all 0, and take no memory."""
        batch, now = len(self.mask), (len(self.mask), self.length)
        found = {inputs.ids: np.zeros(now, _numpy(inputs.ids))}
        if inputs.mask is not None:
            found[inputs.mask] = self.mask.astype(_numpy(inputs.mask))
        if inputs.positions is not None:
            count = np.maximum(self.mask.cumsum(1) - 1, 0)
            found[inputs.positions] = count[:, self.past :].astype(_numpy(inputs.positions))
        for cache in inputs.caches:
            heads, size = heads_of(cache)
            sizes = (batch, heads, self.past, size)
            found[cache] = np.broadcast_to(np.zeros((), _numpy(cache)), sizes)
        return found


class Mask:
    """The mask of one Attention node, as a formula.

    Args:
        node: Attention of ai.onnx.
        inputs: Of its graph.

    Raises:
        Unreadable: Something goes into it that is neither padding nor position nor size.
    """

    def __init__(self, node: ir.Node, inputs: Inputs) -> None:
        self.inputs = inputs
        self.is_causal = bool(node.attributes.get_int("is_causal", 0))
        # Causal means from the first key on, unless the op itself knows of the cache.
        self.knows_past = len(node.inputs) > 4 and node.inputs[4] is not None
        value = node.inputs[3] if len(node.inputs) > 3 else None
        self.name = value.name if value is not None else None
        self.formula = None if value is None else Formula(value)
        if self.formula is None:
            return
        known = {inputs.mask, inputs.positions}
        for v in self.formula.given:
            if v in known or (v in self.formula.by_size and v in (inputs.ids, *inputs.caches)):
                continue
            raise Unreadable(f"the mask {self.name!r} is computed from {v.name!r}")

    def seen(self, case: Case) -> np.ndarray:
        """bool (batch, 1 or heads, queries, keys): which keys are seen.

        Raises:
            Unreadable: It is no choice between two numbers, or not of the right size.
        """
        queries, keys = case.length, case.past + case.length
        shape = (len(case.mask), 1, queries, keys)
        seen = np.ones(shape, bool)
        if self.is_causal:
            first = case.past if self.knows_past else 0
            seen &= np.arange(keys) <= first + np.arange(queries)[:, None]
        if self.formula is None:
            return seen
        found = self.formula(case.feeds(self.inputs))
        if found.ndim > 4 or not found.ndim or found.shape[-1] != keys:
            raise Unreadable(f"the mask {self.name!r} is {list(found.shape)} for {case}")
        if found.dtype != bool:
            numbers = found.astype(np.float32)
            if not ((numbers == 0) | (numbers <= DEEP)).all():
                odd = numbers[(numbers != 0) & ~(numbers <= DEEP)][0]
                raise Unreadable(f"the mask {self.name!r} adds {odd:.6g}: it is a bias")
            found = numbers == 0
        try:
            both: np.ndarray = seen & found
        except ValueError as e:
            raise Unreadable(f"the mask {self.name!r} is {list(found.shape)} for {case}") from e
        return both

    def grows_as_square(self) -> bool:
        """Whether something is computed for all queries that the text has, and then cut."""
        if self.formula is None:
            return False
        sizes = []
        for total in (128, 256):
            try:
                made = self.formula.everything(_plain(total).feeds(self.inputs))
            except Unreadable:
                return False  # it ends before: no longer text will be tried
            sizes.append(max(a.size for a in made))
        return sizes[1] > 3 * sizes[0]

    def integers(self, above: int, below: int) -> list[int]:
        """Constants that it is computed with, between these."""
        found = () if self.formula is None else self.formula.integers()
        return [n for n in found if above < n < below]


def window_of(node: ir.Node, inputs: Inputs) -> int:
    """How many keys back each query sees, its own included; `NO_WINDOW` for all of them.

    Raises:
        Unreadable: The mask hides something else: the reason says at which sizes, and what.
    """
    mask = Mask(node, inputs)
    window = _far_window(mask)
    for case in _cases(window, padded=inputs.mask is not None):
        real = case.mask[:, None, case.past :, None]
        want = _expected(case, window)
        wrong = (mask.seen(case) != want) & real
        if wrong.any():
            row, _, query, key = (int(i) for i in np.argwhere(wrong)[0])
            sees = "hides" if want[row, 0, query, key] else "shows"
            name = "no mask" if mask.name is None else f"the mask {mask.name!r}"
            raise Unreadable(
                f"{name} {sees} key {key} of row {row} at query {case.past + query} ({case})"
            )
    return window


def _expected(case: Case, window: int) -> np.ndarray:
    back = case.past + np.arange(case.length)[:, None] - np.arange(case.past + case.length)
    near = (back >= 0) & ((back < window) if window > 0 else True)
    found: np.ndarray = near & case.mask[:, None, None, :]
    return found


def _plain(total: int) -> Case:
    return Case(total - 1, 1, np.ones((1, total), bool))


def _far_window(mask: Mask) -> int:
    """What the last token of a long text sees of it.

    Raises:
        Unreadable: It may have a window that is too wide to be tried.
    """
    square = mask.grows_as_square()
    known = 0  # the longest text that the mask takes, as far as we know
    for total in FAR:
        if square and total > SQUARE:
            if wide := mask.integers(SQUARE, 1 << 31):
                raise Unreadable(
                    f"the mask {mask.name!r} may have a window of {min(wide)}: one wider than "
                    f"{SQUARE} cannot be told, for it is computed for all queries of a text"
                )
            break
        try:
            window = _window_at(mask, total)
        except Unreadable:
            if total == FAR[0]:
                raise
            # Past the last position of a table: no text is longer than the last that it takes.
            return _window_at(mask, _longest(mask, known, total)) or NO_WINDOW
        if window is not None:
            return window or NO_WINDOW
        known = total
    return NO_WINDOW


def _window_at(mask: Mask, total: int) -> int | None:
    """How many keys the last of `total` tokens sees: None for all, 0 for what is no window."""
    row = mask.seen(_plain(total))[0, 0, 0]
    count = int(row.sum())
    if not count or not row[total - count :].all():
        return 0  # the cases tell what it is
    return count if count < total else None


def _longest(mask: Mask, takes: int, refuses: int) -> int:
    """The longest text that the mask can be computed for, between one that can and one not."""
    while refuses - takes > 1:
        total = (takes + refuses) // 2
        try:
            mask.seen(_plain(total))
            takes = total
        except Unreadable:
            refuses = total
    return takes


def _cases(window: int, *, padded: bool) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    # At the edge of a window, and far past it.
    edge = [] if window < 0 else [p for p in (window - 1, window, window + 3) if p > 5]
    for past in (0, 1, 5, *edge):
        for length in (1, 4):
            total = past + length
            yield Case(past, length, np.ones((1, total), bool))
            if not padded:
                yield Case(past, length, np.ones((3, total), bool))
                continue
            counts = np.array([[total], [max(total // 2, 1)], [1]])
            right = np.arange(total) < counts
            odd = rng.random((3, total)) < 0.6
            odd[:, -1] = True
            yield from (Case(past, length, m) for m in (right, right[:, ::-1], odd, odd[:1]))


def heads_of(cache: ir.Value) -> tuple[int, int]:
    """How many heads a cache has, and their size; both are known."""
    heads, size = dim(cache, 1), dim(cache, 3)
    assert isinstance(heads, int)
    assert isinstance(size, int)
    return heads, size


def _numpy(value: ir.Value) -> np.dtype[np.generic]:
    if value.dtype is None:
        raise Unreadable(f"the type of {value.name!r} is not known")
    found: np.dtype[np.generic] = np.dtype(value.dtype.numpy())
    return found


def repeats_heads(value: ir.Value, cache: ir.Value, inputs: Inputs, heads: int) -> bool:
    """Whether `value` is `cache` (batch, kv_heads, keys, head_dim) with each head repeated.

    Args:
        value: What Attention reads, (batch, heads, keys, head_dim) or (batch, keys, hidden).
        cache: What it is made of.
        inputs: Of the graph; sizes may come from there.
        heads: How many it has after.

    Raises:
        Unreadable: It cannot be computed from the cache.
    """
    if value is cache:
        return True
    formula = Formula(value, [cache])
    kv_heads, size = heads_of(inputs.caches[0])
    rng = np.random.default_rng(0)
    for batch, past, length in ((1, 0, 1), (3, 5, 4), (2, 1, 1)):
        case = Case(past, length, np.ones((batch, past + length), bool))
        x = rng.standard_normal((batch, kv_heads, past + length, size))
        feeds: Mapping[ir.Value, np.ndarray] = {
            **case.feeds(inputs),
            cache: x.astype(_numpy(cache)),
        }
        if any(v not in feeds for v in formula.given):
            return False
        want = np.repeat(feeds[cache], heads // kv_heads, axis=1)
        found = formula(feeds)
        if found.ndim == 3:
            want = want.transpose(0, 2, 1, 3).reshape(batch, past + length, -1)
        if found.shape != want.shape or not (found == want).all():
            return False
    return True
