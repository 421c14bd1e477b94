"""Records: texts and arrays from JSON lines, text files and .npz files.

The command line reads what it runs by the same rules.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import TensorSpec, sha256
from ..errors import InputError, UsageError

FORMS = (
    'FILE.jsonl ({"text": "..."} or "..." a line; {"question": ..., "context": ...} for answer; '
    "arrays by input name for tensors), FILE.txt (a text a line), FILE.npz (the arrays of one "
    "run), or a directory of .npz files"
)


@dataclass(frozen=True)
class Records:
    """Examples that a user gave, or that we bring along.

    Attributes:
        where: The file, or which set of ours it is.
        items: A str, an object with question and context, or the arrays of one run by input name.
        sha256: Of the file; of a directory, over its .npz files in the order of their names.
        places: File and line of each item, for errors and reports.
    """

    where: str
    items: tuple[Any, ...]
    sha256: str
    places: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.items)

    def some(self, rows: Sequence[int], where: str | None = None) -> Records:
        """Those of these rows; the sha256 stays that of the file that they come from."""
        items, places = (tuple(t[i] for i in rows) for t in (self.items, self.places))
        return Records(where or self.where, items, self.sha256, places)

    def summary(self) -> dict[str, Any]:
        """For the manifest."""
        return {"from": self.where, "examples": len(self), "sha256": self.sha256}


def load(path: str | os.PathLike[str]) -> Records:
    """Read a user's file as it is; `for_task` then says whether it suits a model.

    A .jsonl holds an object or a string a line, a .txt a text a line; blank lines are left out.
    An .npz holds the arrays of one run, batch and all: it is one example, and a directory of
    them is as many, in the order of their names.

    Raises:
        InputError: It cannot be read, is not UTF-8, holds nothing, or a line is no JSON.
        UsageError: It is of another kind.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".npz":
        files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
        if not files:
            raise InputError("the directory holds no .npz file", where=str(path), hint=FORMS)
        names = tuple(map(str, files))
        arrays = tuple(npz(name) for name in names)
        return Records(str(path), arrays, sha256(*files), names)
    data = read(path.read_bytes, str(path))
    if path.suffix not in (".jsonl", ".txt"):
        raise UsageError("a file of this kind cannot be read", where=str(path), hint=FORMS)
    found = [(f"{path}:{n}", line) for n, line in lines(decoded(data, str(path)))]
    if not found:
        raise InputError("the input is empty", where=str(path), hint=FORMS)
    items: tuple[Any, ...] = tuple(line for _, line in found)
    if path.suffix == ".jsonl":
        items = tuple(parsed(line, place) for place, line in found)
    return Records(
        str(path), items, hashlib.sha256(data).hexdigest(), tuple(place for place, _ in found)
    )


def for_task(records: Records, task: str, inputs: Sequence[TensorSpec] = ()) -> Records:
    """The records as a task takes them: texts, pairs, or for tensors arrays that fit the inputs.

    Raises:
        InputError: A record without text, or arrays that the graph does not take; `where` is its
            file and line.
    """
    if task == "tensors":
        from ..runtime.signature import Checker

        items: list[Any] = feeds(records.items, inputs, records.places)
        check = Checker(inputs)
        for i, (item, place) in enumerate(zip(items, records.places, strict=True)):
            try:
                check(item)
            except InputError as e:
                raise InputError(f"record {i + 1}: {e.what}", where=place, hint=e.hint) from None
    elif task == "answer":
        items = pairs(records.items, records.places)
    else:
        items = list(texts(records.items, records.places))
    return Records(records.where, tuple(items), records.sha256, records.places)


# What the command line reads by, too ---------------------------------------------------------


def read(reader: Callable[[], bytes], name: str) -> bytes:
    """What `reader` reads.

    Raises:
        InputError: It cannot; `where` is `name`.
    """
    try:
        return reader()
    except OSError as e:
        raise InputError(f"the input cannot be read: {e.strerror}", where=name) from None


def decoded(data: bytes, name: str) -> str:
    """Bytes as text.

    Raises:
        InputError: They are not UTF-8; `where` is `name` and the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise InputError(
            f"the input is not UTF-8: byte 0x{data[e.start]:02x} at offset {e.start}",
            where=f"{name}:{line}",
            hint="convert it: iconv -f LATIN1 -t UTF-8",
        ) from None


def lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, each with its number."""
    # Not splitlines(): a text may hold U+2028, U+0085 and other ends of a line but \n.
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield number, line


def parsed(line: str, where: str) -> Any:
    """A line of JSON.

    Raises:
        InputError: It is none.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as e:
        raise InputError(f"the line is no JSON: {e}", where=where) from None


def texts(found: Sequence[Any], places: Sequence[str] = ()) -> list[str]:
    """Each record's text: the record itself, or its field "text".

    Raises:
        InputError: A record without text, or with half of a surrogate pair in it.
    """
    out: list[str] = []
    for i, record in enumerate(found):
        text = record.get("text") if isinstance(record, dict) else record
        where = places[i] if places else None
        if not isinstance(text, str):
            raise InputError(
                f"record {i + 1} has no text: {_shown(record)}",
                where=where,
                hint='{"text": "..."}',
            )
        if not _encodes(text):
            raise InputError(f"record {i + 1} is no valid text: {_shown(text)}", where=where)
        out.append(text)
    return out


def pairs(found: Sequence[Any], places: Sequence[str] = ()) -> list[dict[str, str]]:
    """Each record's question and context.

    Raises:
        InputError: A record that lacks one of them.
    """
    out = []
    for i, record in enumerate(found):
        fields = record if isinstance(record, dict) else {}
        pair = {name: fields.get(name) for name in ("question", "context")}
        if not all(isinstance(t, str) and t.strip() and _encodes(t) for t in pair.values()):
            raise InputError(
                f"record {i + 1} is no question with a context: {_shown(record)}",
                where=places[i] if places else None,
                hint='{"question": "...", "context": "..."}',
            )
        out.append({name: str(text) for name, text in pair.items()})
    return out


def feeds(
    found: Sequence[Any], inputs: Sequence[TensorSpec], places: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Each record's arrays: an object of nested lists, or of arrays, by input name.

    Raises:
        InputError: A record that is no object, or numbers that its input cannot hold.
    """
    dtypes = {spec.name: spec.dtype for spec in inputs}
    out = []
    for i, record in enumerate(found):
        where = places[i] if places else None
        if isinstance(record, str) and record.lstrip().startswith("{"):
            record = parsed(record, f"record {i + 1}")  # one that was given as an argument
        if not isinstance(record, dict):
            raise InputError(
                f"record {i + 1} is no object of arrays by input name",
                where=where,
                hint="the inputs are " + "; ".join(map(str, inputs)),
            )
        row = {}
        for name, value in record.items():
            try:
                known = isinstance(value, np.ndarray)
                row[name] = value if known else _array(value, dtypes.get(name))
            except (ValueError, TypeError) as e:
                raise InputError(f"record {i + 1}, input {name!r}: {e}", where=where) from None
        out.append(row)
    return out


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


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(record: Any) -> str:
    return json.dumps(record, default=lambda a: f"{a.dtype}{list(a.shape)}")[:80]
