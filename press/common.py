"""What the road, the proof and the timing share: a source's reference, and the export extra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import models
from ..artifact import TensorSpec
from ..errors import ArtifactError, MissingPackage, OnnxpressError, SourceError

if TYPE_CHECKING:
    from ..exporter import Reference, Source
    from ..runtime import Session

EXPORT_HINT = "pip install 'onnxpress[export]' (and [cpu] or [gpu] to run it)"


@contextmanager
def needs_export() -> Iterator[None]:
    """Turn a failed import into a MissingPackage with the pip line."""
    try:
        yield
    except ImportError as e:
        raise MissingPackage(
            f"exporting needs {e.name or e}, which is not installed", hint=EXPORT_HINT
        ) from e


def reference_of(source: Source) -> Reference:
    """PyTorch; for an adopted ONNX file the file itself, run without any optimization.

    Dimensions that the file leaves without a name get theirs here, in the adopted graph too.
    """
    from ..exporter import Reference, adopt, pytorch
    from ..runtime import Session

    if source.module is not None:
        return pytorch(source)
    try:
        original = Session(source.spec, optimize=False)
    except ArtifactError as e:  # it is no artifact yet, but what the user gave
        raise SourceError(e.what, where=source.spec) from e
    inputs, examples = _name_dims(original)
    if source.graph is not None:
        adopt.name_dims(source.graph.graph, inputs)
    return Reference(
        name="the adopted file",
        strict=False,
        run=lambda feeds: list(original.run(feeds).values()),
        prepare=lambda feeds: lambda: original.run(feeds),
        examples=examples,
    )


def _name_dims(original: Session) -> tuple[tuple[TensorSpec, ...], dict[str, Any]]:
    """The inputs of an adopted file, every dimension named, and values that it runs on.

    The first names and sizes that it runs with; where it runs with none, the check says so.
    """
    from ..exporter import adopt
    from ..runtime import random_feeds

    first = None
    for start in (2, 13, 61):  # a convolution or a pooling may want more than a few
        for inputs in adopt.namings(original.inputs):
            sizes = {name: start + i for i, name in enumerate(symbols(inputs))}
            feeds = random_feeds(inputs, sizes, high={spec.name: 2 for spec in inputs})
            first = first or (inputs, feeds)
            try:
                original.run(feeds)
            except OnnxpressError:
                continue
            return inputs, feeds
    assert first is not None
    return first


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
