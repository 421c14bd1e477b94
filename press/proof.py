"""The proof of an artifact, made again: its files, its signature, and PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from .. import artifact
from ..artifact import Manifest, TensorSpec
from ..errors import ArtifactError, GateError, OnnxpressError, ProviderError
from .common import is_data, needs_export, reference_of
from .shared_cache import as_concat

if TYPE_CHECKING:
    from ..exporter import Parity, Reference
    from ..runtime import Session

Progress = Callable[[str], None]
Run = Callable[[dict[str, Any]], dict[str, Any]]


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
    progress("open the session")
    try:
        session = _open(directory, manifest)
    except ProviderError as e:
        return [*found, Finding("signature", None, f"it does not run here: {e.what}")]
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
    found.extend(_verify_parity(manifest, session, source, trust_pickle, progress))
    return found


def _open(directory: str | os.PathLike[str], manifest: Manifest) -> Session:
    """Where it was made for; where that is not at hand on the CPU, as the graph stands.

    Raises:
        ProviderError: The CPU has no kernel for a node of it, either.
    """
    from ..runtime import Session

    if manifest.target.get("provider") in ("any", "cpu"):
        return Session(directory, provider="cpu")
    try:
        return Session(directory)
    except ProviderError:
        return Session(directory, provider="cpu", optimize=False)


def _verify_parity(
    manifest: Manifest,
    session: Session,
    source: str | None,
    trust_pickle: bool,
    progress: Progress,
) -> list[Finding]:
    spec = source or str(manifest.source["spec"])
    if not source and not is_data(spec):
        return [_unmade(f"{spec} is code or a hub's: name it with --source to run it")]
    try:
        with needs_export():
            from .. import exporter
        progress(f"read {spec}")
        built = exporter.resolve(spec, task=manifest.task, trust_pickle=trust_pickle)
        reference = reference_of(built, spec)
    except OnnxpressError as e:
        if source:
            raise
        return [_unmade(f"the source is not at hand: {e.what}")]
    if built.weights_sha256 != manifest.source["weights_sha256"]:
        if source:
            raise GateError(
                "the source's weights are not those that the artifact was made of",
                where=spec,
                hint="name the source as it was; a factory of random weights needs a manual_seed",
            )
        return [_unmade(f"{spec} has other weights by now: not compared")]
    if manifest.precision is not None:
        return [_verify_drift(manifest.precision, session, reference, progress)]
    progress(f"check against {reference.name}")
    parity = exporter.check(
        reference,
        session.run,
        session.inputs,
        right="padding" in manifest.runtime,
        progress=lambda p: progress(f"  {p}"),
    )
    recorded = (manifest.parity or {}).get("allowed_drift", False)
    if not recorded:
        exporter.refuse(parity)
    return [Finding("parity", parity.passed, describe(parity))]


def _unmade(why: str) -> Finding:
    return Finding("parity", None, why)


class _AsSession:
    """What answers as a session does, with an artifact's manifest and tokenizer.

    With a cache that is shared it has the inputs of its reference, which joins past and new.
    """

    def __init__(self, reference: Reference, session: Session, run: Run | None = None) -> None:
        assert session.manifest is not None
        self.path, self.manifest = session.path, session.manifest
        self.inputs, self.outputs = session.inputs, session.outputs
        kv = session.manifest.kv
        if kv is not None and kv.get("layout") == "shared":
            joined = {k: v for k, v in kv.items() if k not in ("layout", "lengths", "total")}
            first = kv["past"].format(layer=0, part="key")
            joined["dtype"] = str(reference.examples[first].dtype)
            self.manifest = replace(session.manifest, kv=joined)
            self.inputs = tuple(
                TensorSpec(name, str(value.dtype), ("?",) * value.ndim)
                for name, value in reference.examples.items()
            )
        self._run = run or self._of(reference)

    def _of(self, reference: Reference) -> Run:
        names = [o.name for o in self.outputs]
        return lambda feeds: dict(zip(names, reference.run(feeds), strict=True))

    def run(self, feeds: dict[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Outputs by name."""
        every = self._run(feeds)
        return every if outputs is None else {name: every[name] for name in outputs}

    run_unchecked = run


def _verify_drift(
    precision: dict[str, Any], session: Session, reference: Reference, progress: Progress
) -> Finding:
    """The gate once more, against the source itself and on the same examples."""
    from .data import prepare
    from .drift import evaluator_of

    assert session.manifest is not None
    given = precision["given"]
    try:
        sets = prepare(
            session.manifest.task,
            session.inputs,
            calibration=given["calibration"],
            evaluation=given["eval"],
        )
    except OnnxpressError as e:
        return Finding("drift", None, f"the examples are not at hand: {e}")
    judged = precision["eval"]
    if sets.evaluation.summary() != judged:
        return Finding("drift", None, f"the examples of {judged['from']} are others by now")
    progress(f"drift from {reference.name}")
    original = cast("Session", _AsSession(reference, session))
    kv = session.manifest.kv
    if kv is not None and kv.get("layout") == "shared":
        joined = _AsSession(reference, session, as_concat(session.run, kv))
        session = cast("Session", joined)
    evaluator = evaluator_of(original, sets.evaluation)
    budget = precision["drift"]["budget"]
    drift = evaluator.drift(evaluator.answers(original), session, float(budget))
    if not drift.passed and not precision["drift"]["allowed"]:
        raise GateError(
            f"the artifact drifts from {reference.name}: {drift.why}",
            where=str(session.path.parent),
            hint="press it again",
        )
    told = (
        f"{len(sets.evaluation)} examples against {reference.name}, {drift.metric}: "
        f"mean {drift.mean:.2g}, worst {drift.worst:.2g}, budget {drift.budget:g}"
    )
    return Finding("drift", drift.passed, told)


def describe(parity: Parity) -> str:
    """One line on a check that was made."""
    worst = max(parity.max_abs.values(), default=0.0)
    text = f"{len(parity.points)} points against {parity.reference}, max |difference| {worst:.1e}"
    return text if parity.passed else f"{text}; drift was allowed: {parity.worst}"
