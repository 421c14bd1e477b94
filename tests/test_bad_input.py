"""What users get wrong: a clear error with the right exit code, and nothing left behind.

The command line is held here to each item of the list; the details of each are tested where the
code is: test_exporter.py (modules and factories), test_artifact.py (outputs, disks, damage),
test_cli.py (texts and their encodings).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from onnxpress.cli import main
from onnxpress.errors import MissingPackage, SourceError

from . import onnx_models

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = transformers.BertConfig(vocab_size=40, intermediate_size=16, **SIZES)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "bert"
    transformers.BertModel(CONFIG).save_pretrained(path)
    return path


@pytest.fixture
def model_dir(bert, tmp_path) -> Path:
    return Path(shutil.copytree(bert, tmp_path / "model"))


@pytest.fixture
def says(tmp_path):
    """Runs `onnxpress press SPEC`, which must fail; gives what stands on standard error."""

    def says(spec, *options: str, code: int = 2, out: Path | None = None) -> str:
        parent = tmp_path / "outputs"
        words = ["press", str(spec), "-o", str(out or parent / "out"), *options]
        result = CliRunner().invoke(main, words)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == code, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        assert not parent.exists() or not list(parent.iterdir())
        return result.stderr[result.stderr.index("error: ") :]

    return says


# Sources ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nothing", "there is no source 'nothing'"),
        ("nothing.py:build", "there is no such file"),
        ("nothing.onnx", "there is no such file"),
        ("nothing.gguf", "nothing.gguf"),
        ("encoder-huge", "encoder-tiny"),
        ("no_such_package_here:build", "there is no module 'no_such_package_here'"),
        ("json:no_such_name", "there is no 'no_such_name' in json"),
        ("json:decoder", "is no function"),
        ("json:loads", "the factory raised TypeError"),
        ("", "there is no source ''"),
    ],
)
def test_sources_that_are_not_there(says, spec, said):
    assert said in says(spec)


def test_a_directory_without_anything(says, tmp_path):
    (tmp_path / "empty").mkdir()
    said = says(tmp_path / "empty")
    assert "there is no config.json" in said
    assert f"where: {tmp_path}/empty" in said


def test_a_directory_without_weights(says, model_dir):
    (model_dir / "model.safetensors").unlink()
    said = says(model_dir)
    assert "the directory holds no weights" in said
    assert f"where: {model_dir}" in said
    assert "safetensors" in said.split("hint:")[1]


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "header cut", "in header", "data"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_truncated_safetensors(says, tmp_path, keep, kind, bert):
    """For a model that models/ reads, and for one that transformers reads."""
    path = tmp_path / "model"
    if kind == "bert":
        shutil.copytree(bert, path)
    else:
        config = transformers.ViTConfig(image_size=8, patch_size=4, intermediate_size=16, **SIZES)
        transformers.ViTModel(config).save_pretrained(path)
    file = path / "model.safetensors"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    said = says(path)
    assert str(path) in said


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_a_config_that_is_none(says, model_dir, text):
    (model_dir / "config.json").write_text(text)
    assert str(model_dir / "config.json") in says(model_dir)


def test_a_config_of_an_unknown_architecture(says, model_dir):
    (model_dir / "config.json").write_text(json.dumps({"model_type": "perpetuum"}))
    assert "perpetuum" in says(model_dir)


def test_weights_that_do_not_fit_the_config(says, model_dir):
    config = json.loads((model_dir / "config.json").read_text())
    for change in ({"hidden_size": 32}, {"num_hidden_layers": 3}, {"vocab_size": 50}):
        (model_dir / "config.json").write_text(json.dumps(config | change))
        assert str(model_dir) in says(model_dir)


def test_a_task_that_the_model_cannot_do(says, model_dir):
    assert "generate" in says(model_dir, "--task", "generate")


def test_a_task_on_text_without_a_tokenizer(says, model_dir):
    assert "tokenizer" in says(model_dir, "--task", "embed")


def test_a_tokenizer_that_is_damaged(says, model_dir):
    (model_dir / "tokenizer.json").write_text("{")
    assert "tokenizer" in says(model_dir, "--task", "embed")


def test_pickles_are_refused_unless_trusted(says, model_dir, tmp_path):
    weights = transformers.BertModel(CONFIG).state_dict()
    (model_dir / "model.safetensors").unlink()
    torch.save(weights, model_dir / "pytorch_model.bin")
    said = says(model_dir)
    assert "pickle" in said
    assert "--trust-pickle" in said
    options = ["-o", str(tmp_path / "trusted"), "--trust-pickle", "--no-measure"]
    result = CliRunner().invoke(main, ["press", str(model_dir), *options])
    assert result.exit_code == 0, result.output


def test_a_pickle_that_is_trusted_and_damaged(says, model_dir):
    (model_dir / "model.safetensors").unlink()
    (model_dir / "pytorch_model.bin").write_bytes(b"no pickle")
    assert "pytorch_model.bin" in says(model_dir, "--trust-pickle")


@pytest.mark.parametrize("data", [b"", b"text", b"\x08\xff\xff\xff", b"\x00" * 64])
def test_an_onnx_file_that_is_none(says, tmp_path, data):
    (tmp_path / "model.onnx").write_bytes(data)
    assert f"{tmp_path}/model.onnx" in says(tmp_path / "model.onnx")


def test_an_onnx_file_without_its_weights(says, tmp_path):
    path = onnx_models.embedder(tmp_path / "a")
    (path / "model.onnx.data").unlink()
    said = says(path / "model.onnx")
    assert "weights is missing" in said
    assert "model.onnx.data" in said


def test_an_onnx_file_newer_than_onnxruntime(says, tmp_path):
    import onnx_ir as ir

    model = onnx_models.add_model()
    model.opset_imports[""] = 99
    ir.save(model, tmp_path / "model.onnx")
    assert "opset 99" in says(tmp_path / "model.onnx")


# Modules ---------------------------------------------------------------------------------------

BRANCH = """
class Model(nn.Module):
    def forward(self, x):
        if x.max() > 1:
            return x * 2
        return x

def build():
    return Model(), (torch.randn(2, 4),)
"""


def test_data_dependent_control_flow(says, write):
    said = says(write(BRANCH))
    assert "depends on the values of a tensor" in said
    assert "user_model.py:6 in forward: if x.max() > 1:" in said
    assert "torch.where" in said


def test_a_file_that_raises_on_import(says, write):
    said = says(write("def f():\n    raise ValueError('of mine')\nf()\ndef build(): ..."))
    assert "the file raised ValueError on import: of mine" in said
    assert "user_model.py:5 in <module>: f()" in said
    assert "user_model.py:4 in f: raise ValueError('of mine')" in said
    assert "importlib" not in said


def test_a_factory_that_calls_exit(says, write):
    said = says(write("import sys\ndef build():\n    sys.exit('bye')\n"))
    assert "bye" in said


def test_a_package_that_the_users_file_needs(says, write):
    said = says(write("import a_package_of_mine\ndef build(): ..."))
    assert "No module named 'a_package_of_mine'" in said


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("torch.ones(2, 4, dtype=torch.int64)", "does not run on its own example inputs"),
        ("torch.ones(2, 4).to_sparse()", ""),
        ("torch.ones(2, 4, device='meta')", ""),
        ("torch.ones(2, 4, dtype=torch.complex64)", ""),
    ],
)
def test_example_inputs_of_odd_kinds(says, write, example, said):
    assert said in says(write(f"def build():\n    return nn.Linear(4, 3), ({example},)\n"))


def test_a_model_on_the_meta_device(says, write):
    code = "return nn.Linear(4, 3, device='meta'), (torch.ones(2, 4),)"
    assert says(write(f"def build():\n    {code}\n"))


def test_inputs_that_are_not_strings_of_the_hub(says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = says("no-such-owner/no-such-model")
    assert "no-such-owner/no-such-model" in said


# Outputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["/proc/out", "/dev/null/out", "/dev/null"])
def test_outputs_that_cannot_be_written(says, out):
    assert "hint:" in says("encoder-tiny", out=Path(out))


def test_the_root_and_the_home_are_never_replaced(says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("x")
    for out in (Path("/"), Path("."), tmp_path, tmp_path.parent):
        assert "is no onnxpress artifact" in says("encoder-tiny", "--force", out=out)
    assert (tmp_path / "mine").read_text() == "x"


# Packages --------------------------------------------------------------------------------------


def without(monkeypatch, *names: str) -> None:
    """Makes packages look as if they were not installed."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in names else find(n, *a)
    )


def test_a_package_of_an_extra_that_is_missing(monkeypatch, refused, tmp_path):
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "gpt2")
    without(monkeypatch, "transformers")
    e = refused(str(tmp_path / "gpt2"), MissingPackage, task="tensors")
    assert "pip install 'onnxpress[hf]'" in e.hint


def test_the_export_extra_that_is_missing(tmp_path):
    """In a process that finds no torch, as after `pip install onnxpress[cpu]`."""
    import subprocess
    import sys

    code = (
        "import sys\nsys.modules['torch'] = None\nfrom onnxpress.cli import main\n"
        f"main(['press', 'encoder-tiny', '-o', {str(tmp_path / 'out')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "exporting needs torch, which is not installed" in done.stderr
    assert "pip install 'onnxpress[export]'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_error_tree():
    from onnxpress import errors

    codes = {n: getattr(errors, n).exit_code for n in dir(errors) if n.endswith(("Error", "age"))}
    assert codes == {
        "OnnxpressError": 2, "UsageError": 2, "SourceError": 2, "ExportError": 2, "InputError": 2,
        "OutputError": 2, "MissingPackage": 2, "GateError": 3, "ProviderError": 4,
        "ArtifactError": 5,
    }  # fmt: skip
    text = str(SourceError("what", where="there", hint="then"))
    assert text.split() == ["what", "where:", "there", "hint:", "then"]
    assert issubclass(errors.InputError, ValueError)


def test_an_onnx_file_that_onnxruntime_cannot_load(says, tmp_path):
    import onnx_ir as ir

    model = onnx_models.graph("g (float[n] x) => (float[n] y) { y = NoSuchOperator(x) }")
    ir.save(model, tmp_path / "model.onnx")
    said = says(tmp_path / "model.onnx")
    assert "NoSuchOperator" in said
    assert "copy the artifact" not in said
