"""run, doctor: what an artifact and this machine can do."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from .. import artifact
from ..errors import UsageError
from . import show, texts

MOST_IN_TABLE = 20  # texts of which a table of similarities still fits a terminal


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@click.argument("arguments", metavar="[TEXT]...", nargs=-1)
@click.option(
    "--input",
    "file",
    metavar="FILE",
    type=click.Path(),
    help="Lines of JSON or text, .npz, or - (stdin).",
)
@click.option("--next-word", metavar="PROMPT", help="The likeliest next words and how likely.")
@click.option("--chat", is_flag=True, help="Put each text into the model's chat turn.")
@click.option("--question", metavar="TEXT", help="What an answer model looks for in the texts.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--no-truncate", is_flag=True, help="Refuse text that is too long for the model.")
@click.option("--provider", metavar="NAME,...",
              help="What DIR is for, or the first of these that takes every node.")  # fmt: skip
@click.option("--allow-fallback", is_flag=True,
              help="Spread the nodes over the providers, the CPU last.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads of one run on the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON a record.")
def run(
    directory: str,
    provider: str | None,
    allow_fallback: bool,
    threads: int | None,
    no_truncate: bool,
    **asked: Any,
) -> None:
    """Run DIR on texts, files or standard input."""
    manifest = artifact.read_manifest(directory)
    for option, task in (("next_word", "generate"), ("chat", "generate"), ("question", "answer")):
        if asked[option] and manifest.task != task:
            name = option.replace("_", "-")
            raise UsageError(f"--{name} is for {task} models, this one is for {manifest.task}")
    from .. import runtime

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", runtime.TruncationWarning)
        model = runtime.load(
            directory,
            provider=provider,
            allow_fallback=allow_fallback,
            threads=threads,
            truncate=not no_truncate,
        )
        if "," in (provider or "") or allow_fallback:
            session = model if isinstance(model, runtime.Session) else model.session
            _tell_provider(session, spread=allow_fallback)
        rows = _RUN[manifest.task](model, asked)
        for row in rows:
            show.json_line(row) if asked["as_json"] else click.echo(_plain(row))
    for text in dict.fromkeys(str(w.message) for w in caught):
        click.secho(f"warning: {text}", fg="yellow", err=True)


def _tell_provider(session: Any, *, spread: bool) -> None:
    """Who took the nodes, and why those before it did not, on standard error."""
    for one in session.skipped:
        click.echo(f"skipped    {one}", err=True)
    counts = session.placement(copies=False).counts if spread else {}
    took = ", ".join(f"{n} on {p}" for p, n in sorted(counts.items())) or "every node"
    click.echo(f"provider   {session.provider}: {took}", err=True)


def _embed(model: Any, asked: dict[str, Any]) -> Any:
    given = texts.texts(texts.records(asked["arguments"], asked["file"]))
    vectors = model.embed(given)
    if asked["as_json"]:
        yield from ({"text": t, "embedding": v} for t, v in zip(given, vectors, strict=True))
        return
    for text, v in zip(given, vectors, strict=True):
        head = " ".join(f"{x:+.4f}" for x in v[:6])
        yield f"{_short(text)!r}  ({len(v)}) {head} ..."
    if 1 < len(given) <= MOST_IN_TABLE:
        yield "cosine similarity"
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        yield from ("  ".join(f"{x:6.3f}" for x in row) for row in unit @ unit.T)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _classify(model: Any, asked: dict[str, Any]) -> Any:
    given = texts.texts(texts.records(asked["arguments"], asked["file"]))
    for text, found in zip(given, model.classify(given), strict=True):
        yield {"text": text, **found}


def _answer(model: Any, asked: dict[str, Any]) -> Any:
    for record in texts.records(asked["arguments"], asked["file"]):
        pair = record if isinstance(record, dict) else {"context": record}
        question = pair.get("question", asked["question"])
        if not question or "context" not in pair:
            raise UsageError(
                "an answer needs a question and a context",
                hint='--question "Who?" "the context", or {"question": ..., "context": ...}',
            )
        yield {"question": question, **model.answer(question, pair["context"])}


def _generate(model: Any, asked: dict[str, Any]) -> Any:
    if asked["next_word"] is not None:
        yield from model.next_word(asked["next_word"])
        return
    given = texts.texts(texts.records(asked["arguments"], asked["file"]))
    found = model.generate(given, max_new_tokens=asked["max_new_tokens"], chat=asked["chat"])
    yield from ({"text": t, "generated": g} for t, g in zip(given, found, strict=True))


def _translate(model: Any, asked: dict[str, Any]) -> Any:
    given = texts.texts(texts.records(asked["arguments"], asked["file"]))
    found = model.translate(given, max_new_tokens=asked["max_new_tokens"])
    yield from ({"text": t, "translation": g} for t, g in zip(given, found, strict=True))


def _tensors(model: Any, asked: dict[str, Any]) -> Any:
    file = asked["file"]
    if file and Path(file).suffix == ".npz":
        found = [texts.npz(file)]
    else:
        found = texts.feeds(texts.records(asked["arguments"], file), model.inputs)
    for feeds in found:
        outputs = model.run(feeds)
        if asked["as_json"]:
            yield outputs
        else:
            yield from (f"{k}: {v.dtype}{list(v.shape)}\n{v}" for k, v in outputs.items())


_RUN = {
    "embed": _embed,
    "classify": _classify,
    "answer": _answer,
    "generate": _generate,
    "translate": _translate,
    "tensors": _tensors,
}


def _plain(row: Any) -> str:
    if isinstance(row, str):
        return row
    cells = (f"{v:.4f}" if isinstance(v, float) else repr(v) for v in row.values())
    return "  ".join(cells)


@click.command()
@show.json_option
def doctor(as_json: bool) -> None:
    """Say what works here, what does not, and the pip line that would mend it."""
    from ..runtime.doctor import examine

    found = examine()
    if as_json:
        show.json_line([asdict(c) for c in found])
        return
    for c in found:
        mark = (
            click.style("works  ", fg="green") if c.works else click.style("missing", fg="yellow")
        )
        click.echo(f"{mark}  {c.name}: {c.detail}")
        if c.fix:
            click.echo(f"         mend it with: {c.fix}")
    works = {c.name for c in found if c.works}
    if "provider cpu" in works and not works & {"provider cuda", "provider tensorrt"}:
        click.echo("\nModels for the CPU run here; a GPU is needed by those pressed for one.")


COMMANDS = (run, doctor)
