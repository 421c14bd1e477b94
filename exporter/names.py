"""Names of a graph's inputs and outputs, from forward's parameters and the output's fields."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import ExportError
from .source import Source


def flatten_inputs(
    source: Source, args: tuple[Any, ...] | None = None, kwargs: dict[str, Any] | None = None
) -> list[tuple[str, torch.Tensor]]:
    """Every tensor of the example inputs (or of others) with its dotted name, in graph order.

    `forward(ids, past)` with `past=[{"key": k}]` gives `ids` and `past.0.key`.
    """
    assert source.module is not None
    parameters = inspect.signature(source.module.forward).parameters.values()
    positional = [p for p in parameters if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    found = []
    for i, value in enumerate(source.args if args is None else args):
        p = positional[min(i, len(positional) - 1)]
        star = p.kind is p.VAR_POSITIONAL
        name = f"{p.name}.{i - len(positional) + 1}" if star else p.name
        found += _leaves(name, value)
    for name, value in (source.kwargs if kwargs is None else kwargs).items():
        found += _leaves(name, value)
    tensors = [(n, t) for n, t in found if isinstance(t, torch.Tensor)]
    return list(zip(_unique([n for n, _ in tensors]), (t for _, t in tensors), strict=True))


def flatten_outputs(output: Any) -> list[str]:
    """The name of every tensor of a module's output, in the graph's order.

    A tensor is `output`; of a tuple the items are `output`, `output_1`, ...; of a dict, a named
    tuple or a dataclass the fields keep their names, nested ones dotted.

    Raises:
        ExportError: The module returns no tensor, or a number or text among its tensors.
    """
    names = []
    count = 0
    for path, leaf in pytree.tree_flatten_with_path(output)[0]:
        keys = [_key(k) for k in path]
        if leaf is None:
            continue
        if not isinstance(leaf, torch.Tensor):
            raise ExportError(
                f"the module returns a {type(leaf).__name__} at {'.'.join(keys) or 'the top'}",
                hint="a graph returns tensors: torch.tensor(n) for a number; leave out the rest",
            )
        if all(k.isdigit() for k in keys):  # a bare tensor, or tuples of them
            names.append(f"output_{count}" if count else "output")
            count += 1
        else:
            names.append(".".join(keys) if not keys[0].isdigit() else ".".join(["output", *keys]))
    if not names:
        raise ExportError("the module returns no tensor")
    return _unique(names)


def free_name(name: str, taken: Collection[str]) -> str:
    """The name, or where it is taken the name with _1, _2, ... behind it."""
    free, count = name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free


def _unique(names: Sequence[str]) -> list[str]:
    """The names, each once: {"a.b": t, "a": {"b": u}} has a dotted name twice."""
    found: list[str] = []
    for i, name in enumerate(names):
        found.append(free_name(name, {*found, *names[i + 1 :]}) if name in found else name)
    return found


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    pairs = pytree.tree_flatten_with_path(value)[0]
    return [(".".join([name, *(_key(k) for k in path)]), leaf) for path, leaf in pairs]


def _key(key: Any) -> str:
    """The text of one step of a pytree path: an index, a dict's key or a field."""
    for attribute in ("idx", "key", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
