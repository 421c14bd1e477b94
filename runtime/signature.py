"""A model's signature, and the check of feeds against it before ONNX Runtime sees them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..artifact import TensorSpec, evaluate, is_symbol
from ..errors import InputError

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

# ONNX Runtime's type names to numpy's. Types that numpy lacks keep ONNX Runtime's name, and only
# their shapes are checked.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(string)": "object",
    "tensor(bool)": "bool",
    **{f"tensor({u}int{n})": f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)},
}


class Checker:
    """Checks feeds against a signature; all that can be prepared is prepared once.

    Masks named in `padding` have to pad on the right, and to hide no row throughout: such a graph
    reads no more of them than how many keys there are.

    Called with feeds, it raises an InputError that names the input, what it takes and what it
    got: for names, kinds, dtypes, ranks, fixed sizes, and sizes that must agree over inputs.
    """

    def __init__(
        self, inputs: Sequence[TensorSpec], padding: Mapping[str, str] | None = None
    ) -> None:
        self.inputs, self.padding = inputs, tuple(padding or ())
        self.names = frozenset(i.name for i in inputs)
        # Plain names first, over all inputs: expressions need their sizes.
        self.plain = [
            (
                i,
                i.name,
                np.dtype(i.dtype) if i.dtype in _DTYPES.values() and i.dtype != "object" else None,
                i.rank,
                [(axis, d) for axis, d in enumerate(i.shape) if isinstance(d, int)],
                [
                    (axis, d)
                    for axis, d in enumerate(i.shape)
                    if isinstance(d, str) and is_symbol(d)
                ],
            )
            for i in inputs
            if i.dtype.startswith("tensor") or i.dtype in _DTYPES.values()
        ]
        self.expressions = [
            (i, axis, d)
            for i, *_ in self.plain
            for axis, d in enumerate(i.shape)
            if isinstance(d, str) and d != "?" and not is_symbol(d)
        ]

    def __call__(self, feeds: Feeds) -> None:
        """Check the feeds of one run."""
        if type(feeds) is not dict or feeds.keys() != self.names:
            self._bad_names(feeds)
        sizes: dict[str, int] = {}
        for spec, name, dtype, rank, fixed, symbols in self.plain:
            value = feeds[name]
            if not isinstance(value, np.ndarray):
                raise InputError(
                    f"the input {name!r} is no numpy array, but {type(value).__name__}",
                    where=str(spec),
                    hint=f"np.asarray(value, dtype={_numpy(spec.dtype)})",
                )
            if dtype is not None and value.dtype != dtype:
                raise InputError(
                    f"the input {name!r} takes {dtype}, and got {value.dtype}",
                    where=str(spec),
                    hint=f"feeds[{name!r}].astype({_numpy(spec.dtype)})",
                )
            shape = value.shape
            if len(shape) != rank:
                raise InputError(
                    f"the input {name!r} has {rank} dimensions, and got {len(shape)}: "
                    f"shape {list(shape)}",
                    where=str(spec),
                )
            for axis, size in fixed:
                if shape[axis] != size:
                    raise self._bad_dim(spec, axis, shape, f"{size}")
            for axis, symbol in symbols:
                if sizes.setdefault(symbol, shape[axis]) != shape[axis]:
                    first = self._first(symbol, spec)
                    raise self._bad_dim(
                        spec, axis, shape, f"{sizes[symbol]}: {symbol!r} as in the input {first!r}"
                    )
        for spec, axis, text in self.expressions:
            want, shape = evaluate(text, sizes), feeds[spec.name].shape
            if want is not None and shape[axis] != want:
                known = ", ".join(f"{k} = {v}" for k, v in sizes.items() if k in text)
                raise self._bad_dim(spec, axis, shape, f"{want}: {text!r} with {known}")
        for name in self.padding:
            check_padding(name, feeds[name])

    def _first(self, symbol: str, fallback: TensorSpec) -> str:
        return next((i.name for i in self.inputs if symbol in i.shape), fallback.name)

    def _bad_dim(
        self, spec: TensorSpec, axis: int, shape: tuple[int, ...], want: str
    ) -> InputError:
        return InputError(
            f"the input {spec.name!r} has shape {list(shape)}; "
            f"dimension {axis} is {shape[axis]} and must be {want}",
            where=str(spec),
        )

    def _bad_names(self, feeds: object) -> None:
        if not isinstance(feeds, Mapping):
            raise InputError(
                f"feeds must be a dict of arrays by input name, not {type(feeds).__name__}",
                hint=f"the inputs: {', '.join(i.name for i in self.inputs)}",
            )
        given = [str(n) for n in feeds]
        missing = [i.name for i in self.inputs if i.name not in feeds]
        for name in given:
            if name not in self.names:
                close = close_match(name, missing or list(self.names))
                raise InputError(
                    f"the model has no input {name!r}{close}",
                    hint=f"its inputs: {', '.join(map(str, self.inputs))}",
                )
        if missing:
            raise InputError(
                f"the input {missing[0]!r} is missing"
                + (f", and {len(missing) - 1} more" if missing[1:] else ""),
                where=str(next(i for i in self.inputs if i.name == missing[0])),
            )


def check_padding(name: str, mask: Array) -> None:
    """Refuse a mask (batch, sequence) that pads elsewhere than on the right, or a whole row.

    Raises:
        InputError: It does; the message names the row.
    """
    seen = mask != 0
    if seen.all():
        return
    wrong = (seen[:, 1:] & ~seen[:, :-1]).any(1) | ~seen.any(1)
    if wrong.any():
        row = int(wrong.argmax())
        how = "has a token behind its padding" if seen[row].any() else "has no token"
        raise InputError(
            f"row {row} of the input {name!r} {how}; the graph counts the tokens of a row, and "
            "takes the first as many",
            hint="pad on the right (tokenizer: padding_side='right'), and leave out empty rows",
        )


def spec_of(value: Any) -> TensorSpec:
    """The signature entry of an input or output of an InferenceSession."""
    shape = tuple("?" if d is None else d for d in value.shape)
    return TensorSpec(value.name, _DTYPES.get(value.type, value.type), shape)


def _numpy(dtype: str) -> str:
    return "bool" if dtype == "bool" else f"np.{dtype}"


def close_match(name: str, names: Sequence[str]) -> str:
    """A question that names the closest of `names`, or nothing where none is close."""
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]!r}?" if close else ""
