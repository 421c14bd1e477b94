"""What the road, the proof and the timing share: a source's reference, and the export extra."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .. import models
from ..artifact import TensorSpec
from ..errors import ArtifactError, MissingPackage, SourceError

if TYPE_CHECKING:
    from ..exporter import Reference, Source

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
    """PyTorch; for an adopted ONNX file the file itself, run without any optimization."""
    from ..exporter import Reference, pytorch
    from ..runtime import Session, random_feeds

    if source.module is not None:
        return pytorch(source)
    try:
        original = Session(source.spec, optimize=False)
    except ArtifactError as e:  # it is no artifact yet, but what the user gave
        raise SourceError(e.what, where=source.spec) from e
    sizes = {name: 2 + i for i, name in enumerate(symbols(original.inputs))}
    names = [spec.name for spec in original.inputs]
    return Reference(
        name="the adopted file",
        run=lambda feeds: list(original.run(feeds).values()),
        prepare=lambda feeds: lambda: original.run(feeds),
        examples=random_feeds(original.inputs, sizes, high=dict.fromkeys(names, 2)),
    )


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
