"""warmup: engines and first runs before anybody waits for them."""

from __future__ import annotations

from typing import Any

import click

from . import show


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--provider", help="One provider; else the one that DIR was pressed for.")
@click.option("--shapes", metavar="RANGES", help='"batch=1:8:32,sequence=16:128:512".')
@click.option("--cache", metavar="DIR", type=click.Path(), help="Where engines are kept.")
@click.option("--cuda-graph", is_flag=True, help="Capture the runs as CUDA graphs too.")
@click.option("--rebuild", is_flag=True, help="Build engines again that are there and whole.")
@show.json_option
def warmup(directory: str, shapes: str | None, as_json: bool, **asked: Any) -> None:
    """Build and cache the engines of DIR, and run it once at the ends of its shapes."""
    from ..runtime.profiles import parse_shapes
    from ..runtime.warmup import warmup as warm_up

    ranges = parse_shapes(shapes) if shapes is not None else None
    found = warm_up(directory, shapes=ranges, tell=show.progress(quiet=as_json), **asked)
    if as_json:
        show.json_line(found)
        return
    if found["build_seconds"] is not None:
        click.echo(f"engines built in {found['build_seconds']:.1f} s")
    click.echo(f"a session on {found['provider']} opens in {found['open_seconds']:.2f} s")
    rows = [
        [", ".join(f"{n}={s}" for n, s in r["sizes"].items()) or "fixed shapes"]
        + [f"{r[run] * 1e3:.2f} ms" for run in ("first", "again")]
        for r in found["runs"]
    ]
    show.table(rows, ["run", "first", "again"])
    if kept := found["cache"]:
        files = f"{kept['engines']} engine" + ("s" if kept["engines"] != 1 else "")
        click.echo(f"{files}, {kept['bytes'] / 1e6:.1f} MB in {kept['folder']}")
    click.echo(found["note"])


COMMANDS = (warmup,)
