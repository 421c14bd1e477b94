"""Ranges of sizes: what an engine is built for, and the check that a run lies inside.

An engine takes every input within a least and a greatest shape, and is tuned for one between. Both
follow from a range for each name in the signature: `batch=1:8:32` is least, best and most.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

from ..artifact import TensorSpec, evaluate, is_symbol
from ..errors import InputError, UsageError
from .signature import close_match

Range = tuple[int, int, int]
Shape = tuple[int, ...]


class NoProfile(UsageError):
    """A signature that no profile fits as it stands: sizes are missing, or a name is unfit.

    Of several providers that were asked for, the next one may need none.
    """


FORM = '--shapes "batch=1:8:32,sequence=16:128:512"  (least:best:most of each)'
MOST = 2**31 - 1  # ONNX Runtime reads a size in a profile with std::stoi


class Sized(Protocol):
    """Anything with a shape: an array, or a buffer on a device."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its dimensions."""


def parse_shapes(text: str) -> dict[str, Range]:
    """Ranges of sizes by name, from text such as "batch=1:8:32,sequence=16:128:512".

    `batch=8` is 8:8:8, and `batch=1:32` is 1:32:32. Spaces and a comma at the end do no harm.

    Returns:
        The least size, the one to tune for, and the greatest, for each name in the order given.

    Raises:
        UsageError: Text that is not of this form, a name given twice, a size that is negative or
            too large, or sizes that do not rise.
    """
    found: dict[str, Range] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, sizes = (p.strip() for p in part.partition("="))
        numbers = [n.strip() for n in sizes.split(":")]
        fine = equals and name and is_symbol(name) and 1 <= len(numbers) <= 3
        if not (fine and all(re.fullmatch(r"[0-9]{1,10}", n) for n in numbers)):
            raise UsageError(f"{part!r} is no range of sizes", where=text, hint=FORM)
        if name in found:
            raise UsageError(f"the sizes of {name!r} are given twice", where=text, hint=FORM)
        least, most = int(numbers[0]), int(numbers[-1])
        found[name] = (least, int(numbers[1]) if numbers[1:] else most, most)
        check_range(name, found[name], where=text)
    if not found:
        raise UsageError("there are no sizes", where=repr(text), hint=FORM)
    return found


def check_range(name: str, sizes: object, *, where: str | None = None) -> Range:
    """Three sizes that rise, as a tuple.

    Raises:
        UsageError: They are not three whole numbers, they fall, or the greatest holds nothing.
    """
    whole = isinstance(sizes, Sequence) and all(type(n) is int for n in sizes)
    if not isinstance(sizes, Sequence) or not whole or len(sizes) != 3:
        raise UsageError(
            f"the sizes of {name!r} are three whole numbers, not {sizes!r}", where=where, hint=FORM
        )
    least, best, most = sizes
    text = f"{least}:{best}:{most}"
    if not 0 <= least <= best <= most:
        raise UsageError(f"the sizes of {name!r} do not rise: {text}", where=where, hint=FORM)
    if not 1 <= most <= MOST:
        raise UsageError(
            f"the greatest size of {name!r} must lie in 1..{MOST}: {text}", where=where, hint=FORM
        )
    return least, best, most


def text_of(shapes: Mapping[str, Range]) -> str:
    """Ranges as `parse_shapes` reads them."""
    return ",".join(f"{name}={':'.join(map(str, sizes))}" for name, sizes in shapes.items())


@dataclass(frozen=True)
class Profile:
    """The shapes that an engine takes.

    Attributes:
        shapes: The range of each name in the signature.
        inputs: The least, best and greatest shape of each input that varies, by its name.
        dims: The dimensions of those inputs as the signature writes them.
    """

    shapes: Mapping[str, Range]
    inputs: Mapping[str, tuple[Shape, Shape, Shape]]
    dims: Mapping[str, tuple[int | str, ...]]

    def check(self, feeds: Mapping[str, Sized]) -> None:
        """Refuse a run that lies outside: TensorRT would build another engine for it, for minutes.

        Args:
            feeds: Arrays, or anything else with a shape, by input name. Names, ranks and fixed
                sizes are the signature's matter, and not looked at.

        Raises:
            InputError: Names the input, its dimension, the size, the range, and the new range.
        """
        for name, (least, _, most) in self.inputs.items():
            if name not in feeds:
                continue
            for axis, size in enumerate(feeds[name].shape[: len(least)]):
                if not least[axis] <= size <= most[axis]:
                    raise self._outside(name, axis, size, f"{least[axis]}..{most[axis]}")

    def sizes(self, point: int) -> dict[str, int]:
        """The size of each name at the least (0), the best (1) or the greatest (2) point."""
        return {name: sizes[point] for name, sizes in self.shapes.items()}

    def text(self, point: int) -> str:
        """The shapes of one point as TensorRT's options spell them: input_ids:1x16,mask:1x16."""
        return ",".join(
            f"{name}:{'x'.join(map(str, points[point]))}" for name, points in self.inputs.items()
        )

    def _outside(self, name: str, axis: int, size: int, taken: str) -> InputError:
        dim = self.dims[name][axis]
        wider = dict(self.shapes)
        if dim in wider:
            least, best, most = wider[str(dim)]
            wider[str(dim)] = (min(least, size), best, max(most, size))
        return InputError(
            f"the input {name!r} is outside the profiles of the engine: dimension {axis} "
            f"({dim!r}) is {size}, and the engine takes {taken}",
            hint=f'onnxpress warmup DIR --shapes "{text_of(wider)}", and the same shapes= for the '
            "Session; or press again with these --shapes",
        )


def names_of(specs: Sequence[TensorSpec]) -> list[str]:
    """The names in the shapes of these inputs, each once, in order."""
    return list(dict.fromkeys(n for spec in specs for dim in spec.shape for n in _names(dim)))


def ranges_of(specs: Sequence[TensorSpec], shapes: Mapping[str, object] | None) -> dict[str, Range]:
    """The ranges that were given, checked; not every name needs one.

    Raises:
        UsageError: Sizes for a name that no input has, or sizes that do not rise.
    """
    names = names_of(specs)
    for name in shapes or {}:
        if name not in names:
            raise UsageError(
                f"no input has a dimension {name!r}{close_match(name, names)}",
                where="; ".join(map(str, specs)),
                hint=f"those that vary: {', '.join(names) or 'none'}",
            )
    return {name: check_range(name, sizes) for name, sizes in (shapes or {}).items()}


def profile_of(specs: Sequence[TensorSpec], shapes: Mapping[str, object] | None) -> Profile | None:
    """The profile of a signature; None where every size is fixed.

    Args:
        specs: The inputs.
        shapes: Three sizes for each name in them. Expressions follow from their names.

    Raises:
        NoProfile: A name without sizes, or an input that cannot be written in a profile.
        UsageError: Sizes for a name that is not there, or sizes that do not rise.
    """
    given, names = ranges_of(specs, shapes), names_of(specs)
    inputs, dims = {}, {}
    for spec in specs:
        if all(isinstance(dim, int) for dim in spec.shape):
            continue
        if "?" in spec.shape:
            raise NoProfile(
                f"the input {spec.name!r} has a dimension without a name, which no range fits",
                where=str(spec),
                hint="press the model: its signature then has a name for every dimension",
            )
        if re.search(r"[:,]", spec.name):
            raise NoProfile(
                f"TensorRT's profiles cannot name the input {spec.name!r}: it holds ':' or ','",
                where=str(spec),
                hint="export the model again with another name for it",
            )
        if missing := [n for n in names if n not in given]:
            asked = ",".join(f"{n}=LEAST:BEST:MOST" for n in missing)
            raise NoProfile(
                f"an engine needs the least, the best and the greatest size of "
                f"{', '.join(map(repr, missing))}",
                where="; ".join(str(s) for s in specs if set(missing) & _all_names(s)),
                hint=f'--shapes "{asked}"  (press, warmup), or Session(shapes={{...}})',
            )
        ranges = [_range_of(dim, spec, given) for dim in spec.shape]
        least, best, most = (tuple(r[point] for r in ranges) for point in range(3))
        inputs[spec.name], dims[spec.name] = (least, best, most), spec.shape
    return Profile(given, inputs, dims) if inputs else None


def _all_names(spec: TensorSpec) -> set[str]:
    return {n for dim in spec.shape for n in _names(dim)}


def _names(dim: int | str) -> list[str]:
    if isinstance(dim, int) or dim == "?":
        return []
    return [dim] if is_symbol(dim) else re.findall(r"[^\W\d][\w.]*", dim)


def _range_of(dim: int | str, spec: TensorSpec, given: Mapping[str, Range]) -> Range:
    if isinstance(dim, int):
        return dim, dim, dim
    names = list(dict.fromkeys(_names(dim)))
    ends = product(*((given[n][0], given[n][2]) for n in names))
    # A difference is least where one side is greatest: all corners are looked at.
    corners = [evaluate(dim, dict(zip(names, sizes, strict=True))) for sizes in ends]
    best = evaluate(dim, {n: given[n][1] for n in names})
    known = [n for n in corners if n is not None]
    if best is None or len(known) < len(corners) or min(known) < 0:
        raise UsageError(
            f"the dimension {dim!r} of the input {spec.name!r} has no range of sizes with "
            f"{text_of({n: given[n] for n in names})}",
            where=str(spec),
            hint="choose --shapes for which it is never below 0",
        )
    return min(known), best, max(known)
