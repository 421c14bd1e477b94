"""Where candidates are tried: a base graph, what changes it, and how far that drifts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir.passes.common as common

from .. import artifact
from ..artifact import Manifest
from ..optimizers import TARGETS
from ..optimizers.pipeline import NO_CHANGE, Change, lower, lowered, run_passes
from ..optimizers.precision.learn_int8 import Learned
from ..optimizers.precision.split_gemm import SplitGemm
from .data import Feeds, Sets, feeds_of, real_tokens
from .drift import Drift, evaluator_of
from .record import target_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..optimizers import Step, Target
    from ..optimizers.pipeline import Observer
    from ..runtime import Session


@dataclass
class Attempt:
    """One candidate.

    Attributes:
        name: What it is called in tables.
        model: The graph for the target.
        steps: What the passes after the base graph did.
        session: It, where its target can run here; else the same numbers in the CPU's form.
        path: Where that session's files lie.
        search: Drift on what choices are made on; None until it was asked for.
        drift: Drift on what the gate judges on; None until it was asked for.
        kept: Names of the layers that stay in float.
        target: A name of `TARGETS`: what `model` was lowered for.
        change: The passes that made it.
        options: Provider options that it was judged with, and that it is to run with.
    """

    name: str
    model: ir.Model
    steps: list[Step]
    session: Session
    path: Path
    search: Drift | None = None
    drift: Drift | None = None
    kept: tuple[str, ...] = ()
    target: str = "cpu"
    change: Change = NO_CHANGE
    options: dict[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of its weights, in the graph for the target."""
        tensors = (v.const_value for g in self.model.graphs() for v in g.initializers.values())
        return sum(t.nbytes for t in tensors if t is not None)


class Lab:
    """Tries candidates of one model for one target.

    Args:
        base: The base graph, in float32; its Gemms become MatMuls, and nameless nodes get names.
        target: A name of `TARGETS`; of a candidate another one may be given.
        sets: The examples of each use.
        manifest: Of the float32 artifact: the task and its settings.
        files: The task's files (tokenizer), by name.
        folder: A directory of its own.
        budget: For the mean drift; None for the task's default.
        observers: Watch the passes of candidates while `watching` is True.
    """

    def __init__(
        self,
        base: ir.Model,
        target: str,
        sets: Sets,
        manifest: Manifest,
        files: Mapping[str, bytes],
        folder: Path,
        *,
        budget: float | None = None,
        first: int = 0,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.base, self.target, self.sets = base, target_of(target, manifest.task), sets
        self.manifest, self.files, self.folder = manifest, files, folder
        self.budget, self.first, self.observers = budget, first, tuple(observers)
        SplitGemm()(base)  # a layer is a MatMul from here on
        common.NameFixPass()(base)  # and nodes go by their names
        self._count, self.watching = 0, False
        self.learned: dict[str, Learned] = {}  # by what activations become; see `candidates.int8`
        self.float32 = self.attempt("fp32")
        self.watching = True
        self.float32.session.manifest = manifest
        for name, content in files.items():
            (self.float32.path / name).write_bytes(content)
        self._search = evaluator_of(self.float32.session, sets.search)
        self._judge = evaluator_of(self.float32.session, sets.evaluation)
        self._want_search = self._search.answers(self.float32.session)
        self._want = self._judge.answers(self.float32.session)
        self._feeds = feeds_of(self.float32.session, sets.calibration)

    # What passes are handed ---------------------------------------------------------------------

    def batches(self) -> Iterable[Feeds]:
        """The calibration data."""
        return iter(self._feeds)

    @staticmethod
    def real(feeds: Mapping[str, Any]) -> Any:
        """Which tokens of a batch are no padding."""
        return real_tokens(dict(feeds))

    def run(self, model: ir.Model, feeds: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Run a base graph on the CPU, in the form that its kernels take."""
        shown = model.clone()
        # What a base graph says of masks, they do not all take. Branches would hide values.
        run_passes(shown, lower(replace(TARGETS["cpu"], skips_empty_masks=False)))
        session, path = self._open(shown, optimize=False)
        try:
            for given in feeds:
                yield session.run(dict(given))
        finally:
            shutil.rmtree(path, ignore_errors=True)

    # Candidates ---------------------------------------------------------------------------------

    def attempt(
        self,
        name: str,
        change: Change = NO_CHANGE,
        *,
        stand_in: Change | None = None,
        kept: Iterable[str] = (),
        target: Target | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Attempt:
        """Build a candidate, and open it where its target runs here, or in the CPU's form.

        Args:
            name: For tables.
            change: The passes that make it.
            stand_in: Those that make its numbers on the CPU, where the target is another one.
            kept: Layers that stay in float, for the record.
            target: What to lower for, where it is not the lab's own target.
            options: Provider options, where the target runs here; see `runtime.openvino`.

        Raises:
            ArtifactError, ProviderError: ONNX Runtime does not open it, or the provider does not
                take every node.
        """
        target = target or self.target
        model = self.base.clone()
        observers = self.observers if self.watching else ()
        steps = run_passes(model, lowered(target, change), observers=observers, first=self.first)
        shown = model
        if target.name != "cpu" and options is None:
            shown = self.base.clone()
            run_passes(shown, lowered(TARGETS["cpu"], stand_in or change))
        on = target.name if options is not None else "cpu"
        session, path = self._open(shown, optimize=None, provider=on, options=options)
        return Attempt(
            name, model, steps, session, path,
            kept=tuple(kept), target=target.name, change=change, options=dict(options or {}),
        )  # fmt: skip

    def as_it_is(self, change: Change, target: Target) -> tuple[ir.Model, Session]:
        """The graph for a target, and a session of that very graph on the CPU.

        Raises:
            ArtifactError, ProviderError: ONNX Runtime does not open it there.
        """
        model = self.base.clone()
        run_passes(model, lowered(target, change))
        return model, self._open(model, optimize=False)[0]

    def search(self, attempt: Attempt) -> Drift:
        """Its drift on what choices are made on."""
        if attempt.search is None:
            attempt.search = self._search.drift(self._want_search, attempt.session, self.budget)
        return attempt.search

    def judge(self, attempt: Attempt) -> Drift:
        """Its drift on what the gate judges on."""
        if attempt.drift is None:
            attempt.drift = self._judge.drift(self._want, attempt.session, self.budget)
        return attempt.drift

    def drop(self, attempt: Attempt) -> None:
        """Remove the files of a candidate that nobody will ask for again."""
        shutil.rmtree(attempt.path, ignore_errors=True)

    def _open(
        self,
        model: ir.Model,
        *,
        optimize: bool | None,
        provider: str = "cpu",
        options: Mapping[str, str] | None = None,
    ) -> tuple[Session, Path]:
        from ..runtime import Session

        self._count += 1
        path = self.folder / str(self._count)
        path.mkdir()
        artifact.save_model(model.clone(), path)
        disabled = TARGETS["cpu"].disabled_optimizers
        session = Session(
            path,
            provider=provider,
            provider_options={provider: options} if options else None,
            optimize=optimize,
            disabled_optimizers=disabled,
        )
        return session, path


Progress = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """What a search for a precision ended with.

    Attributes:
        chosen: The candidate to publish.
        precision: What it is: fp32, int8, int8-dynamic, fp16 or bf16.
        record: `Manifest.precision`.
        times: Milliseconds of each candidate by shape; they are not for the manifest.
    """

    chosen: Attempt
    precision: str
    record: dict[str, Any]
    times: list[dict[str, Any]] = field(default_factory=list)
