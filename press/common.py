"""What the verbs share: a source's reference, runs of a graph, and the export extra."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import models
from ..artifact import TensorSpec, save_model
from ..errors import (
    ArtifactError,
    InputError,
    MissingPackage,
    OnnxpressError,
    ProviderError,
    SourceError,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..exporter import Reference, Source
    from ..runtime import Session

Feeds = dict[str, Any]

EXPORT_HINT = "pip install 'onnxpress[export]' (and [cpu] or [gpu] to run it)"


@contextlib.contextmanager
def needs_export() -> Iterator[None]:
    """Turn a failed import into a MissingPackage with the pip line."""
    try:
        yield
    except ImportError as e:
        raise MissingPackage(
            f"exporting needs {e.name or e}, which is not installed", hint=EXPORT_HINT
        ) from e


def reference_of(source: Source, file: str | os.PathLike[str] | None = None) -> Reference:
    """PyTorch; for a graph that is adopted its own file, run without any optimization.

    Dimensions that the file leaves without a name get theirs here, in the adopted graph too.

    Args:
        source: The source.
        file: Where the adopted graph lies: an ONNX file, or the directory of an artifact.
    """
    from ..exporter import adopt, pytorch
    from ..runtime import Session

    if source.module is not None:
        return pytorch(source)
    assert file is not None
    try:
        original = Session(file, provider="cpu", optimize=False)
    except (ArtifactError, ProviderError) as e:  # it is no artifact yet, but what the user gave
        again = "export it again at opset 7 or newer, or without that op"
        hint = None if Path(file).is_dir() else again
        raise SourceError(e.what, where=os.fspath(file), hint=hint) from e
    name = "the artifact before" if Path(file).is_dir() else "the adopted file"
    inputs, reference = reference_of_session(original, name)
    if source.graph is not None:
        adopt.name_dims(source.graph.graph, inputs)
    if source.kv:
        return replace(reference, settle=lambda f: _written_past(source.kv or {}, reference, f))
    return reference


def reference_of_session(original: Session, name: str) -> tuple[tuple[TensorSpec, ...], Reference]:
    """A graph as a reference for others; and its inputs, with a name for each dimension.

    Where ONNX Runtime runs it with no sizes at all, onnx's own evaluator does: some kernels take
    less than ONNX lets an exporter write, and the passes are there to mend that.
    """
    from ..exporter import Reference

    runner: Session | _Evaluator = original
    found = _name_dims(runner)
    if found is None:
        with contextlib.suppress(OnnxpressError):
            evaluator = _Evaluator(original)
            if found := _name_dims(evaluator):
                runner, name = evaluator, f"onnx's evaluator on {name}"
    inputs, examples = found or _first_names(original)
    return inputs, Reference(
        name=name,
        strict=False,
        run=lambda feeds: list(runner.run(feeds).values()),
        prepare=lambda feeds: lambda: runner.run(feeds),
        examples=examples,
    )


class _Evaluator:
    """onnx's own evaluator of a graph: numpy, slow, and complete."""

    def __init__(self, session: Session) -> None:
        from onnx.reference import ReferenceEvaluator

        self.inputs = session.inputs
        self._names = [o.name for o in session.outputs]
        try:
            self._evaluator = ReferenceEvaluator(str(session.path))
        except Exception as e:  # it knows ai.onnx alone, and says so in many ways
            raise InputError(f"onnx's evaluator does not take the graph: {e}") from e

    def run(self, feeds: Feeds) -> Feeds:
        """The outputs by name."""
        try:
            values = self._evaluator.run(None, feeds)
        except Exception as e:  # whatever numpy raises
            raise InputError(f"onnx's evaluator did not run: {e}") from e
        return dict(zip(self._names, values, strict=True))


def _name_dims(original: Session | _Evaluator) -> tuple[tuple[TensorSpec, ...], Feeds] | None:
    """The inputs of an adopted file, every dimension named, and values that it runs on.

    The first names and sizes that it runs with; None where it runs with none.
    """
    for inputs, feeds in _attempts(original.inputs):
        try:
            original.run(feeds)
        except OnnxpressError:
            continue
        return inputs, _with_ids(original, feeds)
    return None


def _with_ids(original: Session | _Evaluator, feeds: Feeds) -> Feeds:
    """Feeds with several ids where it takes them: 0 and 1 alone would pass for a mask."""
    for name, value in feeds.items():
        if "ids" not in name or value.dtype.kind not in "iu":
            continue
        trial = {**feeds, name: np.resize(np.arange(8), value.shape).astype(value.dtype)}
        with contextlib.suppress(OnnxpressError):
            original.run(trial)
            feeds = trial
    return feeds


def _first_names(original: Session) -> tuple[tuple[TensorSpec, ...], Feeds]:
    return next(_attempts(original.inputs))


def _attempts(
    given: Sequence[TensorSpec],
) -> Iterator[tuple[tuple[TensorSpec, ...], Feeds]]:
    from ..exporter import adopt
    from ..runtime import random_feeds

    for start in (2, 13, 61):  # a convolution or a pooling may want more than a few
        for inputs in (*adopt.namings(given), *adopt.namings(_tied(given))):
            sizes = {name: start + i for i, name in enumerate(symbols(inputs))}
            yield inputs, random_feeds(inputs, sizes, high={spec.name: 2 for spec in inputs})


def _tied(inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The inputs with one name for each axis: exporters also give one size several names."""
    names: dict[int, str] = {}
    for spec in inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str) and dim.isidentifier():
                names.setdefault(axis, dim)
    return tuple(
        replace(
            spec,
            shape=tuple(
                names[axis] if isinstance(d, str) and d.isidentifier() else d
                for axis, d in enumerate(spec.shape)
            ),
        )
        for spec in inputs
    )


def _written_past(kv: dict[str, Any], reference: Reference, feeds: Feeds) -> Feeds:
    """Feeds with a cache that the model itself wrote, for as many fresh tokens before.

    A cache of random numbers is nothing that a model ever meets: its activations grow so large
    that rounding alone would pass the tolerance.
    """
    parts = [(layer, part) for layer in range(kv["layers"]) for part in ("key", "value")]
    past = [kv["past"].format(layer=layer, part=part) for layer, part in parts]
    batch, _, length, _ = feeds[past[0]].shape
    if not length:
        return feeds
    ids = feeds["input_ids"]
    given = {
        **feeds,
        **{name: feeds[name][:, :, :0] for name in past},
        "input_ids": np.resize(ids, (batch, length)).astype(ids.dtype),
        "attention_mask": feeds["attention_mask"][:, :length],
        "position_ids": np.resize(np.arange(length), (batch, length)),
    }
    written = reference.run({name: given[name] for name in feeds})
    return {**feeds, **dict(zip(past, written[1:], strict=True))}


def graph_signature(
    model: ir.Model,
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and the outputs of a graph as ONNX Runtime would name them."""

    def spec(value: ir.Value) -> TensorSpec:
        dims = () if value.shape is None else value.shape
        shape = (d if isinstance(d, int) else str(d.value or "?") for d in dims)
        if value.dtype is None:
            dtype = "?"
        else:
            known = np.dtype(value.dtype.numpy())  # ml_dtypes' where numpy has none of its own
            own = known.isbuiltin == 1
            dtype = known.name if own else f"tensor({value.dtype.name.lower()})"
        return TensorSpec(str(value.name), dtype, tuple(shape))

    graph = model.graph
    inputs = (v for v in graph.inputs if v.name not in graph.initializers)
    return tuple(map(spec, inputs)), tuple(map(spec, graph.outputs))


def run_model(model: ir.Model, feeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Run a graph in ONNX Runtime on the CPU, just as it is.

    Raises:
        OnnxpressError: It cannot be loaded, or does not take the feeds.
    """
    from ..runtime import Session

    with tempfile.TemporaryDirectory() as folder:
        save_model(model.clone(), folder)
        session = Session(folder, optimize=False)
        return [session.run(dict(given)) for given in feeds]


def some_feeds(reference: Reference, inputs: Sequence[TensorSpec], count: int = 3) -> list[Feeds]:
    """Feeds at the first points that a reference takes: few, for a check after every pass."""
    from ..exporter.points import Points

    points = Points(reference, inputs, seed=1)
    found: list[Feeds] = []
    for point in points:
        if len(found) == count:
            break
        try:
            feeds = points.feeds(point)
            reference.run(feeds)
        except Exception:  # whatever it raises: it does not take this point
            continue
        found.append(feeds)
    return found


def is_data(spec: str) -> bool:
    """Whether a source that a manifest names may be read without the user naming it.

    An artifact may come from anyone: what it names must not make us run code or reach a network.
    So it is the spec that counts, as `exporter.resolve` reads it, and not the manifest's `kind`.
    """
    path = Path(spec)
    return spec in models.names() or path.suffix in (".onnx", ".gguf") or path.is_dir()


def symbols(inputs: Sequence[TensorSpec]) -> list[str]:
    """The names of the dimensions that vary, in the order of the inputs."""
    dims = (d for spec in inputs for d in spec.shape if isinstance(d, str))
    return list(dict.fromkeys(d for d in dims if d.isidentifier()))
