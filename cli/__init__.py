"""The command line: each command parses, calls one verb, and prints.

    build.py   export, press, verify, bench: from a source to an artifact, and its proof
    graph.py   optimize, diff: from graph to graph, and what lies between two
    use.py     run, inspect, doctor: what an artifact and this machine can do
    warm.py    warmup: engines and first runs before anybody waits for them
    show.py    progress, tables and JSON on the terminal
    texts.py   texts and feeds from arguments, JSON lines, .npz files and standard input

Exit codes: 0 done, 2 usage, 3 a gate refused, 4 provider, 5 artifact damaged, 130 and
143 stopped by Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..errors import OnnxpressError
from . import build, graph, look, use, warm


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which would otherwise end the process before anything is cleaned up."""


@contextmanager
def _terminable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may choose what a signal does
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would stop the cleaning up
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Group(click.Group):
    """A group that prints a user's mistake in one block, and a traceback only with --debug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _terminable():
                return super().invoke(ctx)
        except OnnxpressError as e:
            if ctx.params.get("debug"):
                raise
            click.secho(f"error: {e}", fg="red", err=True)
            ctx.exit(e.exit_code)
        except KeyboardInterrupt as e:
            click.secho("stopped; nothing half-done was left", fg="red", err=True)
            ctx.exit(143 if isinstance(e, _Terminated) else 130)
        except BrokenPipeError:  # `onnxpress ... | head` closed our output: nobody is left to tell
            sys.stderr.close()
            ctx.exit(0)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxpress")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Take a Transformer from PyTorch to fast inference, and prove every step.

    SOURCE is a Hugging Face directory or hub id, package.module:factory, path/to/file.py:factory,
    the name of a model of onnxpress (encoder-tiny, ...), or an .onnx file. DIR is an artifact.

    Shell completion: eval "$(_ONNXPRESS_COMPLETE=bash_source onnxpress)", or zsh_source, or
    fish_source.
    """


for command in (*build.COMMANDS, *graph.COMMANDS, *look.COMMANDS, *use.COMMANDS, *warm.COMMANDS):
    main.add_command(command)
