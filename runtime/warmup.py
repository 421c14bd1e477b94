"""Warming up: what is slow the first time happens before anybody waits for it.

Engines are built and sealed in the cache, kernels are loaded, the arena grows to its size, and CUDA
graphs are captured. Only engines outlive the process: a server calls `warm` on its own session.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..artifact import TensorSpec
from ..errors import ArtifactError, ProviderError, UsageError
from . import engine_cache, plans, providers
from .engine_cache import Entry
from .graph_file import read_graph
from .measure import random_feeds
from .opening import Model, locate
from .profiles import Range, names_of, ranges_of
from .session import Session, made_for
from .signature import Array

USUAL = 16  # of a size that nobody gave a range for; a batch is 1


def warmup(
    path: str | os.PathLike[str],
    *,
    provider: str | None = None,
    shapes: Mapping[str, Range] | None = None,
    cache: str | os.PathLike[str] | None = None,
    cuda_graph: bool = False,
    provider_options: Mapping[str, str | int | float | bool] | None = None,
    rebuild: bool = False,
    tell: Callable[[str], None] = lambda step: None,
) -> dict[str, Any]:
    """Build and seal the engines of a model, and run it at the ends of its ranges.

    Args:
        path: A model.onnx, or an artifact directory.
        provider: One provider; None takes the one that the artifact was made for.
        shapes: The least, best and greatest size of each name in the signature; None takes the
            manifest's.
        cache: Directory of engines; None takes `engine_cache.cache_directory()`.
        cuda_graph: Capture the runs too, which shows that they can be: the graphs themselves end
            with the process.
        provider_options: Options of that provider; a later session finds the engines if it is
            opened with the same.
        rebuild: Build engines again that are there and whole. Damaged ones always are.
        tell: Called with each step as it begins.

    Returns:
        `provider`; `open_seconds` of a session as the next one will take; `build_seconds`, None
        where nothing was built; `runs` as of `warm`; `cache`, the directory with its `bytes` and
        `engines`, or None; `note`, what of this outlives the process.

    Raises:
        ArtifactError: There is no model here.
        ProviderError: The provider is missing, or does not take every node.
        UsageError: Sizes, options or provider are wrong.
        OutputError: The cache cannot be written.
    """
    manifest, model = locate(path)
    asked = providers.resolve(made_for(manifest) if provider is None else provider)
    if len(asked) > 1:
        raise UsageError(
            f"a warmup is for one provider, not for {', '.join(asked)}", hint="one after the other"
        )
    (name,) = asked
    given = providers.spelled(asked, {name: provider_options} if provider_options else None)[name]
    if shapes is None and manifest is not None:
        shapes = manifest.runtime.get("shapes")
    entry, built = None, None
    if name == "tensorrt":
        specs = manifest.inputs if manifest else _signature(model)
        keyed, _ = plans.tensorrt_options(specs, shapes, cuda_graph=cuda_graph, given=given)
        graph = Model.of(model, manifest).shaping()
        entry = plans.entry_of(model, manifest, keyed, cache, graph)
        if rebuild or not _whole(entry, tell):
            built = _build(path, entry, given, shapes, cuda_graph, rebuild, tell)
    elif name == "openvino":
        cache = engine_cache.cache_directory(cache)  # it keeps graphs only where it is told to
    tell(f"opening with {name}")
    start = perf_counter()
    session = Session(
        path,
        provider=name,
        provider_options={name: given},
        shapes=shapes,
        cache=cache,
        cuda_graph=cuda_graph,
    )
    opened = perf_counter() - start
    tell("running")
    return {
        "provider": name,
        "open_seconds": opened,
        "build_seconds": built,
        "runs": warm(session, shapes=shapes, cuda_graph=cuda_graph),
        "cache": _kept(name, entry, cache),
        "note": _NOTES.get(name, "nothing of this outlives the process")
        + (", nor do CUDA graphs" if cuda_graph and name == "tensorrt" else ""),
    }


_NOTES = {
    "tensorrt": "a session with the same shapes and options opens these engines",
    "openvino": "OpenVINO keeps compiled graphs here, and takes them where they fit",
}


def warm(
    session: Session, *, shapes: Mapping[str, Range] | None = None, cuda_graph: bool = False
) -> list[dict[str, Any]]:
    """Run an open session at the least, the best and the greatest sizes, twice each.

    Args:
        session: The session; its own process keeps what it warms.
        shapes: The ranges; a name without one is 1 for a batch, else 16. One range for every name
            gives three points, none give one.
        cuda_graph: The session captures CUDA graphs: run through a binding, once to capture and
            once to replay. On TensorRT, which holds one of them, at the best sizes alone.

    Returns:
        For each point its `sizes`, and seconds of the `first` run and of one `again`.

    Raises:
        UsageError: Sizes for a name that no input has.
        InputError: A size outside the profiles, or feeds that cannot be made up.
    """
    ranges = ranges_of(session.inputs, shapes)
    points: list[dict[str, Any]] = []
    # TensorRT holds one CUDA graph a session: the best sizes get it.
    for point in (1,) if cuda_graph and session.provider == "tensorrt" else range(3):
        sizes = {n: 1 if n == "batch" else USUAL for n in names_of(session.inputs)}
        sizes |= {name: three[point] for name, three in ranges.items()}
        if any(p["sizes"] == sizes for p in points):
            continue
        feeds = feeds_of(session, sizes, given=ranges.keys())
        run = _bound(session, feeds) if cuda_graph else partial(session.run, feeds)
        first, again = _seconds(run), _seconds(run)
        points.append({"sizes": sizes, "first": first, "again": again})
    return points


def _bound(session: Session, feeds: Mapping[str, Array]) -> Callable[[], object]:
    binding = session.bind()
    for name, value in feeds.items():
        binding.input(name, value)
    return binding.run


def _seconds(run: Callable[[], object]) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def feeds_of(
    session: Session, sizes: dict[str, int], given: Collection[str] = ()
) -> dict[str, Array]:
    """Feeds of these sizes for any signature that we write: lengths agree with the tokens.

    Args:
        session: An open session.
        sizes: The size of each name; the capacity of a shared cache, unless it was `given`, is
            set to what the run needs.
        given: The names whose sizes the user gave.
    """
    kv = (session.manifest.kv if session.manifest else None) or {}
    lengths, total = kv.get("lengths", "seqlens_k"), kv.get("total", "total_sequence_length")
    shared = any(spec.name == lengths for spec in session.inputs)
    if shared and "capacity" not in given:  # the cache holds at least what this run writes
        sizes["capacity"] = max(sizes.get("sequence", 1), kv.get("window", 1))
    # Ids of 0 and 1 are in any vocabulary.
    feeds = random_feeds(session.inputs, sizes, high={spec.name: 2 for spec in session.inputs})
    if shared:  # every row is new, and as long as the run
        tokens = sizes["sequence"]
        feeds[lengths] = np.full_like(feeds[lengths], tokens - 1)
        feeds[total] = np.full_like(feeds[total], tokens)
    return feeds


def _signature(model: Path) -> tuple[TensorSpec, ...]:
    try:
        return read_graph(model).inputs
    except ValueError as e:
        raise ArtifactError(f"the graph cannot be read: {e}", where=str(model)) from e


def _whole(entry: Entry, tell: Callable[[str], None]) -> bool:
    """Whether the engines are there; a damaged set, or another machine's, is built anew."""
    try:
        return entry.check() is not None
    except ProviderError as e:
        tell(f"building anew: {e.what}")
        return False


def _build(
    path: str | os.PathLike[str],
    entry: Entry,
    given: Mapping[str, str],
    shapes: Mapping[str, Range] | None,
    cuda_graph: bool,
    rebuild: bool,
    tell: Callable[[str], None],
) -> float | None:
    """Open a session that leaves its engines in the cache; the seconds that it took.

    None where another process has built them while this one waited for its turn.
    """
    start = perf_counter()
    with entry.build(rebuild=rebuild) as folder:
        if folder is None:
            return None
        tell(f"building engines for {entry.machine.get('GPU') or 'this GPU'}")
        own = {**given, **plans.building_options(folder)}
        Session(
            path,
            provider="tensorrt",
            provider_options={"tensorrt": own},
            shapes=shapes,
            cuda_graph=cuda_graph,
        )
        if not any(folder.glob("*.engine")):
            raise ProviderError(
                "TensorRT built no engine, and said nothing",
                where=str(path),
                hint="look at its log: provider_options trt_detailed_build_log=True",
            )
    return perf_counter() - start


def _kept(
    name: str, entry: Entry | None, cache: str | os.PathLike[str] | None
) -> dict[str, Any] | None:
    if entry is not None and (sealed := entry.check()):
        size = sum(int(want["bytes"]) for want in sealed.files.values())
        return {"folder": str(sealed.folder), "bytes": size, "engines": sealed.engines}
    place = plans.openvino_cache(cache)
    if name == "openvino" and place.is_dir():
        files = [p for p in place.rglob("*") if p.is_file()]
        size = sum(p.stat().st_size for p in files)
        return {"folder": str(place), "bytes": size, "engines": len(files)}
    return None
