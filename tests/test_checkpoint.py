"""models/checkpoint.py: every kind of file, and every way in which one can be broken."""

import json
import sys

import gguf
import numpy as np
import onnxpress.models as models
import pytest
import torch
import transformers
from onnxpress.errors import MissingPackage, SourceError
from onnxpress.models import checkpoint, decoder, encoder
from safetensors.torch import load_file, save_file

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4), "n": torch.tensor([3])}


def same(got, want):
    assert got.keys() == want.keys()
    return all(torch.equal(got[name], value) for name, value in want.items())


@pytest.fixture
def single(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "n": "model-2.safetensors"}
    for file in set(shards.values()):
        save_file({k: v for k, v in WEIGHTS.items() if shards[k] == file}, tmp_path / file)
    index = {"metadata": {}, "weight_map": shards}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_one_file(single):
    file = single / "model.safetensors"
    assert checkpoint.weight_files(single) == checkpoint.weight_files(file) == [file]
    assert same(checkpoint.read_weights(single), WEIGHTS)
    assert same(checkpoint.read_weights(file), WEIGHTS)


def test_shards(sharded):
    names = [file.name for file in checkpoint.weight_files(sharded)]
    assert names == ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]
    assert same(checkpoint.read_weights(sharded), WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_become_float32_and_integers_stay(tmp_path, dtype):
    save_file(WEIGHTS | {"a": WEIGHTS["a"].to(dtype)}, tmp_path / "model.safetensors")
    weights = checkpoint.read_weights(tmp_path)
    assert same(weights, WEIGHTS)
    assert weights["n"].dtype == torch.int64


def test_float8_is_refused(tmp_path):
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="float8_e4m3fn are not supported: a"):
        checkpoint.read_weights(tmp_path)


def test_a_pickle_needs_trust(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save(WEIGHTS, file)
    assert checkpoint.weight_files(tmp_path) == [file]
    with pytest.raises(SourceError) as caught:
        checkpoint.read_weights(tmp_path)
    assert "--trust-pickle" in str(caught.value)
    assert same(checkpoint.read_weights(tmp_path, trust_pickle=True), WEIGHTS)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SourceError, match="the pickle is damaged"):
        checkpoint.read_weights(tmp_path, trust_pickle=True)
    torch.save([1, 2], file)
    with pytest.raises(SourceError, match="not a dictionary of tensors"):
        checkpoint.read_weights(tmp_path, trust_pickle=True)


def test_safetensors_goes_before_a_pickle(single):
    torch.save([1, 2], single / "pytorch_model.bin")
    assert same(checkpoint.read_weights(single), WEIGHTS)


@pytest.mark.parametrize("keep", [0, 4, 40, -8])
def test_damaged_safetensors(single, keep):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SourceError, match="the safetensors file is damaged") as caught:
        checkpoint.read_weights(single)
    assert caught.value.where == str(file)


def test_missing_shard(sharded):
    (sharded / "model-2.safetensors").unlink()
    with pytest.raises(SourceError, match=r"missing: model-2\.safetensors"):
        checkpoint.weight_files(sharded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": "../model-1.safetensors"}}', "names a file elsewhere"),
    ],
)
def test_damaged_index(sharded, text, message):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(SourceError, match=message):
        checkpoint.read_weights(sharded)


def test_nothing_to_read(tmp_path):
    with pytest.raises(SourceError, match="holds no weights") as caught:
        checkpoint.weight_files(tmp_path)
    assert "--trust-pickle" in caught.value.hint
    with pytest.raises(SourceError, match="no such checkpoint"):
        checkpoint.weight_files(tmp_path / "absent")
    with pytest.raises(SourceError, match=r"no config\.json"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "weights.txt").touch()
    with pytest.raises(SourceError, match="not a file of weights"):
        checkpoint.weight_files(tmp_path / "weights.txt")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match="cannot be read as JSON"):
        checkpoint.read_config(tmp_path)


# fill -------------------------------------------------------------------------------------------


@pytest.fixture
def bert(tmp_path):
    config = transformers.BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1,
                                     num_attention_heads=2, intermediate_size=8)  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    return tmp_path


def edit(path, change):
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors")


def test_missing_and_unexpected_weights_are_listed(bert):
    def change(weights):
        del weights["classifier.bias"]
        weights["bert.adapter.weight"] = torch.ones(1)

    edit(bert, change)
    with pytest.raises(SourceError) as caught:
        encoder.load(bert, task="classify")
    assert "missing: classifier.bias; unexpected: adapter.weight" in str(caught.value)


def test_one_unexpected_weight_is_enough(bert):
    edit(bert, lambda weights: weights.update({"bert.adapter.weight": torch.ones(1)}))
    with pytest.raises(SourceError, match=r"EncoderClassifier; unexpected: adapter\.weight"):
        encoder.load(bert, task="classify")


def test_the_head_that_is_asked_for_must_be_one_of_ours(bert):
    file = bert / "config.json"
    file.write_text(file.read_text().replace("ForSequenceClassification", "ForMaskedLM"))
    with pytest.raises(SourceError, match="architectures = 'BertForMaskedLM'"):
        models.from_checkpoint(bert, task="tensors")


def test_weights_of_another_task_are_missing_by_name(bert):
    with pytest.raises(SourceError, match=r"missing: qa_outputs\.bias, qa_outputs\.weight"):
        encoder.load(bert, task="answer")


def test_other_shapes_are_refused(bert):
    edit(bert, lambda weights: weights.update({"classifier.weight": torch.ones(3, 8)}))
    with pytest.raises(SourceError, match=r"classifier\.weight has shape \(3, 8\).*\(2, 8\)"):
        encoder.load(bert, task="classify")


def test_half_precision_loads_as_float32(bert):
    edit(bert, lambda weights: weights.update({k: v.half() for k, v in weights.items()}))
    module = encoder.load(bert, task="classify")
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}


# GGUF -------------------------------------------------------------------------------------------


def write_gguf(file, model, architecture="llama", extra=None):
    """A Llama of transformers as llama.cpp's converter writes it, q and k rows permuted."""
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(config.head_dim)
    names = {theirs: ours for ours, theirs in checkpoint.GGUF_NAMES.items()}
    for name, value in model.state_dict().items():
        part, kind = name.rsplit(".", 1)
        layer, part = ("", part)
        if part.startswith("model.layers."):
            _, _, number, part = part.split(".", 3)
            layer = f"blk.{number}."
        array = value.numpy()
        if "q_proj" in part or "k_proj" in part:
            heads = config.num_attention_heads if "q_" in part else config.num_key_value_heads
            rows = array.reshape(heads, 2, config.head_dim // 2, *array.shape[1:])
            array = rows.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{layer}{names[part]}.{kind}", np.ascontiguousarray(array))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def llama():
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn(weight.shape)
    return model


def test_gguf_equals_the_model_it_was_written_from(tmp_path, llama):
    file = write_gguf(tmp_path / "model.gguf", llama)
    assert checkpoint.weight_files(tmp_path) == [file]
    assert same(checkpoint.read_weights(tmp_path), llama.state_dict())
    ours, example, config = models.from_checkpoint(tmp_path, task="generate")
    assert decoder.config_from(config) == decoder.config_from(
        llama.config.to_dict() | {"rms_norm_eps": config["rms_norm_eps"]}  # float32 in GGUF
    )
    assert len(example["past_key_values"]) == 2
    past = [{k: torch.zeros(1, 2, 0, 8) for k in ("key", "value")} for _ in range(2)]
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        got = ours(tokens, torch.ones_like(tokens), tokens, past)["logits"]
        assert (got - llama(tokens).logits).abs().max() <= 1e-5


def test_gguf_refusals(tmp_path, llama, monkeypatch):
    file = write_gguf(tmp_path / "a.gguf", llama, extra={"rope_freqs.weight": np.ones(4, "f4")})
    with pytest.raises(SourceError, match=r"unexpected tensor in the GGUF.*rope_freqs\.weight"):
        checkpoint.read_weights(file)
    other = write_gguf(tmp_path / "b.gguf", llama, architecture="qwen2")
    with pytest.raises(SourceError, match=r"general\.architecture = 'qwen2'"):
        checkpoint.read_config(other)
    with pytest.raises(SourceError, match=r"several GGUF files: a\.gguf, b\.gguf"):
        checkpoint.weight_files(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingPackage, match="GGUF needs the package gguf") as caught:
        checkpoint.read_weights(file)
    assert caught.value.hint == "pip install 'onnxpress[hf]'"


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 900, -64])
def test_damaged_gguf(tmp_path, llama, keep):
    file = write_gguf(tmp_path / "model.gguf", llama)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(SourceError) as caught:
        checkpoint.read_weights(file)
    assert str(file) in str(caught.value)


def test_not_a_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"hello" * 100)
    with pytest.raises(SourceError, match="the GGUF file is damaged"):
        checkpoint.read_weights(tmp_path)
