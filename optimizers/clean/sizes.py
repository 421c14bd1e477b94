"""Sizes as polynomials of dimension names, so that `batch*4*16` and `64*batch` are one size."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

Term = tuple[tuple[str, ...], int]  # the names that are multiplied, sorted, and their factor

FRESH, OPAQUE = "?", "!"  # first letter of names that we made: a size, and a number of any sign


@dataclass(frozen=True)
class Size:
    """A polynomial with integer factors: `Size.of("batch") * Size.of(4)` prints as 4*batch."""

    terms: tuple[Term, ...]

    @classmethod
    def of(cls, what: int | str) -> Size:
        """A number, or a name as it stands."""
        if isinstance(what, str):
            return cls((((what,), 1),))
        return cls((((), what),) if what else ())

    @classmethod
    def parse(cls, text: str) -> Size:
        """`4*batch + 1` as a polynomial; text of any other form is a name as it stands.

        This is how `str` writes a size, and how torch's dynamo names the sizes it derives.
        """
        if not re.fullmatch(r"\w+( ?[*+] ?\w+)+", text):
            return cls.of(text)
        total = cls.of(0)
        for term in text.split("+"):
            factors = [f.strip() for f in term.split("*")]
            total += product(cls.of(int(f) if f.isdecimal() else f) for f in factors)
        return total

    @property
    def number(self) -> int | None:
        """The number, if it depends on no name."""
        if not self.terms:
            return 0
        names, factor = self.terms[0]
        return factor if len(self.terms) == 1 and not names else None

    @property
    def name(self) -> str | None:
        """The name, if it is one name and nothing else."""
        if len(self.terms) != 1:
            return None
        names, factor = self.terms[0]
        return names[0] if factor == 1 and len(names) == 1 else None

    @property
    def is_size(self) -> bool:
        """Whether it cannot be below 0."""
        return all(f > 0 and not any(n[0] == OPAQUE for n in names) for names, f in self.terms)

    @property
    def is_public(self) -> bool:
        """Whether every name in it is one that the graph has."""
        return not any(n[0] in (FRESH, OPAQUE) for names, _ in self.terms for n in names)

    def __add__(self, other: Size) -> Size:
        return _collect([*self.terms, *other.terms])

    def __neg__(self) -> Size:
        return Size(tuple((names, -factor) for names, factor in self.terms))

    def __mul__(self, other: Size) -> Size:
        return _collect(
            (tuple(sorted(a + b)), f * g) for a, f in self.terms for b, g in other.terms
        )

    def over(self, other: Size) -> Size | None:
        """The quotient by a product of names and a number, where it leaves no remainder."""
        if len(other.terms) != 1:
            return self.of(1) if self == other and self.terms else None
        below, divisor = other.terms[0]
        found = []
        for names, factor in self.terms:
            rest = Counter(names)
            rest.subtract(below)
            if factor % divisor or any(count < 0 for count in rest.values()):
                return None
            found.append((tuple(sorted(rest.elements())), factor // divisor))
        return _collect(found)

    def __str__(self) -> str:
        def one(names: tuple[str, ...], factor: int) -> str:
            return "*".join([*([str(factor)] if factor != 1 or not names else []), *names])

        return " + ".join(one(*term) for term in self.terms) or "0"


def product(sizes: Iterable[Size]) -> Size:
    """All of them multiplied; 1 for none."""
    total = Size.of(1)
    for size in sizes:
        total *= size
    return total


def _collect(terms: Iterable[Term]) -> Size:
    total: Counter[tuple[str, ...]] = Counter()
    for names, factor in terms:
        total[names] += factor
    return Size(tuple(sorted((names, factor) for names, factor in total.items() if factor)))
