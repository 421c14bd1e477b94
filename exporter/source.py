"""What to export: a module with example inputs, from any of the places that a user can name.

package.module:factory, path/to/file.py:factory    the user's own code        factory.py
encoder-tiny, ...                                  a model of models/         here
a directory or hub id                              Hugging Face               huggingface.py
model.onnx                                         adopted as it is           adopt.py
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from .. import models
from ..artifact import MANIFEST
from ..errors import SourceError

if TYPE_CHECKING:
    import onnx_ir as ir

TASKS = ("embed", "classify", "answer", "generate", "translate", "tensors")


@dataclass
class Source:
    """A model that can be captured, and what its task needs beside the graph.

    Attributes:
        spec: The source as the user named it.
        kind: factory, model, huggingface or onnx.
        task: One of `TASKS`.
        module: In eval mode; None for an adopted ONNX file.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        dynamic_shapes: As torch.export takes them; None where they are to be found.
        settings: The task's settings, for the manifest.
        kv: The layout of a generate model's cache, for the manifest.
        files: Further files of the artifact: tokenizer.json, config.json.
        highs: Exclusive upper bounds of integer inputs (vocabulary sizes), by name.
        limits: Largest sizes of dimensions, by dimension name.
        least: Smallest sizes of dimensions, by dimension name.
        weights_sha256: Over the weight files, or over the module's state where there are none.
        graph: The adopted graph of an ONNX file.
        notes: What was decided while the source was built, for the user to read.
        dims: Names of the dimensions of each input, where they are known beforehand.
        fallback: Another way to the graph, for a module that torch.export does not take as it is.
    """

    spec: str
    kind: str
    task: str
    module: torch.nn.Module | None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    kv: dict[str, Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    highs: dict[str, int] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    least: dict[str, int] = field(default_factory=dict)
    weights_sha256: str = ""
    graph: ir.Model | None = None
    notes: list[str] = field(default_factory=list)
    dims: dict[str, tuple[str | None, ...]] = field(default_factory=dict)
    fallback: Callable[[], ir.Model] | None = None


def resolve(spec: str, *, task: str | None = None, trust_pickle: bool = False) -> Source:
    """Find and build the model that `spec` names.

    Args:
        spec: See the head of this file.
        task: One of `TASKS`; found from the source where it is None.
        trust_pickle: Read pickled weights, which can run code of whoever wrote them.

    Raises:
        SourceError: Nothing of that name, or it cannot be read or built.
        MissingPackage: A package that this source needs is not installed.
    """
    from . import adopt, factory, huggingface

    if task is not None and task not in TASKS:
        raise SourceError(f"unknown task {task!r}", hint="one of " + ", ".join(TASKS))
    path = Path(spec)
    if path.suffix == ".onnx":
        return adopt.build(spec, task)
    if spec in models.names():
        return _named(spec, task)
    if (path / MANIFEST).is_file():
        raise SourceError(
            "this is an artifact, not a source: it was pressed already",
            where=spec,
            hint="name what it was made of; `onnxpress inspect DIR` says what that was",
        )
    if (spec and path.is_dir()) or path.suffix == ".gguf":
        return huggingface.build(spec, path, task, trust_pickle=trust_pickle)
    if factory.looks_like(spec):
        return factory.build(spec, task)
    if huggingface.looks_like_hub_id(spec):
        return huggingface.build(spec, huggingface.download(spec), task, trust_pickle=trust_pickle)
    raise SourceError(
        f"there is no source {spec!r}",
        hint="a directory of a Hugging Face model, package.module:factory, "
        "path/to/file.py:factory, an .onnx file, or one of: " + ", ".join(models.names()),
    )


def _named(spec: str, task: str | None) -> Source:
    if task not in (None, "tensors"):
        raise SourceError(
            f"{spec} of models/ has random weights and no tokenizer: its task is tensors",
            hint="leave --task out",
        )
    module, example = models.example(spec)
    return from_factory(spec, "model", (module, example))


def from_factory(spec: str, kind: str, made: Any, task: str | None = None) -> Source:
    """Build a source of what a factory returned: (module, example_inputs[, dynamic_shapes]).

    Raises:
        SourceError: It is something else.
    """
    where = spec
    if not (isinstance(made, tuple) and len(made) in (2, 3)):
        raise SourceError(
            f"a factory returns (module, example_inputs), this one returned {_kind(made)}",
            where=where,
            hint="return an nn.Module and a tuple or dict of tensors",
        )
    module, example, *rest = made
    if not isinstance(module, torch.nn.Module):
        raise SourceError(
            f"the factory's first item is {_kind(module)}, not an nn.Module", where=where
        )
    if any(t.is_meta for t in module.state_dict().values() if isinstance(t, torch.Tensor)):
        raise SourceError(
            "the module has no weights: they are on the meta device",
            where=where,
            hint="load them in the factory",
        )
    if isinstance(example, torch.Tensor):
        example = (example,)
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    elif isinstance(example, tuple | list):
        args, kwargs = tuple(example), {}
    else:
        raise SourceError(
            f"the example inputs are {_kind(example)}, not a tuple or dict of tensors", where=where
        )
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as e:
        raise SourceError(
            f"the example inputs do not fit forward{inspect.signature(module.forward)}: {e}",
            where=where,
        ) from None
    leaves = pytree.tree_leaves(register((args, kwargs)))
    given = [t for t in leaves if isinstance(t, torch.Tensor)]
    if not given:
        raise SourceError("the example inputs hold no tensor", where=where)
    if any(t.is_meta for t in given):
        raise SourceError(
            "the example inputs have no values: they are on the meta device", where=where
        )
    args, kwargs = clone(args), clone(_in_order(module, kwargs))
    shapes = rest[0] if rest else None
    if isinstance(shapes, Mapping):
        shapes = _in_order(module, dict(shapes))
    dims = [d for d in pytree.tree_leaves(shapes) if isinstance(d, torch.export.Dim)]
    return Source(
        spec=spec,
        kind=kind,
        task=task or "tensors",
        module=module.eval().cpu(),
        args=args,
        kwargs=kwargs,
        dynamic_shapes=shapes,
        limits={d.__name__: d.max for d in dims if isinstance(d.max, int)},
        least={d.__name__: d.min for d in dims if isinstance(d.min, int)},
        weights_sha256=state_sha256(module),
    )


def clone(tree: Any) -> Any:
    """Every tensor of a tree on its own.

    The same tensor given for two inputs is one input to torch.export: the second would be left
    in the graph unused, and feeding it would change nothing.
    """

    def one(leaf: Any) -> Any:
        return leaf.detach().cpu().clone() if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(one, register(tree))


def register(tree: Any) -> Any:
    """Teach torch's pytree the dataclasses in a tree of inputs or outputs; returns the tree."""
    seen: list[Any] = [tree]
    while seen:
        item = seen.pop()
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            if type(item) not in pytree.SUPPORTED_NODES:
                torch.export.register_dataclass(type(item))
            seen += [getattr(item, f.name) for f in dataclasses.fields(item)]
        elif isinstance(item, Mapping):
            seen += item.values()
        elif isinstance(item, tuple | list):
            seen += item
    return tree


def state_sha256(module: torch.nn.Module) -> str:
    """One sha256 over the names, dtypes, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, t in sorted(module.state_dict().items()):
        if not isinstance(t, torch.Tensor):
            continue
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        flat = t.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _in_order(module: torch.nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = list(inspect.signature(module.forward).parameters)
    known = [n for n in names if n in kwargs]
    return {n: kwargs[n] for n in dict.fromkeys([*known, *kwargs])}


def _kind(value: Any) -> str:
    inner = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"an object of type {type(value).__name__}{inner}"
