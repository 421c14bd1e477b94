"""optimize, diff: from graph to graph, and what lies between two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from ..press import Difference
from ..press import diff as compare
from ..press import optimize as optimize_graph
from ..press.optimize import TARGETS
from . import show
from .build import allow_fallback, precision, published, publishing, require_fused, shapes

MOST = 12  # names in a list, past which a person wants --json


@click.command()
@click.argument("source", metavar="DIR_OR_ONNX", type=click.Path())
@publishing
@click.option("--target", default="cpu", show_default=True, type=click.Choice(TARGETS),
              help="What to lower for.")  # fmt: skip
@click.option("--until", metavar="PASS", help="Stop after this pass.")
@click.option("--skip", metavar="PASS", multiple=True, help="Leave this pass out; repeatable.")
@click.option("--with-onnxsim", is_flag=True, help="Let onnxsim simplify the graph too.")
@precision
@shapes
@allow_fallback
@require_fused
def optimize(source: str, out: str, as_json: bool, **options: Any) -> None:
    """Run the passes on an artifact or .onnx file, and check it against itself."""
    manifest = optimize_graph(source, out, progress=show.progress(as_json), **options)
    published(manifest, out, as_json)


@click.command()
@click.argument("a", metavar="A", type=click.Path())
@click.argument("b", metavar="B", type=click.Path())
@show.json_option
def diff(a: str, b: str, as_json: bool) -> None:
    """Compare two artifacts or .onnx files: ops, signature, weights, numerics."""
    found = compare(a, b, progress=show.progress(as_json))
    show.done()
    if as_json:
        show.json_line(asdict(found))
        return
    _ops(found)
    _signature(found)
    _weights(found)
    _numerics(found)


def _ops(found: Difference) -> None:
    differ = [row for row in found.ops if row["difference"]]
    total = [sum(row[side] for row in found.ops) for side in ("a", "b")]
    rows = [(r["op"], r["a"], r["b"], f"{r['difference']:+d}") for r in differ]
    rows.append(("all ops", *total, f"{total[1] - total[0]:+d}"))
    show.table(rows, ("op", "A", "B", ""))


def _signature(found: Difference) -> None:
    click.echo()
    if not found.signature:
        click.echo("signature  the same")
    for row in found.signature:
        words = {(True, False): "only in A", (False, True): "only in B"}
        how = words.get((row["a"] is not None, row["b"] is not None), "changed")
        shown = " -> ".join(spec for spec in (row["a"], row["b"]) if spec is not None)
        click.echo(f"signature  {row['side']} {how}: {shown}")


def _weights(found: Difference) -> None:
    w = found.weights
    click.echo(
        f"weights    {w['same']} the same, {len(w['renamed'])} under another name, "
        f"{w['bytes_a']:,} bytes in A, {w['bytes_b']:,} in B"
    )
    changed = [f"{c['name']} ({c['a']} -> {c['b']})" for c in w["changed"]]
    for word, names in (
        ("only in A", w["only_a"]),
        ("only in B", w["only_b"]),
        ("changed", changed),
    ):
        if names:
            click.echo(f"           {len(names)} {word}: {_some(names)}")


def _numerics(found: Difference) -> None:
    points, reason = found.numerics["points"], found.numerics["not_compared"]
    if points:
        click.echo()
        show.table(
            [
                (p["point"], name, o["max_abs"], o["relative"])
                for p in points
                for name, o in p["outputs"].items()
            ],
            ("point", "output", "max |A - B|", "relative"),
        )
    if reason:
        click.echo(f"numerics   not compared: {reason}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


COMMANDS = (optimize, diff)
