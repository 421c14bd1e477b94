"""Which distributions on this machine provide the module `onnxruntime`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ..artifact import ORT_RANGE
from ..errors import ProviderError

# The wheels that provide the module `onnxruntime`.
WHEELS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-qnn",
    "onnxruntime-migraphx",
    "onnxruntime-rocm",
    "onnxruntime-silicon",
)

# Versions that artifacts are checked on, where they are not artifact.ORT_RANGE: each wheel has
# its own releases.
RANGES = {"onnxruntime-openvino": ">=1.24,<1.25"}


@dataclass(frozen=True)
class Wheel:
    """An installed distribution that provides the module `onnxruntime`, and the module's folder."""

    name: str
    version: str
    folder: Path

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def wheels() -> list[Wheel]:
    """Every distribution on sys.path that brings a folder `onnxruntime`, in the path's order."""
    found = {}
    for name in WHEELS:
        for one in metadata.distributions(name=name):
            folder = Path(str(one.locate_file("onnxruntime"))).resolve()
            if (folder / "__init__.py").is_file():
                found[name, folder] = Wheel(name, one.version, folder)
    places = [str(Path(p).resolve()) for p in sys.path]
    return sorted(
        found.values(),
        key=lambda w: places.index(p) if (p := str(w.folder.parent)) in places else len(places),
    )


def declared(wheel: Wheel) -> str:
    """The versions of a wheel that artifacts are checked on, as pip writes them."""
    return RANGES.get(wheel.name, ORT_RANGE)


def wheel_of(folder: Path) -> Wheel | None:
    """The distribution that an imported onnxruntime came from; the first of two in one folder."""
    return next((w for w in wheels() if w.folder == folder.resolve()), None)


def duplicates() -> list[Wheel]:
    """Wheels that own the same folder, so that each has overwritten files of the other.

    Two folders of which one hides the other on sys.path are no such case: nothing is broken there.
    """
    found = wheels()  # asks the metadata of every package: once is enough
    return [w for w in found if sum(o.folder == w.folder for o in found) > 1]


def check_wheels() -> None:
    """Refuse an environment in which two onnxruntime wheels own one folder.

    Raises:
        ProviderError: Names both, and the lines that leave one.
    """
    if found := duplicates():
        raise ProviderError(
            f"{' and '.join(map(str, found))} are installed in one folder, "
            "and have overwritten each other's files",
            where=str(found[0].folder),
            hint=leave_one(found),
        )


def leave_one(found: list[Wheel]) -> str:
    """The pip lines that leave one of several wheels: the one that is not for the CPU alone."""
    keep = next((w for w in found if w.name != "onnxruntime"), found[0])
    return (
        f"pip uninstall -y {' '.join(w.name for w in found)}; "
        f"pip install '{keep.name}=={keep.version}'"
    )
