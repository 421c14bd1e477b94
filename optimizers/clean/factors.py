"""What chains of views do to a tensor: an arrangement of the factors of its sizes.

Reshape, Transpose, Squeeze, Unsqueeze and Flatten move no number apart from its neighbors but by
whole factors of an axis. So a chain of them, however long, is one permutation of factors:

    x [seq, batch, 32]            factors   seq, batch, 4, 8
    Reshape [seq, 4*batch, 8]     dims      [seq] [batch 4] [8]
    Transpose [1, 0, 2]           dims      [batch 4] [seq] [8]
    Reshape [batch, 4, seq, 8]    dims      [batch] [4] [seq] [8]

and as such it is written as Reshape, Transpose, Reshape at most. Sizes are compared as
polynomials of names: sizes that are equal by chance in one run prove nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .contents import ONE, Sizes
from .sizes import Size, product

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Plan:
    """Reshape to `first`, Transpose by `perm`, Reshape to `last`; None where there is none.

    Attributes:
        first: Sizes of the first Reshape.
        perm: Order of the Transpose.
        between: Sizes of what the last Reshape reads.
        last: Sizes of the last Reshape.
    """

    first: Sizes | None
    perm: tuple[int, ...] | None
    between: Sizes
    last: Sizes | None

    def __len__(self) -> int:
        return sum(step is not None for step in (self.first, self.perm, self.last))


@dataclass(frozen=True)
class Layout:
    """A tensor as an arrangement of the factors of another one, its source.

    Attributes:
        sizes: The factors, in the order in which they lie in the source; none of them is 1.
        source: The factors of each axis of the source, by index; () is an axis of size 1.
        dims: The factors of each axis of the tensor itself.
    """

    sizes: Sizes
    source: Groups
    dims: Groups

    @classmethod
    def of(cls, shape: Sizes) -> Layout | None:
        """The source itself; None where a size is 0, which has no factors."""
        if any(size.number == 0 for size in shape):
            return None
        sizes = tuple(size for size in shape if size != ONE)
        ids = iter(range(len(sizes)))
        groups = tuple(() if size == ONE else (next(ids),) for size in shape)
        return cls(sizes, groups, groups)

    @property
    def shape(self) -> Sizes:
        """The sizes of the tensor."""
        return self._shape(self.dims)

    @property
    def source_shape(self) -> Sizes:
        """The sizes of the source."""
        return self._shape(self.source)

    def _shape(self, groups: Iterable[Sequence[int]]) -> Sizes:
        return tuple(_product(tuple(self.sizes[i] for i in group)) for group in groups)

    def transposed(self, perm: Sequence[int]) -> Layout:
        """After Transpose<perm>."""
        return Layout(self.sizes, self.source, tuple(self.dims[axis] for axis in perm))

    def reshaped(self, target: Sizes) -> Layout | None:
        """After a Reshape to sizes `target`; None where it cuts across factors.

        Where the two products differ in that one has a number for a name of the other, the name
        is that number in every run that gets past this Reshape: an exporter froze a length.
        """
        total, wanted = _product(self.sizes), _product(target)
        if total != wanted:
            if (frozen := _frozen(total, wanted)) is None:
                return None
            sizes = tuple(_put(size, *frozen) for size in self.sizes)
            layout = Layout(sizes, self.source, self.dims)
            return layout.reshaped(tuple(_put(size, *frozen) for size in target))
        parts: dict[int, list[int]] = {}  # of each factor, its parts, as indices of `sizes`
        cuts, groups = list[tuple[int, int]](), list[list[int]]()  # cuts: (factor, part)
        found = list[Size]()  # sizes of the parts, in the order in which they were cut
        todo = [i for dim in self.dims for i in dim][::-1]
        at, have = -1, ONE
        for size in target:
            need, group = size, list[int]()
            while need != ONE:
                if have == ONE:
                    if not todo:
                        return None
                    at = todo.pop()
                    have = self.sizes[at]
                if (rest := need.over(have)) is not None:
                    part, need, have = have, rest, ONE
                elif (rest := have.over(need)) is not None:
                    part, need, have = need, ONE, rest
                else:
                    return None
                group.append(len(found))
                cuts.append((at, len(found)))
                parts.setdefault(at, []).append(len(found))
                found.append(part)
            groups.append(group)
        if todo or have != ONE:
            return None
        place = {part: i for i, (_, part) in enumerate(sorted(cuts))}  # in the source's order
        return Layout(
            tuple(found[part] for part in sorted(place, key=place.__getitem__)),
            tuple(tuple(place[p] for i in group for p in parts[i]) for group in self.source),
            tuple(tuple(place[p] for p in group) for group in groups),
        )

    def plans(self) -> list[Plan]:
        """The ways to make the tensor of its source, those of fewest nodes first."""
        order = [i for dim in self.dims for i in dim]
        if order == sorted(order):
            same = self.shape == self.source_shape
            return [Plan(None, None, self.source_shape, None if same else self.shape)]
        before = dict(zip(order, [-1, *order], strict=False))
        turns = {i for i in order if before[i] != i - 1}  # factors that come to follow another one
        found = [self._turned_last(turns), self._turned_first(turns), self._turned_between(turns)]
        return sorted((plan for plan in found if plan is not None), key=len)

    def _turned_first(self, turns: set[int]) -> Plan | None:
        """Transpose the source, then Reshape if that is not all."""
        if not turns <= _starts(self.source):
            return None
        holds = {group[0]: axis for axis, group in enumerate(self.source) if group}
        ones = [axis for axis, group in enumerate(self.source) if not group]
        full = [holds[i] for dim in self.dims for i in dim if i in holds]
        spare, perm = list(ones), list[int]()
        for dim in self.dims:  # axes of size 1 go where the tensor has some
            if dim and dim in self.source:
                perm.append(self.source.index(dim))
            elif not dim and spare:
                perm.append(spare.pop(0))
            else:
                break
        else:
            if not spare and len(perm) == len(self.source):
                return Plan(None, tuple(perm), self.shape, None)
        perm = [*full, *ones]
        between = tuple(self.source_shape[axis] for axis in perm)
        return Plan(None, tuple(perm), between, self.shape)

    def _turned_last(self, turns: set[int]) -> Plan | None:
        """Reshape the source into the dimensions of the tensor, then Transpose."""
        if not turns <= _starts(self.dims):
            return None
        axes = sorted(
            range(len(self.dims)), key=lambda axis: (not self.dims[axis], self.dims[axis])
        )
        first = tuple(self.shape[axis] for axis in axes)
        perm = tuple(axes.index(axis) for axis in range(len(axes)))
        same = first == self.source_shape
        return Plan(None if same else first, perm, self.shape, None)

    def _turned_between(self, turns: set[int]) -> Plan:
        """Reshape into the pieces that move, Transpose, Reshape."""
        cuts = sorted({0} | turns | _starts(self.source))
        ends = [*cuts[1:], len(self.sizes)]
        pieces = [tuple(range(a, b)) for a, b in zip(cuts, ends, strict=True)]
        holds = {piece[0]: axis for axis, piece in enumerate(pieces)}
        perm = tuple(holds[i] for dim in self.dims for i in dim if i in holds)
        first = self._shape(pieces)
        return Plan(first, perm, tuple(first[axis] for axis in perm), self.shape)


@lru_cache(maxsize=4096)
def _product(sizes: Sizes) -> Size:
    """`product`, remembered: the layers of a model repeat a few."""
    return sizes[0] if len(sizes) == 1 else product(sizes)


def _starts(groups: Groups) -> set[int]:
    return {group[0] for group in groups if group}


def _frozen(have: Size, want: Size) -> tuple[str, int] | None:
    """(name, number) that make two products equal, where one name is all that differs."""
    if len(have.terms) != 1 or len(want.terms) != 1:
        return None
    (names, factor), (others, number) = have.terms[0], want.terms[0]
    rest, more = Counter(names), Counter(others)
    left = list((rest - more).elements())
    if len(left) != 1 or more - rest or factor < 1 or number < 1 or number % factor:
        return None
    return left[0], number // factor


def _put(size: Size, name: str, number: int) -> Size:
    """`size` with a number for a name."""
    total = Size.of(0)
    for names, factor in size.terms:
        known = (Size.of(number) if n == name else Size.of(n) for n in names)
        total += product(known) * Size.of(factor)
    return total
