"""Sources in the user's own code: `package.module:factory` or `path/to/file.py:factory`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from ..errors import OnnxpressError, SourceError
from .source import Source, from_factory

_SPEC = re.compile(r"(?P<file>.+\.py):(?P<name>\w+)|(?P<module>[\w.]+):(?P<name2>\w+)")

# Frames of these packages say how the user's code was called, not what is wrong with it.
_MACHINERY = ("torch", "onnxscript", "onnx_ir", "onnx", "importlib", "contextlib", "functools")


def looks_like(spec: str) -> bool:
    """Whether `spec` has the form FILE.py:NAME or MODULE:NAME, or is a FILE.py without a name."""
    return bool(_SPEC.fullmatch(spec)) or spec.endswith(".py")


def build(spec: str, task: str | None) -> Source:
    """Import the user's code and call the factory.

    Raises:
        SourceError: The file, module or factory does not exist, or it raised; the error then
            shows the user's own frames.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise SourceError(
            f"{spec} names a file and no factory in it", hint=f"for example {spec}:build"
        )
    name = match["name"] or match["name2"]
    if task not in (None, "tensors"):
        raise SourceError(
            f"a factory gives a module without a tokenizer, so its task is tensors, not {task}",
            where=spec,
            hint="leave --task out, or name a Hugging Face directory",
        )
    module = _load_file(Path(match["file"])) if match["file"] else _load_module(match["module"])
    factory = getattr(module, name, None)
    if factory is None:
        here = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise SourceError(
            f"there is no {name!r} in {match['file'] or match['module']}",
            hint=f"it has: {', '.join(here[:12]) or 'nothing that can be called'}",
        )
    if not callable(factory):
        raise SourceError(f"{spec} is no function", hint="def build(): return module, inputs")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is ours: JSON, tables
            made = factory()
    except (Exception, SystemExit) as e:
        raise SourceError(
            f"the factory raised {type(e).__name__}: {e}", where=user_frames(e)
        ) from e
    return from_factory(spec, "factory", made, task)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SourceError("there is no such file", where=str(path))
    name = f"_onnxpress_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs, so that its dataclasses and pickles can find their module; the
    # folder joins the path, so that it can import its neighbors as when run with `python file.py`.
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except OnnxpressError:
        raise
    except (Exception, SystemExit) as e:
        raise SourceError(
            f"the file raised {type(e).__name__} on import: {e}", where=user_frames(e)
        ) from e
    return module


def _load_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; a console script does not
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name and name.split(".")[0] == e.name.split(".")[0]:
            raise SourceError(
                f"there is no module {e.name!r}",
                hint="run from the folder that holds it, install it, or name its file.py",
            ) from None
        raise SourceError(
            f"the module raised {type(e).__name__} on import: {e}", where=user_frames(e)
        ) from e
    except (Exception, SystemExit) as e:
        raise SourceError(
            f"the module raised {type(e).__name__} on import: {e}", where=user_frames(e)
        ) from e


def user_frames(error: BaseException, *, most: int = 3) -> str | None:
    """The last frames of an exception that lie in the user's code, as `file:line in name: code`."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    own = [f for f in frames if "site-packages" not in f.filename] or frames
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {(error.text or '').strip()}"
    lines = [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in own[-most:]]
    return "\n         ".join(lines) or None


def _is_users(filename: str) -> bool:
    path = Path(filename)
    if filename.startswith("<") or not path.is_absolute():
        return not filename.startswith("<")
    here = Path(__file__).resolve().parent
    if path.parent in (here, here.parent):  # not deeper: examples/ lies there in a checkout
        return False
    folders = path.parts
    if "site-packages" in folders:
        return folders[folders.index("site-packages") + 1] not in _MACHINERY
    stdlib = Path(importlib.__file__).resolve().parent.parent
    return not path.is_relative_to(stdlib)


def chain(error: BaseException) -> list[BaseException]:
    """An exception and its causes, outermost first."""
    found: list[BaseException] = []
    here: BaseException | None = error
    while here is not None and here not in found:
        found.append(here)
        here = here.__cause__ or (None if here.__suppress_context__ else here.__context__)
    return found
