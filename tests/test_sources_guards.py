"""What a source says and an artifact must not get wrong, and artifacts that would be dead."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxpress
import pytest
import torch
import transformers
from onnxpress.errors import ExportError, SourceError
from onnxpress.exporter import capture, settings
from onnxpress.exporter.source import from_factory
from onnxpress.press import verify

from . import onnx_models
from .test_huggingface import TINY as TWO_LAYERS
from .test_huggingface import save

TINY = {**TWO_LAYERS, "num_hidden_layers": 1}


def made(forward, *args, **members):
    """A source of a module with this forward."""

    class Made(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in members.items():
                self.register_buffer(name, value)

    Made.forward = forward
    return from_factory("made", "factory", (Made(), args))


def outputs(source) -> list[str]:
    return [str(v.name) for v in capture(source).model.graph.outputs]


# Tasks --------------------------------------------------------------------------------------


def test_a_classifier_of_the_default_two_labels_runs(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TINY))
    source = save(tmp_path / "m", model)
    assert "id2label" not in json.loads((source / "config.json").read_text())
    m = onnxpress.press(str(source), tmp_path / "out", measure=False)
    assert m.settings["labels"] == ["LABEL_0", "LABEL_1"]
    assert onnxpress.load(tmp_path / "out").classify("good")[0]["label"] in m.settings["labels"]


def test_an_artifact_that_does_not_run_is_not_published(tmp_path, refused):
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TINY))
    source = save(tmp_path / "m", model)
    config = json.loads((source / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer.json").write_text(
        (source / "tokenizer.json").read_text().replace('"a": 6', '"a": 4000')
    )
    error = refused(source, ExportError, onnxpress.export)
    assert error.what.startswith("the artifact does not run as its task, classify: ")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"problem_type": "regression", "id2label": {"0": "score"}}, "regression"),
        ({"id2label": {"0": "score"}}, "multi"),
        ({"problem_type": "multi_label_classification"}, "multi"),
        ({}, "single"),
    ],
)
def test_the_problem_is_that_of_the_pipeline(tmp_path, config, problem):
    assert settings.settings("classify", tmp_path, config)["problem"] == problem


def test_a_regression_gives_the_value_itself(tmp_path):
    config = transformers.BertConfig(**TINY, num_labels=1, problem_type="regression")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        model.classifier.bias.fill_(7.0)
        want = float(model(input_ids=torch.tensor([[4]])).logits)
    source = save(tmp_path / "m", model)
    onnxpress.press(str(source), tmp_path / "out", measure=False)
    found = onnxpress.load(tmp_path / "out").classify("good")[0]
    assert want > 1
    assert found["score"] == pytest.approx(want, abs=1e-4)


def test_a_model_without_a_last_position_generates(tmp_path):
    config = transformers.BloomConfig(
        hidden_size=32, n_layer=2, n_head=4, vocab_size=40, bos_token_id=2, eos_token_id=3
    )
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(config).eval()
    source = save(tmp_path / "m", model)
    m = onnxpress.export(str(source), tmp_path / "out")
    assert m.settings["context_length"] is None
    ids = np.array([[4, 6, 5]])
    got = onnxpress.load(tmp_path / "out").generate_ids(ids, max_new_tokens=5)[0]
    with torch.no_grad():
        want = model.generate(torch.tensor(ids), max_new_tokens=5, do_sample=False)[0, 3:]
    assert got == [i for i in want.tolist() if i != 3]


def prompted(folder: Path, **pooling: object) -> Path:
    """A sentence-transformers model whose default prompt is a word of the vocabulary."""
    torch.manual_seed(0)
    save(folder, transformers.BertModel(transformers.BertConfig(**TINY)))
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    rows = [
        {"idx": i, "name": str(i), "type": f"sentence_transformers.models.{kind}", "path": at}
        for i, (kind, at) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir()
    mean = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({**mean, **pooling}))
    said = {"prompts": {"query": "bad bad "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(said))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    )
    return folder


def test_the_default_prompt_stands_before_every_text(tmp_path):
    from sentence_transformers import SentenceTransformer

    source = prompted(tmp_path / "m")
    m = onnxpress.export(str(source), tmp_path / "out")
    assert m.settings["prompt"] == "bad bad "
    ours = onnxpress.load(tmp_path / "out")
    theirs = SentenceTransformer(str(source), device="cpu")
    texts = ["good", "a good a"]
    np.testing.assert_allclose(ours.embed(texts), theirs.encode(texts), atol=1e-5)
    plain = theirs.encode(texts, prompt="")
    assert np.abs(plain - ours.embed(texts)).max() > 1e-2


def test_a_prompt_that_is_not_pooled_is_refused(tmp_path, refused):
    source = prompted(tmp_path / "m", include_prompt=False)
    assert "prompt" in refused(source, SourceError, onnxpress.export).what


def test_a_default_prompt_that_is_not_there_is_refused(tmp_path):
    source = prompted(tmp_path / "m")
    (source / "config_sentence_transformers.json").write_text('{"default_prompt_name": "query"}')
    with pytest.raises(SourceError, match="'query' is none"):
        settings.settings("embed", source, {})


# Adopted files ------------------------------------------------------------------------------


def file(path: Path, text: str, shapes: dict[str, list[int | str | None]], **weights) -> Path:
    model = onnx_models.graph(text, weights, shapes)
    ir.save(model, path)
    return path


def test_dimensions_without_a_name_get_one(tmp_path):
    path = file(
        tmp_path / "m.onnx",
        "g (float[b,s,8] x, float[b,t,8] z, float[8,4] w) => (float[b,s,t] y, float[b,s,4] v)"
        "{ zt = Transpose<perm=[0,2,1]>(z)  y = MatMul(x, zt)  v = MatMul(x, w) }",
        {"x": [None, None, 8], "z": [None, None, 8], "y": [None] * 3, "v": [None, None, 4]},
        w=onnx_models.normal(1, 8, 4),
    )
    m = onnxpress.export(str(path), tmp_path / "out")
    assert [s.shape for s in m.inputs] == [("batch", "x_axis_1", 8), ("batch", "z_axis_1", 8)]
    assert len({p["point"] for p in m.parity["points"]}) >= 8
    session = onnxpress.load(tmp_path / "out")
    feeds = {"x": np.ones((3, 5, 8), np.float32), "z": np.ones((3, 2, 8), np.float32)}
    assert session.run(feeds)["y"].shape == (3, 5, 2)
    assert all(f.passed for f in verify(tmp_path / "out"))


def test_axes_that_must_be_equal_are_tied(tmp_path):
    path = file(
        tmp_path / "m.onnx",
        "g (float[b,s,8] x, float[b,s,8] z) => (float[b,s,8] y) { y = Add(x, z) }",
        {"x": [None, None, 8], "z": [None, "length", 8], "y": [None, None, 8]},
    )
    m = onnxpress.press(str(path), tmp_path / "out", measure=False)
    assert [s.shape for s in m.inputs] == [("batch", "length", 8)] * 2


def test_two_inputs_of_other_first_axes_are_free(tmp_path):
    path = file(
        tmp_path / "m.onnx",
        "g (float[n,8] x, float[8,k] z) => (float[n,k] y) { y = MatMul(x, z) }",
        {"x": [None, 8], "z": [8, None], "y": [None, None]},
    )
    m = onnxpress.export(str(path), tmp_path / "out")
    assert [s.shape for s in m.inputs] == [("batch", 8), (8, "z_axis_1")]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("g (string[n] x) => (int64[1] y) { y = Shape(x) }", "the input 'x' is of type .*STRING"),
        ("g (float[n] x) => (seq(float[n]) y) { y = SequenceConstruct(x) }", "output 'y'.*Seq"),
    ],
)
def test_what_is_no_tensor_of_numbers_is_refused(tmp_path, text, what, refused):
    path = file(tmp_path / "m.onnx", text, {})
    assert re.search(what, refused(path, SourceError).what)


def test_an_adopted_file_of_half_floats_says_so(tmp_path):
    path = file(
        tmp_path / "m.onnx",
        "g (float16[n,8] x, float16[8,4] w) => (float16[n,4] y) { y = MatMul(x, w) }",
        {},
        w=onnx_models.normal(1, 8, 4).astype(np.float16),
    )
    assert onnxpress.export(str(path), tmp_path / "out").target["precision"] == "fp16"


def test_an_adopted_file_may_take_a_scalar(tmp_path):
    path = file(
        tmp_path / "m.onnx",
        "g (float[n,8] x, float s) => (float[n,8] y) { y = Mul(x, s) }",
        {"x": [None, 8], "y": [None, 8]},
    )
    m = onnxpress.export(str(path), tmp_path / "out")
    assert [s.shape for s in m.inputs] == [("batch", 8), ()]


# Captured modules ---------------------------------------------------------------------------


def test_names_of_outputs_never_collide():
    x = torch.randn(3, 4)
    source = made(lambda self, x: {"x": x + 1, "x_out": x + 2}, x)
    assert outputs(source) == ["x_out_1", "x_out"]
    source = made(lambda self, x: {"a.b": x + 1, "a": {"b": x + 2, "b_1": x + 3}}, x)
    assert outputs(source) == ["a.b", "a.b_2", "a.b_1"]


def test_names_of_inputs_never_collide():
    x = torch.randn(3, 4)
    source = made(lambda self, p: p["a.b"] - p["a"]["b"], {"a.b": x, "a": {"b": x.clone()}})
    graph = capture(source).model.graph
    assert [v.name for v in graph.inputs] == ["p.a.b", "p.a.b_1"]


def test_complex_outputs_are_refused_with_the_way_out():
    source = made(lambda self, x: {"spectrum": torch.fft.fft(x)}, torch.randn(3, 8))
    with pytest.raises(ExportError, match=r"output 'spectrum' is torch\.complex64") as caught:
        capture(source)
    assert "view_as_real" in str(caught.value.hint)


def test_a_buffer_that_forward_changes_is_noted():
    def forward(self, x):
        self.seen.add_(1)
        return x * 2

    notes = capture(made(forward, torch.randn(3, 4), seen=torch.zeros(()))).notes
    assert any("buffer seen" in note for note in notes)
    still = made(lambda self, x: x + self.seen, torch.randn(3, 4), seen=torch.zeros(()))
    assert not any("buffer" in note for note in capture(still).notes)
