"""diff: two graphs side by side: ops, signature, weights, and what they compute."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import artifact
from ..artifact import TensorSpec
from ..errors import ArtifactError, OnnxpressError, SourceError
from .common import graph_signature, needs_export, reference_of_session

if TYPE_CHECKING:
    import onnx_ir as ir

PathLike = str | os.PathLike[str]
Array = np.ndarray[Any, Any]
POINTS = 8  # sizes at which the two are run


@dataclass(frozen=True)
class Difference:
    """How two graphs, A and B, differ.

    Attributes:
        ops: For each op: `op`, `a`, `b`, `difference`; all ops, those that differ first.
        signature: For each input or output that differs: `side`, `name`, `a`, `b`; null where it
            is missing. Names of dimensions do not count.
        weights: `only_a`, `only_b`: names; `changed`: `name`, `a`, `b` (dtype and shape, or
            sha256 where these are equal); `renamed`: `a`, `b`, of one content; `same`: how many
            are equal; `bytes_a`, `bytes_b`: of all.
        numerics: `points`: for each point `point` and `outputs`, by name `max_abs` and `relative`,
            the largest difference as a share of A's largest value there. `not_compared`: why
            there are none, or null.
    """

    ops: list[dict[str, Any]]
    signature: list[dict[str, Any]]
    weights: dict[str, Any]
    numerics: dict[str, Any]


def diff(
    a: PathLike, b: PathLike, *, progress: Callable[[str], None] = lambda _: None
) -> Difference:
    """Compare two ONNX files or artifacts, in any mix.

    Weights are hashed one after the other, and never all in memory. Both graphs are run on the
    CPU without optimization, with the same random feeds, at up to `POINTS` sizes that A takes.

    Args:
        a: An .onnx file, or the directory of an artifact.
        b: Another.
        progress: Told each step as it begins.

    Raises:
        ArtifactError: An artifact is damaged.
        SourceError: What is named is not there, or is no ONNX.
    """
    with needs_export():
        from ..optimizers import count_ops
    progress("read the graphs")
    models = _open(a), _open(b)
    counts = [Counter(count_ops(m)) for m in models]
    names = sorted(
        sorted({*counts[0], *counts[1]}), key=lambda n: -abs(counts[1][n] - counts[0][n])
    )
    ops = [
        {"op": n, "a": counts[0][n], "b": counts[1][n], "difference": counts[1][n] - counts[0][n]}
        for n in names
    ]
    signature = _signature(*models)
    progress("hash the weights")
    weights = _weights(*models)
    progress("run both")
    return Difference(ops, signature, weights, _numerics(a, b, signature, progress))


def _open(path: PathLike) -> ir.Model:
    where = Path(path)
    if not where.exists():
        raise SourceError("there is no such file or directory", where=str(path))
    if where.is_dir():
        if (where / artifact.MANIFEST).is_file():
            artifact.check_files(where, artifact.read_manifest(where), hashes=False)
        elif not (where / artifact.MODEL).is_file():
            raise SourceError(
                f"the directory holds no {artifact.MODEL}",
                where=str(path),
                hint="diff takes .onnx files and artifacts",
            )
    try:
        model = artifact.open_model(path)
    except ArtifactError as e:
        raise SourceError(e.what, where=str(path), hint="diff takes ONNX") from e
    if not model.graph.outputs:
        raise SourceError("the file holds no graph", where=str(path), hint="diff takes ONNX")
    return model


# Signature ----------------------------------------------------------------------------------


def _signature(a: ir.Model, b: ir.Model) -> list[dict[str, Any]]:
    found = []
    for side, ours, theirs in zip(
        ("input", "output"), graph_signature(a), graph_signature(b), strict=True
    ):
        left, right = ({s.name: s for s in specs} for specs in (ours, theirs))
        for name in dict.fromkeys([*left, *right]):
            x, y = left.get(name), right.get(name)
            if x is None or y is None or _kind(x) != _kind(y):
                found.append({"side": side, "name": name, "a": x and str(x), "b": y and str(y)})
    return found


def _kind(spec: TensorSpec) -> tuple[str, tuple[int | None, ...]]:
    """dtype and shape, dimensions that vary being all alike."""
    return spec.dtype, tuple(d if isinstance(d, int) else None for d in spec.shape)


# Weights ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def _weights(a: ir.Model, b: ir.Model) -> dict[str, Any]:
    left, right = dict(_hashed(a)), dict(_hashed(b))
    changed = [
        {"name": n, "a": x, "b": y}
        for n in sorted(left.keys() & right.keys())
        if left[n] != right[n]
        for x, y in [_apart(left[n], right[n])]
    ]
    only_a, only_b = sorted(left.keys() - right.keys()), sorted(right.keys() - left.keys())
    places = defaultdict(list)
    for name in only_b:
        places[right[name]].append(name)
    renamed = [{"a": n, "b": places[left[n]].pop(0)} for n in only_a if places.get(left[n])]
    moved = {r["a"] for r in renamed}, {r["b"] for r in renamed}
    return {
        "only_a": [n for n in only_a if n not in moved[0]],
        "only_b": [n for n in only_b if n not in moved[1]],
        "changed": changed,
        "renamed": renamed,
        "same": len(left.keys() & right.keys()) - len(changed),
        "bytes_a": sum(w.nbytes for w in left.values()),
        "bytes_b": sum(w.nbytes for w in right.values()),
    }


def _apart(a: _Weight, b: _Weight) -> tuple[str, str]:
    if str(a) != str(b):
        return str(a), str(b)
    return a.sha256[:12], b.sha256[:12]


def _hashed(model: ir.Model) -> Iterator[tuple[str, _Weight]]:
    """Every weight by name; those of subgraphs have the graph's name before theirs."""
    import onnx_ir as ir

    seen: Counter[str] = Counter()
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            name = str(value.name) if graph is model.graph else f"{graph.name}/{value.name}"
            seen[name] += 1
            if seen[name] > 1:  # two subgraphs of one name
                name = f"{name}#{seen[name]}"
            if tensor.dtype.is_string():
                data = b"\0".join(np.asarray(tensor.numpy()).astype(bytes).reshape(-1))
            else:
                data = tensor.tobytes()
            yield (
                name,
                _Weight(
                    tensor.dtype.name.lower(),
                    tuple(int(d) for d in tensor.shape.numpy()),
                    len(data) if tensor.dtype.is_string() else tensor.nbytes,
                    hashlib.sha256(data).hexdigest(),
                ),
            )
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()  # its map of the file, which would else stay in memory


# Numerics -----------------------------------------------------------------------------------


def _numerics(
    a: PathLike,
    b: PathLike,
    signature: Sequence[Mapping[str, Any]],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    points: list[dict[str, Any]] = []
    if signature:
        return {"points": points, "not_compared": "the signatures differ"}
    from ..exporter.points import Points
    from ..runtime import Session

    sessions = []
    for name, path in (("A", a), ("B", b)):
        try:
            sessions.append(Session(path, provider="cpu", optimize=False))
        except OnnxpressError as e:
            return {"points": points, "not_compared": f"{name} cannot be opened: {e.what}"}
    first, second = sessions
    inputs, reference = reference_of_session(first, "A")
    sampled = Points(reference, inputs, seed=0)
    refusal = ""
    for point in sampled:
        if len(points) == POINTS or (point.again and points):
            break
        try:
            feeds = sampled.feeds(point)
            want = first.run(feeds)
        except OnnxpressError as e:  # A does not take this size, so it is no point
            refusal = refusal or e.what
            continue
        progress(f"  {point}")
        try:
            got = second.run(feeds)
        except OnnxpressError as e:
            return {"points": points, "not_compared": f"B does not run at {point}: {e.what}"}
        apart = {name: _distance(want[name], got[name]) for name in want}
        points.append({"point": str(point), "outputs": apart})
    return {"points": points, "not_compared": None if points else f"A does not run: {refusal}"}


def _distance(a: Array, b: Array) -> dict[str, float | str]:
    """The largest difference, and its share of A's largest value; "inf" where no number tells."""
    if a.shape != b.shape:
        return {"max_abs": "inf", "relative": "inf"}
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x)
    same = np.array_equal(x[~finite], y[~finite], equal_nan=True)
    if not (same and np.isfinite(y[finite]).all()):
        return {"max_abs": "inf", "relative": "inf"}
    largest = float(np.abs(x[finite] - y[finite]).max(initial=0.0))
    size = float(np.abs(x[finite]).max(initial=0.0))
    relative = largest / size if size else 0.0 if not largest else np.inf
    return {name: _round(n) for name, n in (("max_abs", largest), ("relative", relative))}


def _round(value: float) -> float | str:
    return float(f"{value:.1e}") if np.isfinite(value) else "inf"
