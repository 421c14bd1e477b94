"""The walls of the house, read from the source: who imports whom, and what a process loads."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import onnxpress
import pytest

ROOT = Path(onnxpress.__file__).parent
FOLDERS = ("artifact", "cli", "exporter", "models", "optimizers", "press", "runtime")
FILES = sorted(
    [*ROOT.glob("*.py"), *(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py"))]
)
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "transformers")


class Import:
    """One import: the file, what it names in full, and whether it runs when the file is loaded."""

    def __init__(self, file: Path, name: str, line: int, *, late: bool) -> None:
        self.file, self.name, self.line, self.late = file, name, line, late

    @property
    def folder(self) -> str:
        part = self.file.relative_to(ROOT).parts
        return part[0] if len(part) > 1 else ""

    @property
    def top(self) -> str:
        """The package: `torch` of `torch.nn`; for one of ours its folder or module."""
        parts = self.name.split(".")
        return parts[1] if parts[0] == "onnxpress" and len(parts) > 1 else parts[0]

    @property
    def ours(self) -> bool:
        return self.name.split(".")[0] == "onnxpress"

    def __repr__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST, *, late: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it lies in a function; what is for type checkers only is left out."""
    for node in ast.iter_child_nodes(tree):
        inside = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield node, inside
        if type_checking(node):
            for other in node.orelse:
                yield from nodes(other, late=inside)
        else:
            yield from nodes(node, late=inside)


def imports(file: Path, source: str | None = None) -> list[Import]:
    package = ["onnxpress", *file.relative_to(ROOT).parts[:-1]]
    found = []
    for node, late in nodes(ast.parse(source or file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from .. import exporter` names a module of ours, `from .x import f` one in x.
            names = [f"{base}.{a.name}" for a in node.names] if not node.module else [base]
        found += [Import(file, name, node.lineno, late=late) for name in names]
    return found


ALL = [one for file in FILES for one in imports(file)]


def offenders(rule) -> list[Import]:
    return [one for one in ALL if rule(one)]


def test_the_reader_of_imports_sees_them_all():
    source = """
import torch.nn, onnx
from ..runtime import Session
from .. import exporter
from . import names
from .names import flatten
if TYPE_CHECKING:
    import transformers
def f():
    import onnxruntime
"""
    found = imports(ROOT / "press" / "x.py", source)
    assert [(i.name, i.top, i.late) for i in found] == [
        ("torch.nn", "torch", False),
        ("onnx", "onnx", False),
        ("onnxpress.runtime", "runtime", False),
        ("onnxpress.exporter", "exporter", False),
        ("onnxpress.press.names", "press", False),
        ("onnxpress.press.names", "press", False),
        ("onnxruntime", "onnxruntime", True),
    ]
    assert len(ALL) > 150


def test_torch_is_in_models_and_exporter_only():
    late = ROOT / "press" / "timing.py"
    assert not offenders(
        lambda i: (
            i.top == "torch"
            and i.folder not in ("models", "exporter")
            and not (i.late and i.file == late)
        )
    )


def test_onnxruntime_is_in_runtime_only():
    assert not offenders(
        lambda i: (
            i.top == "onnxruntime"
            and i.folder != "runtime"
            and not (i.late and i.folder == "press")
        )  # for its version
    )


def test_optimizers_import_no_torch_and_no_sibling():
    banned = {"torch", "onnxruntime", "transformers", "click", *FOLDERS} - {
        "optimizers",
        "artifact",
    }
    assert not offenders(lambda i: i.folder == "optimizers" and i.top in banned)


def test_runtime_imports_numpy_onnxruntime_and_tokenizers_only():
    allowed = {*sys.stdlib_module_names, "numpy", "onnxruntime", "tokenizers"}
    own = {"runtime", "errors", "artifact"}
    assert not offenders(
        lambda i: i.folder == "runtime" and i.top not in (own if i.ours else allowed)
    )


def test_data_flows_one_way():
    may_not = {
        "models": {"exporter", "optimizers", "runtime", "press", "cli", "artifact"},
        "exporter": {"optimizers", "runtime", "press", "cli"},
        "runtime": {"models", "exporter", "optimizers", "press", "cli"},
        "press": {"cli"},
    }
    assert not offenders(lambda i: i.ours and i.top in may_not.get(i.folder, ()))


def test_artifact_and_errors_stand_on_nothing():
    assert not offenders(
        lambda i: (
            (i.folder == "artifact" or i.file == ROOT / "errors.py")
            and i.top not in {*sys.stdlib_module_names, "artifact", "errors"}
            and not (i.late and i.top == "onnx_ir")
        )
    )


def test_our_folders_are_never_imported_by_their_bare_names():
    bare = {*FOLDERS, "errors"}
    assert not offenders(lambda i: not i.ours and i.name.split(".")[0] in bare)


def test_inside_the_package_imports_are_relative():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert not [n for n in names if n.split(".")[0] == "onnxpress"], file


def test_packages_are_the_folders_with_an_init():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    beside = {"tests", "benchmarks", "docs", "examples", "build"}
    there = {
        ".".join(["onnxpress", *f.parent.relative_to(ROOT).parts])
        for f in ROOT.rglob("__init__.py")
        if (parts := f.relative_to(ROOT).parts)
        and parts[0] not in beside
        and not parts[0].startswith(".")
    }
    assert sorted(listed) == sorted(there)
    assert {name.split(".")[1] for name in listed if "." in name} == set(FOLDERS)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= 400


# What a process loads ------------------------------------------------------------------------


def loaded_by(code: str) -> set[str]:
    code += f"\nimport sys\nprint(*[m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import onnxpress",
        "import onnxpress.cli",
        "import onnxpress.press",
        "from onnxpress.press import verify, bench",
        "import onnxpress.artifact, onnxpress.errors",
        "import onnxpress; dir(onnxpress); onnxpress.export; onnxpress.press",
        "from onnxpress.cli import main\ntry: main(['press', '--help'])\nexcept SystemExit: pass",
        "import onnxpress.models; onnxpress.models.names()",
    ],
)
def test_importing_loads_nothing_heavy(code):
    assert loaded_by(f"import io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()):\n "
                     f"exec({code!r})") == set()  # fmt: skip


def test_the_runtime_loads_onnxruntime_alone(encoder_tiny):
    assert loaded_by("import onnxpress.runtime") <= {"onnxruntime"}
    code = f"import onnxpress; onnxpress.load({str(encoder_tiny)!r})"
    assert loaded_by(code) == {"onnxruntime"}


def test_the_public_names_are_there():
    for name in onnxpress.__all__:
        assert getattr(onnxpress, name) is not None
        assert name in dir(onnxpress)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = onnxpress.nothing_of_the_kind


@pytest.mark.parametrize(
    "first",
    [
        "import onnxpress.press",
        "from onnxpress.press import verify",
        "import onnxpress.press.proof",
        "import onnxpress.cli",
        "from onnxpress import press",
        "import importlib; importlib.import_module('onnxpress.press')",
    ],
)
def test_press_stays_a_function(first):
    code = f"{first}\nimport onnxpress\nassert callable(onnxpress.press), onnxpress.press\n"
    code += "from onnxpress import press, export\nassert press.__name__ == 'press'\n"
    assert loaded_by(code) == set()
