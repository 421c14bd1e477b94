"""Which of the providers that were asked for takes a model, and why the others did not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import Manifest
from ..errors import ProviderError, UsageError
from . import graph_capture, plans, providers
from .opening import Model, Skipped
from .placement import Placement, placed_nodes
from .profiles import NoProfile

CAPTURING = ("cuda", "tensorrt")  # providers that have CUDA graphs


@dataclass(frozen=True)
class Wish:
    """What a session was asked to be.

    Attributes:
        asked: The providers in order of preference, by short name.
        options: The user's options by provider.
        manifest: Of the artifact; None for a bare model.onnx.
        shapes: Least, best and greatest size by name; None for what the manifest says.
        cache: Directory of engines; None for the usual one.
        cuda_graph: Record and replay the kernels of a run.
    """

    asked: Mapping[str, providers.Provider]
    options: providers.ProviderOptions
    manifest: Manifest | None
    shapes: Mapping[str, tuple[int, int, int]] | None
    cache: Path | None
    cuda_graph: bool


Taken = tuple[dict[str, plans.Plan], Any, tuple[Skipped, ...]]


def take(model: Model, wish: Wish, *, allow_fallback: bool) -> Taken:
    """Open the model as it was asked for.

    Returns:
        The plan of each provider in use, the InferenceSession, and the providers that were
        skipped before it.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph.
        ProviderError: None takes every node; or with `allow_fallback` one is not there.
        UsageError: Options for a provider that was not asked for, CUDA graphs without one that
            has them, or sizes missing for the only provider, which needs them.
    """
    options = providers.spelled(wish.asked, wish.options)
    if wish.cuda_graph and not set(wish.asked) & set(CAPTURING):
        raise UsageError(
            f"there are no CUDA graphs on {' or '.join(wish.asked)}",
            hint="cuda_graph=True goes with provider='cuda' or 'tensorrt'",
        )
    if allow_fallback:
        return _spread(model, wish, options)
    skipped: list[Skipped] = []
    for name in wish.asked:
        try:
            plan = _prepared(model, wish, name, options[name])
            session = model.strict({name: plan}, captures=plan.graph_option)
        except (ProviderError, NoProfile) as e:
            if len(wish.asked) == 1:
                raise
            skipped.append(Skipped(name, e.what, e.hint or ""))
        else:
            return {name: plan}, session, tuple(skipped)
    raise ProviderError(
        f"none of {', '.join(wish.asked)} takes every node:"
        + "".join(f"\n  {one}" for one in skipped),
        where=str(model.path),
        hint="mend one of these, or add cpu at the end of the list",
    )


def _spread(model: Model, wish: Wish, options: Mapping[str, dict[str, str]]) -> Taken:
    names = [n for n in wish.asked if n != "cpu"] + ["cpu"]
    made = {n: _prepared(model, wish, n, options.get(n, {})) for n in names}
    session = model.strict(made)
    if wish.cuda_graph:
        graph_capture.check_capturable(
            Placement(placed_nodes(session), None),
            next(providers.PROVIDERS[n].ort for n in names if n in CAPTURING),
            str(model.path),
        )
    return made, session, ()


def _prepared(model: Model, wish: Wish, name: str, options: Mapping[str, str]) -> plans.Plan:
    """The plan of one provider, whose libraries have been found."""
    cudnn_for = model.needs_cudnn(options) if name == "cuda" else ""
    providers.check_here(model.rt, name, cudnn_for=cudnn_for)
    manifest = wish.manifest
    return plans.plan(
        name,
        specs=manifest.inputs if manifest else model.graph().inputs,
        model=model.path,
        manifest=manifest,
        shapes=wish.shapes,
        cache=wish.cache,
        cuda_graph=wish.cuda_graph and name in CAPTURING,
        graph=model.shaping(),
        given=options,
    )
