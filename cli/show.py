"""Progress, tables and JSON on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def progress(quiet: bool = False) -> Callable[[str], None]:
    """A function that prints each step to standard error as it begins, with the seconds so far.

    Lines that begin with spaces are details of a step: on a terminal they replace each other,
    in a log they are left out.
    """
    start = perf_counter()
    terminal = sys.stderr.isatty()

    def tell(step: str) -> None:
        if quiet:
            return
        seconds = perf_counter() - start
        if not step.startswith(" "):
            clear = "\r\033[K" if terminal else ""
            click.echo(f"{clear}{seconds:6.1f} s  {step}", err=True)
        elif terminal:
            click.echo(f"\r\033[K          {step.strip()[:80]}", err=True, nl=False)

    return tell


def done() -> None:
    """Clear the last detail line."""
    if sys.stderr.isatty():
        click.echo("\r\033[K", err=True, nl=False)


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> None:
    """Print rows in columns: numbers to the right, text to the left."""
    text = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    numbers = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    for row in text:
        cells = [
            c.rjust(w) if right else c.ljust(w)
            for c, w, right in zip(row, widths, numbers, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def json_line(value: Any) -> None:
    """Print one value as one line of JSON."""
    click.echo(json.dumps(value, ensure_ascii=False, sort_keys=False, default=_plain))


def _plain(value: Any) -> Any:
    """numpy's arrays and numbers as JSON's."""
    return value.tolist()
