"""What a graph is held against: PyTorch, or for an adopted ONNX file the file itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import _pytree as pytree

from .capture import quiet, reference_mode
from .names import flatten_inputs
from .source import Source

Array = npt.NDArray[Any]
Feeds = dict[str, Array]


@dataclass(frozen=True)
class Reference:
    """What a graph is held against.

    Attributes:
        name: Who computes it, for the manifest: "torch 2.13.0".
        run: Feeds by name to the outputs in the graph's order; whatever it raises means that
            it does not take these feeds.
        prepare: Feeds by name to a call that computes the same and nothing else, to be timed.
        examples: One value of each input: its dtype, its kind of values, and the sizes of the
            dimensions that vary.
        settle: Makes fresh feeds ones that can occur, where not every value can.
        highs: Exclusive upper bounds of integer inputs.
        limits: Largest sizes of dimensions.
        least: Smallest sizes of dimensions.
        strict: Whether every dimension of the signature has to be seen to vary.
    """

    name: str
    run: Callable[[Feeds], Sequence[Array]]
    prepare: Callable[[Feeds], Callable[[], object]]
    examples: Feeds
    settle: Callable[[Feeds], Feeds] = lambda feeds: feeds
    highs: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
    strict: bool = True


def pytorch(source: Source) -> Reference:
    """The source's module as a reference."""
    module = source.module
    assert module is not None
    tensors = flatten_inputs(source)
    names = {id(t): name for name, t in tensors}

    def arguments(feeds: Feeds) -> Any:
        def swap(leaf: Any) -> Any:
            if id(leaf) not in names:
                return leaf
            return torch.from_numpy(feeds[names[id(leaf)]].copy()).to(leaf.dtype)

        return pytree.tree_map(swap, (source.args, source.kwargs))

    def run(feeds: Feeds) -> list[Array]:
        args, kwargs = arguments(feeds)
        with torch.no_grad(), reference_mode(), quiet():
            output = module(*args, **kwargs)
        return [_numpy(t) for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]

    def prepare(feeds: Feeds) -> Callable[[], object]:
        args, kwargs = arguments(feeds)
        return torch.inference_mode()(lambda: module(*args, **kwargs))

    return Reference(
        name=f"torch {torch.__version__.split('+')[0]}",
        run=run,
        prepare=prepare,
        settle=lambda feeds: _written_past(source, run, feeds) if source.kv else feeds,
        examples={name: _numpy(t) for name, t in tensors},
        highs=source.highs,
        limits=source.limits,
        least=source.least,
    )


def _written_past(source: Source, run: Callable[[Feeds], list[Array]], feeds: Feeds) -> Feeds:
    """Feeds with a cache that the model itself wrote, on as many fresh tokens before.

    Random keys and values are nothing that a model ever meets: they drive its activations so
    high that float32 rounding alone would pass the tolerance.
    """
    past = [name for name in feeds if name.startswith("past_key_values.")]
    batch, _, length, _ = feeds[past[0]].shape
    if not length:
        return feeds
    rng = np.random.default_rng(length)
    prefix = {
        **{name: feeds[name][:, :, :0] for name in past},
        "input_ids": rng.integers(0, source.highs["input_ids"], size=(batch, length)),
        "attention_mask": feeds["attention_mask"][:, :length],
        "position_ids": np.broadcast_to(np.arange(length), (batch, length)).copy(),
    }
    given = {name: prefix[name] for name in feeds}
    return {**feeds, **dict(zip(past, run(given)[1:], strict=True))}


def _numpy(t: torch.Tensor) -> Array:
    t = t.detach()
    if t.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(t.numpy())
