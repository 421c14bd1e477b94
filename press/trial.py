"""A graph that is about to be published: opened on the CPU, and tried as its task."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact import Manifest
from ..errors import ArtifactError, ExportError, OnnxpressError, ProviderError

if TYPE_CHECKING:
    from ..runtime import Session
    from ..runtime.tasks import TextTask
    from .road import Order


def open_staged(
    path: Path,
    order: Order,
    before: Manifest | None,
    *,
    target: str | None = None,
    options: Mapping[str, str] | None = None,
) -> tuple[Session | None, str]:
    """The graph on the CPU; where another target's has an op without a kernel there, which op.

    With `options` it runs on its own provider, which takes every node or the graph is refused; for
    openvino they are those of float32 where none are given and it is here.
    """
    from ..optimizers import TARGETS
    from ..runtime import Session, openvino

    target = target or order.target
    if options is None and target == "openvino" and not openvino.missing():
        options = openvino.options("fp32")
    other = target not in (None, "cpu")
    # Another provider's graph is checked as it is: what ONNX Runtime would make of it for the CPU
    # says nothing about it.
    optimize = False if other else before.runtime.get("optimize") if before else None
    try:
        disabled = TARGETS[target].disabled_optimizers if target else ()
        if options and target:
            given = {target: options}
            return Session(path, provider=target, provider_options=given, optimize=optimize), ""
        return Session(path, optimize=optimize, disabled_optimizers=disabled), ""
    except (ProviderError, ArtifactError) as e:  # `path` is about to go: name the source instead
        if other and isinstance(e, ProviderError):
            if options:
                raise ProviderError(e.what, where=order.spec, hint=e.hint) from e
            return None, e.what
        raise ExportError(
            f"ONNX Runtime does not open the graph: {e.what}",
            where=order.spec,
            hint="no CPU kernel for an op, or for its dtype: replace it, or export module.float()",
        ) from e


def try_task(session: Session, task: str, spec: str) -> None:
    """Run the task on one short text: a label or a tokenizer that does not fit shows only then."""
    from .. import runtime

    text = "a"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", runtime.TruncationWarning)
            match runtime.task_of(session, task):
                case runtime.Embedder() as t:
                    t.embed(text)
                case runtime.Classifier() as t:
                    t.classify(text)
                case runtime.Translator() as t:
                    t.translate(text, max_new_tokens=2)
                # Of these, the tokenizer may not know the text, and then there is nothing to run.
                case runtime.Answerer() as t if _knows(t, text):
                    t.answer(text, text)
                case runtime.Generator() as t if _knows(t, text):
                    t.generate(text, max_new_tokens=2)
    except Exception as e:  # whatever it raises, it would raise for whoever runs the artifact
        what = e.what if isinstance(e, OnnxpressError) else f"{type(e).__name__}: {e}"
        raise ExportError(
            f"the artifact does not run as its task, {task}: {what}",
            where=spec,
            hint="mend the files of the model that say it, or export it with --task tensors",
        ) from e


def _knows(task: TextTask, text: str) -> bool:
    return bool(len(task.tokenizer.encode(text, special=False)[0]))
