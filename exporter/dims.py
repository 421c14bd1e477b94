"""Which axes of the inputs vary, found by asking PyTorch, and what they are called.

torch.export finds the relations between axes (a mask as long as past and new tokens together)
by itself, with three blind spots that this module covers: it takes an axis of size 0 or 1 for a
constant (`widen`), it fixes some axes that PyTorch lets vary (`probe`), and it calls them s77.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from ..artifact import evaluate
from .names import flatten_inputs
from .source import Source


class Axis(NamedTuple):
    """One axis of one input, by the input's dotted name."""

    input: str
    at: int


def widen(source: Source) -> list[str]:
    """Grow the axes of size 0 and 1 of the example that PyTorch lets grow; returns notes.

    An axis is taken to vary where the module runs at two other sizes: at one it may only have
    met a broadcast (a mask of one head, grown to the two heads that the model has).
    """
    notes = []
    for size in (1, 0):
        for group in _small_axes(source, size):
            if not _grow_if_it_runs(source, group):
                continue
            axes = ", ".join(f"{a.input}[{a.at}]" for a in group)
            notes.append(f"{axes}: of size {size} in the example, taken to vary")
    return notes


def _small_axes(source: Source, size: int) -> Iterator[list[Axis]]:
    """Groups of axes to try together: all at one position, then each that is still small."""

    def small() -> list[Axis]:
        return [
            Axis(name, i)
            for name, t in flatten_inputs(source)
            for i, n in enumerate(t.shape)
            if n == size
        ]

    for position in sorted({a.at for a in small()}):
        group = [a for a in small() if a.at == position]
        yield group
        if len(group) > 1:
            yield from ([a] for a in group if a in small())
    if size == 0 and small():
        # An empty past: what was seen so far is longer too (the mask over past and new tokens).
        for other in [
            Axis(name, i)
            for name, t in flatten_inputs(source)
            for i, n in enumerate(t.shape)
            if n != 0 and i == t.dim() - 1 and not t.is_floating_point()
        ]:
            if not small():
                return
            yield [*small(), other]


def _grow_if_it_runs(source: Source, group: Iterable[Axis]) -> bool:
    group = list(group)
    trials = [_grown(source, group, by) for by in (2, 1)]
    if not all(_runs(source, *trial) for trial in trials):
        return False
    source.args, source.kwargs = trials[0] if 0 in _sizes(source, group) else trials[1]
    return True


def _sizes(source: Source, group: list[Axis]) -> set[int]:
    tensors = dict(flatten_inputs(source))
    return {tensors[a.input].shape[a.at] for a in group}


def _grown(source: Source, group: Iterable[Axis], by: int) -> tuple[tuple[Any, ...], Any]:
    """The example inputs with some axes longer by `by`, by repeating their last slices."""
    tensors = dict(flatten_inputs(source))
    ids = {id(t): name for name, t in tensors.items()}
    for axis in group:
        t = tensors[axis.input]
        have = t.shape[axis.at]
        if have:
            more = t.narrow(axis.at, have - 1, 1).repeat_interleave(by, dim=axis.at)
        else:
            shape = list(t.shape)
            shape[axis.at] = by
            more = torch.zeros(shape, dtype=t.dtype)
        tensors[axis.input] = torch.cat([t, more], dim=axis.at)

    def swap(leaf: Any) -> Any:
        return tensors[ids[id(leaf)]] if id(leaf) in ids else leaf

    grown: tuple[tuple[Any, ...], Any] = pytree.tree_map(swap, (source.args, source.kwargs))
    return grown


def _runs(source: Source, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    assert source.module is not None
    try:
        source.module(*args, **kwargs)
    except Exception:  # whatever it raises: this size is not one that it takes
        return False
    return True


def find_shapes(source: Source, exported: Any = None, more: Iterable[tuple[Axis, int]] = ()) -> Any:
    """Dynamic shapes for torch.export.

    Without `exported` every axis is left to torch.export to decide; with it, those that it left
    symbolic vary, and those of `more`, and all others are fixed.
    """
    vary = {a for a, _ in more}
    if exported is not None:
        vary |= {a for a, size in _exported_sizes(source, exported) if not isinstance(size, int)}
    names = {id(t): name for name, t in flatten_inputs(source)}

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        axes = range(leaf.dim())
        if source.dims:  # a source of a known kind names the axes that vary
            known = source.dims.get(names[id(leaf)], ())
            return {i: Dim.AUTO for i in axes if i < len(known) and known[i]}
        if exported is None:
            return dict.fromkeys(axes, Dim.AUTO)
        return {i: Dim.AUTO for i in axes if Axis(names[id(leaf)], i) in vary}

    assert source.module is not None
    bound = inspect.signature(source.module.forward).bind(*source.args, **source.kwargs)
    return pytree.tree_map(one, _without_dataclasses(dict(bound.arguments)))


def _without_dataclasses(tree: Any) -> Any:
    """The tree with each dataclass as the list of its fields, as dynamic shapes want them."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [_without_dataclasses(getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    if type(tree) is dict:
        return {k: _without_dataclasses(v) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_without_dataclasses(v) for v in tree)
    return tree


def probe(source: Source, exported: Any) -> list[tuple[Axis, int]]:
    """Axes that torch.export fixed although PyTorch runs with another size there.

    Axes of one size are tried together first and one by one after that: the length of a
    sequence often stands in several inputs. Those of size 0 and 1 were tried by `widen`.
    """
    fixed = [(a, n) for a, n in _exported_sizes(source, exported) if isinstance(n, int) and n > 1]
    missed: list[tuple[Axis, int]] = []
    for _, items in itertools.groupby(sorted(fixed, key=lambda x: x[1]), key=lambda x: x[1]):
        group = list(items)
        if _runs(source, *_grown(source, [a for a, _ in group], 3)):
            missed += group
        elif len(group) > 1:
            missed += [g for g in group if _runs(source, *_grown(source, [g[0]], 3))]
    return missed


def _exported_sizes(source: Source, exported: Any) -> list[tuple[Axis, Any]]:
    placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    tensors = [
        placeholders[name].meta["val"]
        for name in exported.graph_signature.user_inputs
        if name in placeholders and isinstance(placeholders[name].meta["val"], torch.Tensor)
    ]
    names = [name for name, _ in flatten_inputs(source)]
    return [
        (Axis(name, i), int(str(n)) if str(n).isdigit() else str(n))  # a fixed one is a SymInt too
        for name, t in zip(names, tensors, strict=True)
        for i, n in enumerate(t.shape)
    ]


# Names --------------------------------------------------------------------------------------

_WORD = re.compile(r"[A-Za-z_]\w*")


def name_symbols(model: ir.Model, source: Source) -> list[str]:
    """Call the dimensions batch, sequence, past_sequence, ... throughout the graph.

    Names that the user or the source gave stay. An axis 0 that all inputs share is the batch;
    an axis 1 of token ids, or of (batch, sequence, features), is a sequence.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        known = source.dims.get(value.name or "", ())
        for i, dim in enumerate(value.shape or ()):
            symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if symbol is None or not _WORD.fullmatch(symbol) or symbol in names:
                continue
            if i < len(known) and known[i]:
                names[symbol] = str(known[i])
            elif not re.fullmatch(r"s\d+", symbol):
                names[symbol] = symbol  # a torch.export.Dim of the user's
            else:
                names[symbol] = _guess(value, i, set(names.values()))
    axes = _axes(model)
    same = _same(source, axes)
    names |= {s: names[t] for s, t in same.items()}
    notes = []
    for symbol, size in _stuck(source, axes, same).items():
        notes.append(
            f"{names[symbol]} is fixed at {size}: torch.export let it vary, PyTorch itself ran at "
            "no other size"
        )
        names |= dict.fromkeys([symbol, *(s for s, t in same.items() if t == symbol)], str(size))
    for value in _all_values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(d, names) for d in value.shape])
    return notes


def _axes(model: ir.Model) -> dict[str, list[Axis]]:
    """The axes that each symbol is the size of, or a term of the size of."""
    axes: dict[str, list[Axis]] = {}
    for value in model.graph.inputs:
        for i, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value is not None:
                for symbol in _WORD.findall(dim.value):
                    axes.setdefault(symbol, []).append(Axis(str(value.name), i))
    return axes


def _grows(source: Source, axes: dict[str, list[Axis]], symbols: Iterable[str], by: int) -> bool:
    return _runs(source, *_grown(source, {a for s in symbols for a in axes[s]}, by))


def _same(source: Source, axes: dict[str, list[Axis]]) -> dict[str, str]:
    """Symbols that are one dimension: PyTorch runs when both grow and refuses when one does.

    torch.export leaves them apart where only a reshape ties them (the batches of query and key),
    or nothing but a concatenation (the caches of all layers).
    """
    if source.dynamic_shapes is not None or source.dims:
        return {}
    alike: dict[tuple[int, int], list[str]] = {}  # by traced size and position
    for symbol, where in axes.items():
        alike.setdefault((min(_sizes(source, where)), min(a.at for a in where)), []).append(symbol)
    same: dict[str, str] = {}
    for symbols in alike.values():
        tied = [s for s in symbols if len(symbols) > 1 and not _grows(source, axes, [s], 1)]
        while len(tied) > 1:
            first, *rest = tied
            partners = [s for s in rest if _grows(source, axes, [first, s], 1)]
            if not partners and _grows(source, axes, tied, 1):
                partners = rest  # no two of them may grow alone
            same |= dict.fromkeys(partners, first)
            tied = [s for s in rest if s not in partners]
    return same


def _stuck(source: Source, axes: dict[str, list[Axis]], same: dict[str, str]) -> dict[str, int]:
    """Symbols that PyTorch takes at their traced size only, and that size."""
    if source.dynamic_shapes is not None or source.dims:
        return {}
    stuck = {}
    for symbol in (s for s in axes if s not in same):
        group = [symbol, *(s for s, t in same.items() if t == symbol)]
        size = min(_sizes(source, axes[symbol]))
        # Doubled too: a size may have to be a multiple of something.
        if not any(_grows(source, axes, group, by) for by in (1, 2, 3, 4, 8, size)):
            stuck[symbol] = size
    return stuck


def fix_output_shapes(model: ir.Model, source: Source) -> None:
    """Correct declared shapes of outputs that are not those that PyTorch gives at other sizes.

    torch.export leaves the traced length in the shapes behind an LSTM or a GRU.
    """
    if source.dims:
        return
    assert source.module is not None
    axes = _axes(model)
    together = {a for where in axes.values() for a in where}
    wrong: dict[tuple[int, int], str] = {}
    for grown, where in axes.items():
        trials = (_grown(source, some, 3) for some in (where, together))
        args, kwargs = next((t for t in trials if _runs(source, *t)), (None, {}))
        if args is None:
            continue
        tensors = dict(flatten_inputs(source, args, kwargs))
        sizes = {
            str(d.value): tensors[str(v.name)].shape[i]
            for v in model.graph.inputs
            for i, d in enumerate(v.shape or ())
            if isinstance(d, ir.SymbolicDim) and _WORD.fullmatch(d.value or "")
        }
        leaves = pytree.tree_leaves(source.module(*args, **kwargs))
        tensors_out = [t for t in leaves if isinstance(t, torch.Tensor)]
        for k, (value, t) in enumerate(zip(model.graph.outputs, tensors_out, strict=True)):
            for i, dim in enumerate(value.shape or ()):
                said = evaluate(dim if isinstance(dim, int) else str(dim.value), sizes)
                if said is not None and said != t.shape[i]:
                    same = [s for s, n in sizes.items() if n == t.shape[i]]
                    own = f"{re.sub(r'[^0-9a-zA-Z_]', '_', str(value.name))}_axis_{i}"
                    wrong[k, i] = grown if grown in same else same[0] if len(same) == 1 else own
    for (k, i), name in wrong.items():
        model.graph.outputs[k].shape[i] = ir.SymbolicDim(name)  # type: ignore[index]
    if wrong:
        forget_shapes(model)


def restate(model: ir.Model, axes: Iterable[tuple[str, int]]) -> None:
    """Give axes of outputs names of their own: their sizes follow from no other dimension."""
    for value in model.graph.outputs:
        for name, i in axes:
            if value.name == name and value.shape is not None:
                own = re.sub(r"\W", "_", name)
                dims: list[Any] = list(value.shape)  # inferred shapes are frozen
                dims[i] = ir.SymbolicDim(f"{own}_axis_{i}")
                value.shape = ir.Shape(dims)
    forget_shapes(model)


def forget_shapes(model: ir.Model) -> None:
    """Drop the shapes of interior values, to be inferred again: one was wrong, others may be."""
    outputs = set(model.graph.outputs)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value not in outputs:
                value.shape = None


def _guess(value: ir.Value, axis: int, taken: set[str]) -> str:
    name = str(value.name)
    own = re.sub(r"\W", "_", name)
    prefix = next((p for p in ("past", "decoder", "encoder", "tgt") if name.startswith(p)), "")
    rank = len(value.shape or ())
    if axis == 0:
        guess = "batch" if rank > 1 else f"{own}_size"
    elif (axis == 1 and rank in (2, 3)) or (axis == 2 and prefix == "past"):
        guess = f"{prefix}_sequence" if prefix else "sequence"
    else:
        guess = f"{own}_axis_{axis}"
    for candidate in (guess, f"{own}_{guess}", f"{own}_axis_{axis}"):
        if candidate not in taken:
            return candidate
    return f"{own}_axis_{axis}_"


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> Any:
    if isinstance(dim, int) or dim.value is None:
        return dim
    text = str(dim.value)
    if text in names:
        text = names[text]
    else:
        long = {s: n if n.isalnum() or _WORD.fullmatch(n) else f"({n})" for s, n in names.items()}
        text = _WORD.sub(lambda m: long.get(m[0], m[0]), text)
        terms = text.split(" + ")
        if all(_WORD.fullmatch(t) for t in terms):  # one spelling for one size
            text = " + ".join(sorted(terms))
    size = int(text) if text.isdigit() else evaluate(text, {})  # where nothing in it varies
    return ir.SymbolicDim(text) if size is None else size


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs
