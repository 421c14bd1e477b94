"""The proof of an artifact, made again: its files, its signature, and PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import artifact
from ..artifact import Manifest
from ..errors import ArtifactError, GateError, OnnxpressError
from .common import is_data, needs_export, reference_of

if TYPE_CHECKING:
    from ..exporter import Parity
    from ..runtime import Session

Progress = Callable[[str], None]


@dataclass
class Finding:
    """One check of `verify`: what, whether it passed (None: it could not be made), and why."""

    check: str
    passed: bool | None
    detail: str


def verify(
    directory: str | os.PathLike[str],
    *,
    source: str | None = None,
    trust_pickle: bool = False,
    progress: Progress = lambda _: None,
) -> list[Finding]:
    """Check an artifact again: its files, its signature, and PyTorch where the source is at hand.

    Args:
        directory: The artifact.
        source: Where its source lies now; the one that the manifest names where None.
        trust_pickle: As in `export`.
        progress: Told each step as it begins.

    Raises:
        ArtifactError: A file is missing or changed, or the graph has another signature.
        GateError: The graph does not compute what PyTorch computes.
    """
    manifest = artifact.read_manifest(directory)
    progress("hash the files")
    artifact.check_files(directory, manifest, hashes=True)
    found = [Finding("files", True, f"{len(manifest.files)} files have the published sha256")]
    from ..runtime import Session

    progress("open the session")
    session = Session(directory)
    for side in ("inputs", "outputs"):
        have, want = getattr(session, side), getattr(manifest, side)
        if [str(s) for s in have] != [str(s) for s in want]:
            raise ArtifactError(
                f"the graph's {side} are not those of the manifest: "
                f"{', '.join(map(str, have))} against {', '.join(map(str, want))}",
                where=str(directory),
                hint="make the artifact again from its source",
            )
    found.append(Finding("signature", True, "; ".join(map(str, session.inputs))))
    found.append(_verify_parity(manifest, session, source, trust_pickle, progress))
    return found


def _verify_parity(
    manifest: Manifest,
    session: Session,
    source: str | None,
    trust_pickle: bool,
    progress: Progress,
) -> Finding:
    spec = source or str(manifest.source["spec"])
    if not source and not is_data(spec):
        return Finding(
            "parity", None, f"{spec} is code or a hub's: name it with --source to run it"
        )
    try:
        with needs_export():
            from .. import exporter
        progress(f"read {spec}")
        built = exporter.resolve(spec, task=manifest.task, trust_pickle=trust_pickle)
        reference = reference_of(built, spec)
    except OnnxpressError as e:
        if source:
            raise
        return Finding("parity", None, f"the source is not at hand: {e.what}")
    if built.weights_sha256 != manifest.source["weights_sha256"]:
        if source:
            raise GateError(
                "the source's weights are not those that the artifact was made of",
                where=spec,
                hint="name the source as it was; a factory of random weights needs a manual_seed",
            )
        return Finding("parity", None, f"{spec} has other weights by now: not compared")
    progress(f"check against {reference.name}")
    parity = exporter.check(
        reference, session.run, session.inputs, progress=lambda p: progress(f"  {p}")
    )
    recorded = (manifest.parity or {}).get("allowed_drift", False)
    if not recorded:
        exporter.refuse(parity)
    return Finding("parity", parity.passed, describe(parity))


def describe(parity: Parity) -> str:
    """One line on a check that was made."""
    worst = max(parity.max_abs.values(), default=0.0)
    text = f"{len(parity.points)} points against {parity.reference}, max |difference| {worst:.1e}"
    return text if parity.passed else f"{text}; drift was allowed: {parity.worst}"
