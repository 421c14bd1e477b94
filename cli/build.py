"""export, press, verify, bench: from a source to an artifact, and its proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click

from ..artifact import Manifest
from ..errors import UsageError
from ..press import bench as bench_artifact
from ..press import export as export_source
from ..press import press as press_source
from ..press import verify as verify_artifact
from ..press.optimize import TARGETS
from ..press.wish import PRECISIONS
from . import show
from .look import tell_candidates, tell_gate, with_times

Command = TypeVar("Command", bound=Callable[..., Any])

TASKS = ("embed", "classify", "answer", "generate", "translate", "tensors")


class Sizes(click.ParamType[list[int]]):
    """Positive integers, separated by commas."""

    name = "n,n,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        """'1,8' to [1, 8]."""
        if isinstance(value, list):
            return value
        try:
            sizes = [int(part) for part in str(value).split(",")]
        except ValueError:
            sizes = [0]
        if min(sizes) < 1:
            self.fail(f"{value!r} is no list of positive sizes, as in 1,8", param, ctx)
        return sizes


_pickle = click.option(
    "--trust-pickle", is_flag=True, help="Read pickled weights; they can run code of their author."
)
_source = click.option(
    "--source", metavar="SOURCE", type=click.Path(), help="Where the source lies now."
)


def _common(command: Command) -> Command:
    """The options that export and press share."""
    for option in (
        _pickle,
        click.option(
            "--task", type=click.Choice(TASKS), help="What it is for; found from the source."
        ),
        publishing,
        click.argument("source", metavar="SOURCE", type=click.Path()),
    ):
        command = option(command)
    return command


def publishing(command: Command) -> Command:
    """The options of every command that writes an artifact."""
    for option in (
        show.json_option,
        click.option(
            "--allow-drift",
            is_flag=True,
            help="Publish even where the check fails; the manifest says so.",
        ),
        click.option("--force", is_flag=True, help="Replace the artifact that is there."),
        click.option(
            "-o",
            "--output",
            "out",
            metavar="DIR",
            type=click.Path(),
            required=True,
            help="The artifact to write.",
        ),
    ):
        command = option(command)
    return command


def precision(command: Command) -> Command:
    """The options of a change of precision."""
    for option in (
        click.option("--no-measure", "measure", is_flag=True, flag_value=False, default=True,
                     help="Time nothing, and do not ask of a precision that it is faster."),
        click.option("--prune", metavar="WHAT",
                     help="Prune first: heads:0.25,ffn:0.25, weights:0.5, or 2:4."),
        click.option("--half-io", is_flag=True, help="Inputs and outputs in fp16 or bf16 too."),
        click.option("--calibrator",
                     type=click.Choice(["minmax", "percentile", "entropy", "mse"]),
                     help="How int8 finds the range of an activation; minmax by default."),
        click.option("--max-drift", type=float, metavar="DRIFT",
                     help="Budget of the mean drift; each task has one of its own."),
        click.option("--eval", "evaluation", metavar="FILE", type=click.Path(),
                     help="Examples to judge on; some are held out otherwise."),
        click.option("--calibration", metavar="FILE", type=click.Path(),
                     help="Examples to learn from; a small set of ours otherwise."),
        click.option("--precision", default="fp32", show_default=True,
                     type=click.Choice(PRECISIONS), help="What to compute in."),
    ):  # fmt: skip
        command = option(command)
    return command


class Shapes(click.ParamType[dict[str, tuple[int, int, int]]]):
    """Ranges of sizes by dimension."""

    name = "name=least:usual:most,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> dict[str, tuple[int, int, int]]:
        """'batch=1:8:32' to {"batch": (1, 8, 32)}."""
        from ..runtime.profiles import parse_shapes

        return value if isinstance(value, dict) else parse_shapes(str(value))


shapes = click.option(
    "--shapes", type=Shapes(), help="Sizes that a TensorRT engine is built for: batch=1:8:32,..."
)


allow_fallback = click.option(
    "--allow-fallback",
    is_flag=True,
    help="Publish even where the target lacks a kernel for a node.",
)
require_fused = click.option(
    "--require-fused", is_flag=True, help="Refuse a graph of which a layer stays unfused."
)


@click.command()
@_common
def export(source: str, out: str, as_json: bool, **options: Any) -> None:
    """Export SOURCE to a portable graph, checked against PyTorch."""
    manifest = export_source(source, out, progress=show.progress(as_json), **options)
    published(manifest, out, as_json)


@click.command()
@_common
@click.option("--target", default="cpu", show_default=True, type=click.Choice(TARGETS),
              help="What to optimize for.")  # fmt: skip
@precision
@shapes
@allow_fallback
@require_fused
def press(source: str, out: str, as_json: bool, **options: Any) -> None:
    """Export SOURCE, optimize it for a target, check it, measure it."""
    manifest = press_source(source, out, progress=show.progress(as_json), **options)
    published(manifest, out, as_json)


def published(manifest: Manifest, out: str, as_json: bool) -> None:
    """Print what was published."""
    show.done()
    if as_json:
        show.json_line({"directory": out, **asdict(manifest)})
        return
    for note in manifest.source["notes"]:
        click.echo(f"note: {note}")
    told = f"{out}: {manifest.task}, {sum(manifest.ops.values())} nodes"
    parity = manifest.parity
    if parity:
        worst = max(parity["max_abs"].values(), key=float, default=0.0)
        told += (
            f", {len(parity['points'])} points against {parity['reference']}, "
            f"max |difference| {worst}"
        )
    click.echo(told)
    if (precision := with_times(manifest, out)) is not None:
        tell_gate(precision)
        if len(precision["candidates"]) > 1:
            tell_candidates(precision["candidates"])
    for word, count in (("fused", lambda f: f["fused"]), ("unfused", lambda f: len(f["missed"]))):
        rows = [f"{f['kind']} {count(f)}" for f in manifest.fusions or () if count(f)]
        if rows:
            why = "" if word == "fused" else f" (`onnxpress inspect {out} --fusions` says why)"
            click.echo(f"{word}: {', '.join(rows)}{why}")
    if parity and parity["allowed_drift"]:
        click.secho(f"drift was allowed: {parity['worst']}", fg="yellow")


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@_source
@_pickle
@show.json_option
def verify(directory: str, source: str | None, trust_pickle: bool, as_json: bool) -> None:
    """Check DIR again: files, signature, and PyTorch where the source is at hand."""
    found = verify_artifact(
        directory, source=source, trust_pickle=trust_pickle, progress=show.progress(as_json)
    )
    show.done()
    if as_json:
        show.json_line([asdict(f) for f in found])
        return
    words = {True: "ok", False: "drift", None: "not made"}
    show.table([(f.check, words[f.passed], f.detail) for f in found], ("check", "", "detail"))


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--against", type=click.Choice(["torch"]), help="Time this beside it.")
@_source
@click.option("--batch", type=Sizes(), default="1,8", show_default=True, help="Batch sizes.")
@click.option("--length", type=Sizes(), default="16,128", show_default=True, help="Lengths.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each contestant.")
@click.option("--rounds", type=click.IntRange(9), default=9, show_default=True)
@_pickle
@show.json_option
def bench(directory: str, as_json: bool, **options: Any) -> None:
    """Time DIR; the last line is JSON."""
    result = bench_artifact(directory, progress=show.progress(as_json), **options)
    rows = result["rows"]
    if not rows:
        raise UsageError("there is nothing to time")
    if not as_json:
        dims = [k for k in rows[0] if k not in ("ms", "speedup")]
        names = list(rows[0]["ms"])
        extra = ["speedup"] if "speedup" in rows[0] else []
        header = [*dims, *(f"{n} ms" for n in names), *extra]
        show.table(
            [
                [*(r[d] for d in dims), *(r["ms"][n] for n in names), *(r[e] for e in extra)]
                for r in rows
            ],
            header,
        )
    show.json_line(result)


COMMANDS = (export, press, verify, bench)
