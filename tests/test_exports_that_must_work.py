"""The architectures that an export has to take, each by the road a user goes.

Every case holds the artifact against PyTorch once more, at a shape that was not traced, by code
that shares nothing with exporter/parity.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import onnxpress
import pytest
import torch
import transformers

from . import factories, onnx_models

B, S, T = 3, 9, 6
FACTORIES = factories.__file__


def signature(manifest) -> dict[str, tuple[int | str, ...]]:
    return {spec.name: spec.shape for spec in (*manifest.inputs, *manifest.outputs)}


def proved(manifest) -> None:
    parity = manifest.parity
    assert parity["passed"]
    assert not parity["allowed_drift"]
    assert len(parity["points"]) >= 8
    assert len({p["point"] for p in parity["points"]}) == len(parity["points"])


def close(got, want, *, at_most=2e-5) -> None:
    want = want.detach().numpy()
    assert got.shape == want.shape
    defined = np.isfinite(want)
    assert defined.any()
    assert np.abs(got - want)[defined].max() <= at_most
    assert np.ptp(want[defined]) > 1e-2  # a constant would agree with anything


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def ids(*shape: int, high: int = 40) -> torch.Tensor:
    return torch.randint(5, high, shape, generator=torch.Generator().manual_seed(7))


def mask(*lengths: int, longest: int = S) -> torch.Tensor:
    return (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()


# Modules of torch.nn and a user's own --------------------------------------------------------

D = factories.D
BSD = ("batch", "sequence", D)
MODULES = {
    "transformer_encoder": (
        {"src": floats(B, S, D)},
        {"src": BSD, "output": BSD},
    ),
    "transformer_encoder_masked": (
        {"src": floats(B, S, D), "src_key_padding_mask": mask(9, 4, 1) == 0},
        {"src": BSD, "src_key_padding_mask": BSD[:2], "output": BSD},
    ),
    "transformer": (
        {"src": floats(B, S, D), "tgt": floats(B, T, D)},
        {"src": BSD, "tgt": ("batch", "tgt_sequence", D), "output": ("batch", "tgt_sequence", D)},
    ),
    "multihead_attention": (
        {"query": floats(B, S, D), "key": floats(B, T, D), "value": -floats(B, T, D)},
        {
            "query": BSD,
            "key": ("batch", "key_sequence", D),
            "value": ("batch", "key_sequence", D),
            "output": BSD,
            "output_1": ("batch", "sequence", "key_sequence"),
        },
    ),
    "hand_attention": (
        {"x": floats(B, S, D), "mask": mask(9, 4, 1)},
        {"x": BSD, "mask": BSD[:2], "output": BSD},
    ),
    "bilstm": (
        {"ids": ids(B, S)},
        {"ids": BSD[:2], "output": ("batch", "sequence", 3), "output_1": ("batch", 3)},
    ),
    "dict_out": (
        {"x": floats(B, S, D)},
        {"x": BSD, "hidden": BSD, "logits": ("batch", 3)},
    ),
    "keyword_only": (
        {"query": floats(B, S, D), "bias": -2 * floats(B, S, D)},
        {"query": BSD, "bias": BSD, "output": BSD},
    ),
}


def outputs_of(result) -> list[torch.Tensor]:
    if isinstance(result, dict):
        return list(result.values())
    return list(result) if isinstance(result, tuple) else [result]


@pytest.fixture
def plain_path():
    """Without the fast path of nn.TransformerEncoder, which answers 0 at padded positions."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", MODULES)
def test_module(name, tmp_path, request):
    feeds, shapes = MODULES[name]
    manifest = onnxpress.press(f"{FACTORIES}:{name}", tmp_path / "out", measure=False)
    proved(manifest)
    assert signature(manifest) == shapes
    assert manifest.task == "tensors"
    assert manifest.source["notes"] == []
    assert torch.backends.mha.get_fastpath_enabled()  # left as it was
    request.getfixturevalue("plain_path")
    session = onnxpress.load(tmp_path / "out")
    module = getattr(factories, name)()[0].eval()
    for batch in (B, 1):  # no size is that of the example, and then batch 1
        given = {n: t[:batch] for n, t in feeds.items()}
        with torch.no_grad():
            want = outputs_of(module(**given))
        got = session.run({n: t.numpy() for n, t in given.items()})
        for one, other in zip(got.values(), want, strict=True):
            close(one, other)


# transformers, tiny random weights -----------------------------------------------------------

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "vocab_size": 40}


def save(model, path: Path, *, tokenizer: bool = False):
    """Save with weights that are not the zeros and ones that transformers starts with."""
    generator = torch.Generator().manual_seed(0)
    for weight in {id(w): w for w in model.parameters()}.values():
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(path)
    if tokenizer:
        (path / "tokenizer.json").write_text(onnx_models.tokenizer(template=False))
    return model.eval()


def press_dir(source: Path):
    out = source.parent / "out"
    manifest = onnxpress.press(str(source), out, measure=False)
    proved(manifest)
    return manifest, onnxpress.load(out)


@torch.no_grad()
def test_bert(tmp_path):
    model = save(transformers.BertModel(transformers.BertConfig(**SIZES)), tmp_path / "bert")
    manifest, session = press_dir(tmp_path / "bert")
    tokens = ("batch", "sequence")
    assert signature(manifest) == {
        **dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), tokens),
        "last_hidden_state": (*tokens, 32),
    }
    feeds = {
        "input_ids": ids(B, S),
        "attention_mask": mask(9, 4, 1),
        "token_type_ids": ids(B, S) % 2,
    }
    got = session.run({n: t.numpy() for n, t in feeds.items()})["last_hidden_state"]
    close(got, model(**feeds).last_hidden_state)


@torch.no_grad()
def test_t5_encoder(tmp_path):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=40, **sizes)
    model = save(transformers.T5EncoderModel(config), tmp_path / "t5")
    manifest, session = press_dir(tmp_path / "t5")
    tokens = ("batch", "sequence")
    assert signature(manifest) == {
        "input_ids": tokens,
        "attention_mask": tokens,
        "last_hidden_state": (*tokens, 32),
    }
    feeds = {"input_ids": ids(B, S), "attention_mask": mask(9, 4, 1)}
    got = session.run({n: t.numpy() for n, t in feeds.items()})["last_hidden_state"]
    close(got, model(**feeds).last_hidden_state, at_most=1e-4)


@torch.no_grad()
def test_vit(tmp_path):
    sizes = {k: v for k, v in SIZES.items() if k != "vocab_size"}
    config = transformers.ViTConfig(image_size=12, patch_size=4, num_labels=5, **sizes)
    model = save(transformers.ViTForImageClassification(config), tmp_path / "vit")
    manifest, session = press_dir(tmp_path / "vit")
    assert signature(manifest) == {
        "pixel_values": ("batch", 3, 12, 12),
        "logits": ("batch", 5),
    }
    pixels = floats(5, 3, 12, 12)
    got = session.run({"pixel_values": pixels.numpy()})["logits"]
    close(got, model(pixel_values=pixels).logits)


def cached(generator, tokens: torch.Tensor, seen: torch.Tensor, step: int) -> np.ndarray:
    """Logits of all tokens, fed `step` at a time, the cache passed back in."""
    session, kv = generator.session, generator.manifest.kv
    empty = np.zeros((len(tokens), kv["kv_heads"], 0, kv["head_dim"]), np.float32)
    names = [(i, part) for i in range(kv["layers"]) for part in ("key", "value")]
    past = {kv["past"].format(layer=i, part=p): empty for i, p in names}
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    logits = []
    for at in range(0, tokens.shape[1], step):
        now = slice(at, at + step)
        feeds = {
            "input_ids": tokens[:, now].numpy(),
            "attention_mask": seen[:, : now.stop].numpy(),
            "position_ids": positions[:, now].numpy(),
        }
        out = session.run(feeds | past)
        logits.append(out["logits"])
        past = {
            kv["past"].format(layer=i, part=p): out[kv["present"].format(layer=i, part=p)]
            for i, p in names
        }
    return np.concatenate(logits, 1)


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 40}
LLAMA = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64}
TOKENS = {"eos_token_id": 39, "bos_token_id": 1, "pad_token_id": 0}
DECODERS = {
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2, **TOKENS), 4),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA, **TOKENS), 2),
}


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoder(name, tmp_path):
    architecture, config, kv_heads = DECODERS[name]
    model = architecture(copy.deepcopy(config))
    model = save(model, tmp_path / name, tokenizer=True)
    manifest, generator = press_dir(tmp_path / name)
    now, all_of_it = ("batch", "sequence"), "past_sequence + sequence"
    cache = {}
    for i in range(2):
        for part in ("key", "value"):
            cache[f"past_key_values.{i}.{part}"] = ("batch", kv_heads, "past_sequence", 8)
            cache[f"present.{i}.{part}"] = ("batch", kv_heads, all_of_it, 8)
    have = signature(manifest)
    assert all(have.pop(n) == shape for n, shape in cache.items())
    assert have == {
        "input_ids": now,
        "attention_mask": ("batch", all_of_it),
        "position_ids": now,
        "logits": (*now, 40),
    }
    points = " | ".join(p["point"] for p in manifest.parity["points"])
    assert "past_sequence=0" in points
    tokens, seen = ids(B, S), mask(9, 4, 1).flip(1)  # padded on the left, as generation is
    want = model(
        input_ids=tokens, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0)
    ).logits
    real = seen.bool()
    for step in (S, 4, 1):
        got = cached(generator, tokens, seen, step)
        close(got[real.numpy()], want[real])
    prompt = torch.tensor([[6, 7, 8]])
    answer = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 3:].tolist()
    said = generator.generate_ids(prompt.numpy(), max_new_tokens=8)
    assert said == [[t for t in answer if t != 39]]


# The real one --------------------------------------------------------------------------------


@pytest.mark.slow
def test_minilm(minilm, minilm_source):
    from sentence_transformers import SentenceTransformer

    manifest = onnxpress.artifact.read_manifest(minilm)
    proved(manifest)
    assert max(manifest.parity["max_abs"].values()) <= 1e-5
    tokens = ("batch", "sequence")
    assert signature(manifest)["last_hidden_state"] == (*tokens, 384)
    assert manifest.ops["Attention"] == 6
    assert json.loads((minilm / "config.json").read_text())["model_type"] == "bert"
    texts = ["A cat sat on the mat.", "", "Rain.", "word " * 400, "Größe 東京 🙂"]
    embedder = onnxpress.load(minilm)
    with pytest.warns(onnxpress.runtime.TruncationWarning):
        got = embedder.embed(texts)
    want = SentenceTransformer(str(minilm_source), device="cpu").encode(texts)
    assert got.shape == (5, 384)
    assert (got * want).sum(1).min() >= 0.99999
