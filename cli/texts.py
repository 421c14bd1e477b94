"""Texts and feeds from arguments, JSON lines, .npz files and standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, UsageError
from ..press.records import decoded, feeds, lines, npz, parsed, read, texts

__all__ = ["feeds", "npz", "records", "texts"]


def records(arguments: Sequence[str], file: str | None) -> list[Any]:
    """Every record to run: an argument, a line of text, or a line of JSON.

    A line that begins with { or " is JSON: an object, or a string. Every other line is text.

    Raises:
        InputError: Not UTF-8, or a line that is no JSON; `where` is file and line.
        UsageError: Nothing was given, or two things were.
    """
    if arguments == ("-",):
        arguments, file = (), "-"
    if arguments and file:
        raise UsageError("give texts or --input, not both")
    if not arguments and not file:
        raise UsageError(
            "there is nothing to run",
            hint='give texts ("one" "two"), --input FILE.jsonl, or - for standard input',
        )
    if not file:
        return list(arguments)
    name = "standard input" if file == "-" else file
    data = read(sys.stdin.buffer.read if file == "-" else Path(file).read_bytes, name)
    found = [
        parsed(line, f"{name}:{number}") if line.lstrip()[0] in '{"' else line
        for number, line in lines(decoded(data, name))
    ]
    if not found:
        raise InputError("the input is empty", where=name)
    return found
