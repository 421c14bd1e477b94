"""run, inspect, doctor: what an artifact and this machine can do."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from .. import artifact
from ..errors import MissingPackage, ProviderError, UsageError
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
@click.option("--provider", default="cpu", show_default=True, help="cpu, cuda or tensorrt.",
              type=click.Choice(["cpu", "cuda", "tensorrt"]))  # fmt: skip
@click.option("--threads", type=click.IntRange(1), help="Threads of one run on the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON a record.")
def run(
    directory: str, provider: str, threads: int | None, no_truncate: bool, **asked: Any
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
            directory, provider=provider, threads=threads, truncate=not no_truncate
        )
        rows = _RUN[manifest.task](model, asked)
        for row in rows:
            show.json_line(row) if asked["as_json"] else click.echo(_plain(row))
    for text in dict.fromkeys(str(w.message) for w in caught):
        click.secho(f"warning: {text}", fg="yellow", err=True)


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
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--fusions", is_flag=True, help="Which layers are fused, and why others are not.")
@click.option("--passes", is_flag=True, help="Each pass: ops added and removed, hits, time.")
@show.json_option
def inspect(directory: str, fusions: bool, passes: bool, as_json: bool) -> None:
    """Show DIR: its signature, op counts and placement, and what was done to it."""
    manifest = artifact.read_manifest(directory)
    artifact.check_files(directory, manifest, hashes=False)
    if fusions or passes:
        asked = {"fusions": manifest.fusions} if fusions else {}
        asked |= {"passes": _timed(manifest, directory)} if passes else {}
        show.json_line(asked) if as_json else _tell(asked)
        return
    placement = _placement(directory)
    if as_json:
        show.json_line({**asdict(manifest), "placement": placement})
        return
    source, parity = manifest.source, manifest.parity or {}
    click.echo(f"task       {manifest.task}")
    click.echo(f"source     {source['spec']} (weights {source['weights_sha256'][:12]})")
    click.echo("target     " + ", ".join(f"{k} {v}" for k, v in manifest.target.items()))
    for side in ("inputs", "outputs"):
        specs = getattr(manifest, side)
        shown = [*specs[:6], *([f"... {len(specs) - 6} more"] if len(specs) > 6 else [])]
        for i, spec in enumerate(shown):
            click.echo(f"{side if not i else '':10} {spec}")
    if parity:
        worst = max((float(v) for v in parity["max_abs"].values()), default=0.0)
        verdict = "passed" if parity["passed"] else "DRIFT ALLOWED: " + parity["worst"]
        click.echo(
            f"parity     {len(parity['points'])} points against {parity['reference']}, "
            f"max |difference| {worst:.1e}, {verdict}"
        )
    click.echo("placement  " + ("; ".join(f"{k}: {v} nodes" for k, v in placement.items())))
    for note in source.get("notes", []):
        click.echo(f"note       {note}")
    click.echo()
    counts = sorted(manifest.ops.items(), key=lambda item: (-item[1], item[0]))
    show.table(counts, ("op", "count"))
    click.echo()
    _tell({"fusions": manifest.fusions, "passes": _timed(manifest, directory)})


def _tell(asked: dict[str, Any]) -> None:
    """The tables of `--fusions` and `--passes`."""
    if "fusions" in asked:
        _tell_fusions(asked["fusions"])
    if len(asked) > 1:
        click.echo()
    if "passes" in asked:
        rows = [
            (
                p["name"],
                "yes" if p["changed"] else "no",
                p.get("hits", 0) or "",
                "" if p["ms"] is None else f"{p['ms']:.1f}",
                _delta(p["ops"]),
                "; ".join(p["notes"]),
            )
            for p in asked["passes"]
        ]
        show.table(rows, ("pass", "changed", "hits", "ms", "ops", "notes"))


def _tell_fusions(fusions: list[dict[str, Any]] | None) -> None:
    if fusions is None:
        click.echo("fusions    not recorded; optimize the artifact to see them")
        return
    if not fusions:
        click.echo("fusions    it has no layer of a kind that is fused")
        return
    rows = [(f["kind"], f["fused"], f["lifted"], len(f["missed"])) for f in fusions]
    show.table(rows, ("layer", "fused", "lifted", "missed"))
    missed = [(f["kind"], m["node"], m["reason"]) for f in fusions for m in f["missed"]]
    if missed:
        click.echo()
        show.table(missed, ("missed", "node", "reason"))


def _timed(manifest: artifact.Manifest, directory: str) -> list[dict[str, Any]]:
    """The passes with the milliseconds that measured.json has for them, or null.

    Times differ from run to run, so the manifest has none; and nobody vouches for that file.
    """
    try:
        text = (Path(directory) / artifact.MEASURED).read_text(encoding="utf-8")
        times = [(str(p["name"]), float(p["ms"])) for p in json.loads(text)["passes"]]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        times = []
    if [name for name, _ in times] != [p["name"] for p in manifest.passes]:
        return [{**p, "ms": None} for p in manifest.passes]
    return [{**p, "ms": ms} for p, (_, ms) in zip(manifest.passes, times, strict=True)]


def _placement(directory: str) -> dict[str, int]:
    from .. import runtime

    try:
        return dict(runtime.Session(directory).placement().counts)
    except MissingPackage as e:
        return {f"unknown ({e.hint})": 0}
    except ProviderError as e:  # lowered for another provider
        return {f"unknown ({e.what})": 0}


def _delta(ops: dict[str, int]) -> str:
    return " ".join(f"{name}{count:+d}" for name, count in sorted(ops.items()))


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


COMMANDS = (run, inspect, doctor)
