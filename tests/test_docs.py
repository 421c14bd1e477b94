"""The documentation says what is there: commands, options, names, links and files."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import onnxpress
import pytest
from onnxpress.cli import main as group

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
WRITTEN = [p for p in PAGES if p.name != "cli.md"]  # by hand

by_page = pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.name)


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [text for language, text in found if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """Every shell command of a page, split into words: from its blocks, and from `inline code`."""
    lines = [line for text in blocks(page, "bash") for line in text.splitlines()]
    for text in blocks(page, "console"):  # output stands between the commands
        lines += [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines += [c for c in re.findall(r"`([^`]+)`", prose) if re.match(r"(onnxpress|make) ", c)]
    for line in lines:
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), ";"]:
            if word not in (";", "|", "&&", "||"):
                words.append(word)
            elif words:
                yield words
                words = []


def spellings(command: click.Command) -> dict[str, click.Option]:
    return {s: p for p in command.params if isinstance(p, click.Option) for s in p.opts}


def check_onnxpress(words: list[str]) -> None:
    """The words after `onnxpress` name a command that exists, and options that it has."""
    given = iter(words)
    command: click.Command = group
    known = spellings(group) | {"-h": group, "--help": group}
    for word in given:
        if word.startswith("-") and word != "-":
            option = known.get(word.partition("=")[0])
            assert option, f"{command.name} has no option {word}: {' '.join(words)}"
            takes = isinstance(option, click.Option) and not option.is_flag
            if takes and "=" not in word:
                assert next(given, None), f"{word} needs a value: {' '.join(words)}"
        elif command is group and word not in ("COMMAND", "..."):
            assert word in group.commands, f"there is no command {word}: {' '.join(words)}"
            command = group.commands[word]
            known = spellings(command) | {"-h": group, "--help": group}


def test_the_command_line_page_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "write_cli.py"))
    stale = "docs/cli.md is stale: run `python docs/write_cli.py`"
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == page["render"](), stale


@by_page
def test_commands_exist(page: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for program, *words in commands(page):
        if program == "onnxpress":
            check_onnxpress(words)
        elif program == "make":
            assert set(words) <= set(targets), f"the Makefile has no {words}"
        elif program == "python" and not words[0].startswith("-"):
            assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"


def test_a_wrong_command_is_found() -> None:
    for wrong in ("onnxpres", "press --targt cpu", "run --provider", "press --jsn"):
        with pytest.raises(AssertionError):
            check_onnxpress(wrong.split())
    check_onnxpress(["--debug", "press", "SOURCE", "-o", "DIR", "--target=cpu", "--force"])


@by_page
def test_python_names_exist(page: Path) -> None:
    for source in blocks(page, "python"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("onnxpress"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module} has no {name.name}"
            elif isinstance(node, ast.Attribute) and _is_ours(node):
                assert _find(node) is not None
            elif isinstance(node, ast.Call) and _is_ours(node.func):
                names = {k.arg for k in node.keywords}
                assert names <= _keywords(_find(node.func)), ast.unparse(node)


def _is_ours(node: ast.expr) -> bool:
    return ast.unparse(node).startswith("onnxpress.")


def _find(node: ast.expr) -> Any:
    value: Any = onnxpress
    for part in ast.unparse(node).split(".")[1:]:
        value = getattr(value, part)
    return value


def _keywords(function: Any) -> set[str | None]:
    names = set(inspect.signature(function).parameters)
    if function is onnxpress.load:  # it hands the rest on
        names |= set(inspect.signature(onnxpress.Session).parameters)
    return set(names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads}
            assert anchor in slugs, f"{page.name}: {link}"


def test_the_map_is_of_this_repository() -> None:
    text = (ROOT / "README.md").read_text("utf-8").split("## Map", 1)[1]
    tree = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert tree
    folders, folder = set(), ROOT
    for line in tree[1].splitlines():
        # Names in the first columns, then a comment; what is indented lies in the folder above.
        names = re.findall(r"\S+(?:\.py|/)(?=,|\s|$)", line[:30])
        assert names, line
        for name in (n.rstrip(",") for n in names):
            path = (folder if line.startswith(" ") else ROOT) / name
            assert path.exists(), f"the map names {path.relative_to(ROOT)}"
            if name.endswith("/"):
                folders.add(name.rstrip("/"))
                folder = path
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    declared = packages["tool"]["setuptools"]["packages"]
    assert {p.partition(".")[2].replace(".", "/") for p in declared if "." in p} <= folders
