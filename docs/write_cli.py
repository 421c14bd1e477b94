"""Write docs/cli.md: the --help text of every command, as click prints it.

python docs/write_cli.py            write it again
python docs/write_cli.py --check    fail where it is stale
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
from onnxpress.cli import main as group

PAGE = Path(__file__).with_name("cli.md")
HEAD = """\
# The command line

What `--help` says, command by command. This page is generated: `python docs/write_cli.py`
rewrites it, `--check` fails where it is stale, and a test runs that check.

Every command exits with 0 (done), 2 (usage), 3 (a gate refused), 4 (provider) or 5 (artifact
damaged); Ctrl-C exits with 130. Results go to standard output, progress, warnings and errors to
standard error. `onnxpress --debug COMMAND ...` shows the traceback of an error.
"""


def render() -> str:
    """The whole page."""
    # A fixed width: the text must not depend on the terminal that it was made in.
    top = click.Context(group, info_name="onnxpress", terminal_width=80, **group.context_settings)
    parts = [HEAD, _section("onnxpress", group.get_help(top))]
    for name, command in group.commands.items():
        context = click.Context(command, info_name=name, parent=top)
        parts.append(_section(f"onnxpress {name}", command.get_help(context)))
    return "\n".join(parts)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text.rstrip()}\n```\n"


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/write_cli.py [--check]", file=sys.stderr)
        return 2
    if not arguments:
        PAGE.write_text(render(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == render():
        return 0
    print("docs/cli.md is stale: run `python docs/write_cli.py`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
