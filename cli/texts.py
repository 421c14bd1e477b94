"""Texts and feeds from arguments, JSON lines, .npz files and standard input."""

from __future__ import annotations

import json
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import TensorSpec
from ..errors import InputError, UsageError


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
    found = list(_lines(_read(file, name), name))
    if not found:
        raise InputError("the input is empty", where=name)
    return found


def _read(file: str, name: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as e:
        raise InputError(f"the input cannot be read: {e.strerror}", where=name) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise InputError(
            f"the input is not UTF-8: byte 0x{data[e.start]:02x} at offset {e.start}",
            where=f"{name}:{line}",
            hint="convert it: iconv -f LATIN1 -t UTF-8",
        ) from None


def _lines(text: str, name: str) -> Iterator[Any]:
    # Not splitlines(): a text may hold U+2028, U+0085 and other ends of a line but \n.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        if line.lstrip()[0] not in '{"':
            yield line
            continue
        try:
            yield json.loads(line)
        except ValueError as e:
            raise InputError(f"the line is no JSON: {e}", where=f"{name}:{number}") from None


def texts(found: Sequence[Any]) -> list[str]:
    """Each record's text: the record itself, or its field "text".

    Raises:
        InputError: A record without text.
    """
    out: list[str] = []
    for i, record in enumerate(found):
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise InputError(
                f"record {i + 1} has no text: {json.dumps(record)[:80]}", hint='{"text": "..."}'
            )
        out.append(text)
    return out


def feeds(found: Sequence[Any], inputs: Sequence[TensorSpec]) -> list[dict[str, Any]]:
    """Each record's arrays: an object of nested lists by input name.

    Raises:
        InputError: A record that is no object, or numbers that its input cannot hold.
    """
    dtypes = {spec.name: spec.dtype for spec in inputs}
    out = []
    for i, record in enumerate(found):
        if isinstance(record, str) and record.lstrip().startswith("{"):
            record = next(_lines(record, f"record {i + 1}"))  # one that was given as an argument
        if not isinstance(record, dict):
            raise InputError(
                f"record {i + 1} is no object of arrays by input name",
                hint="the inputs are " + "; ".join(map(str, inputs)),
            )
        row = {}
        for name, value in record.items():
            try:
                row[name] = _array(value, dtypes.get(name))
            except (ValueError, TypeError) as e:
                raise InputError(f"record {i + 1}, input {name!r}: {e}") from None
        out.append(row)
    return out


def _array(value: Any, dtype: str | None) -> Any:
    """Nested lists as an array, without a change of any number: numpy would cut 1.9 to 1."""
    if dtype in (None, "object"):
        return np.asarray(value, dtype)
    kind = np.dtype(dtype).kind
    takes = (bool, int) if kind == "b" else (int, float)
    items = np.asarray(value, object)
    for item in items.flat:
        if type(item) not in takes or (kind == "b" and item not in (0, 1)):
            what = "lists of uneven lengths" if isinstance(item, list) else json.dumps(item)[:40]
            besides = "true and false" if kind == "b" else "numbers"
            raise ValueError(f"it holds something besides {besides}: {what}")
        if kind in "iu" and isinstance(item, float) and not item.is_integer():
            raise ValueError(f"{dtype} takes whole numbers, not {item}")
    try:
        with np.errstate(over="ignore"):
            array = items.astype(dtype)
            if kind == "f" and (np.isinf(array) != np.isinf(items.astype(float))).any():
                raise OverflowError
    except OverflowError:
        raise ValueError(f"a number is too large for {dtype}, or below what it holds") from None
    return array


def npz(file: str) -> dict[str, Any]:
    """The arrays of an .npz file by name.

    Raises:
        InputError: It cannot be read.
    """
    try:
        with open(file, "rb") as f, np.load(f, allow_pickle=False) as data:
            return {k: data[k] for k in data.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise InputError(f"the file cannot be read: {reason}", where=file) from None
