"""Ten Transformers as three exporters write them: what the optimizer is measured and tested on.

    module(name, size)          the model and its example inputs, random weights, seeded
    export(name, how, path)     its ONNX file; how: a key of HOW

Sizes: `tiny` has 2 layers and is for tests, `real` has the size that the name says.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HOW = {
    "dynamo23": (True, 23),
    "dynamo18": (True, 18),
    "script14": (False, 14),
    "script11": (False, 11),  # before scaled_dot_product_attention: eager models only
}


class HandNorm(nn.Module):
    """LayerNorm as a tutorial writes it."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = (
            nn.Parameter(torch.ones(dim)),
            nn.Parameter(torch.zeros(dim)),
            eps,
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        var = ((x - mean) ** 2).mean(-1, keepdim=True)
        return self.weight * (x - mean) / torch.sqrt(var + self.eps) + self.bias


class HandAttention(nn.Module):
    """Attention as "The Annotated Transformer" has it: masked_fill, scores over sqrt(d)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            linear(x).view(x.shape[0], -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)
            for linear, x in ((self.q, q), (self.k, k), (self.v, v))
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(mask == 0, -1e9)
        y = torch.matmul(scores.softmax(-1), v)
        return self.out(
            y.transpose(1, 2).contiguous().view(y.shape[0], -1, y.shape[1] * y.shape[3])
        )


class HandLayer(nn.Module):
    def __init__(self, dim: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.attention = HandAttention(dim, heads)
        self.cross = HandAttention(dim, heads) if cross else None
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.norms = nn.ModuleList(HandNorm(dim) for _ in range(3 if cross else 2))

    def forward(
        self, x: Tensor, mask: Tensor, memory: Any = None, memory_mask: Any = None
    ) -> Tensor:
        n = self.norms[0](x)
        x = x + self.attention(n, n, n, mask)
        if self.cross is not None:
            x = x + self.cross(self.norms[2](x), memory, memory, memory_mask)
        return x + self.ffn(self.norms[1](x))


class HandTransformer(nn.Module):
    """Attention Is All You Need, pre-norm, every part by hand."""

    def __init__(self, dim: int, heads: int, layers: int, vocabulary: int = 1000) -> None:
        super().__init__()
        self.dim, self.embedding = dim, nn.Embedding(vocabulary, dim)
        position, step = torch.arange(512)[:, None], torch.arange(0, dim, 2)
        angle = position * torch.exp(step * (-math.log(10000.0) / dim))
        self.register_buffer("positions", torch.stack([angle.sin(), angle.cos()], -1).flatten(1))
        self.encoder = nn.ModuleList(HandLayer(dim, heads, False) for _ in range(layers))
        self.decoder = nn.ModuleList(HandLayer(dim, heads, True) for _ in range(layers))
        self.norms = nn.ModuleList(HandNorm(dim) for _ in range(2))
        self.head = nn.Linear(dim, vocabulary)

    def embed(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * math.sqrt(self.dim) + self.positions[: ids.shape[1]]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        seen = (source != 0)[:, None, None, :]
        length = target.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=target.device).tril()
        memory = self.embed(source)
        for layer in self.encoder:
            memory = layer(memory, seen)
        memory, y = self.norms[0](memory), self.embed(target)
        for layer in self.decoder:
            y = layer(y, past & (target != 0)[:, None, None, :], memory, seen)
        return self.head(self.norms[1](y)).log_softmax(-1)


class Heads(nn.Module):
    """A Hugging Face model without its output classes and its cache."""

    def __init__(self, model: nn.Module, *fields: str) -> None:
        super().__init__()
        self.model, self.fields = model, fields

    def forward(self, *args: Tensor) -> Tensor:
        kwargs = dict(zip(self.fields, args, strict=True))
        return self.model(**kwargs, return_dict=True)[0]


Example = tuple[nn.Module, tuple[Tensor, ...], list[str], list[dict[int, str]]]
TEXT = {0: "batch", 1: "sequence"}


def _ids(*shape: int) -> Tensor:
    return torch.randint(1, 900, shape)


def _text(model: nn.Module, *fields: str) -> Example:
    ids, mask = _ids(2, 11), torch.ones(2, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return (
        Heads(model, *fields),
        tuple(values[f] for f in fields),
        list(fields),
        [TEXT] * len(fields),
    )


def _bert(attention: str, real: bool, **sizes: int) -> Example:
    from transformers import BertConfig, BertModel

    small = {} if real else {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
                              "num_attention_heads": 4, "vocab_size": 1000}  # fmt: skip
    config = BertConfig(attn_implementation=attention, **{**sizes, **small})
    model = BertModel(config, add_pooling_layer=False)
    return _text(model, "input_ids", "attention_mask", "token_type_ids")


def _minilm(attention: str, real: bool) -> Example:
    if real:
        from transformers import BertModel

        sys.path.insert(0, str(Path(__file__).parent))
        from common import minilm

        model = BertModel.from_pretrained(
            minilm(), attn_implementation=attention, add_pooling_layer=False
        )
        return _text(model, "input_ids", "attention_mask", "token_type_ids")
    return _bert(attention, False)


def _nn_encoder(real: bool) -> Example:
    dim, layers = (512, 6) if real else (32, 2)
    layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.model(x, src_key_padding_mask=padding)

    padding = torch.zeros(2, 11, dtype=torch.bool)
    padding[1, 7:] = True
    return Masked(), (torch.randn(2, 11, dim), padding), ["x", "padding"], [TEXT, TEXT]


def _nn_transformer(real: bool) -> Example:
    dim, layers = (512, 6) if real else (32, 2)
    model = nn.Transformer(dim, 4, layers, layers, 4 * dim, batch_first=True)

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            length = target.shape[1]
            causal = torch.full((length, length), float("-inf")).triu(1)
            return self.model(source, target, tgt_mask=causal, tgt_is_causal=False)

    dims = [{0: "batch", 1: "source"}, {0: "batch", 1: "target"}]
    feeds = (torch.randn(2, 11, dim), torch.randn(2, 7, dim))
    return Causal(), feeds, ["source", "target"], dims


def _hand(real: bool) -> Example:
    model = HandTransformer(512, 8, 6) if real else HandTransformer(32, 4, 2)
    dims = [{0: "batch", 1: "source_length"}, {0: "batch", 1: "target_length"}]
    return model, (_ids(2, 11), _ids(2, 7)), ["source", "target"], dims


def _vit(real: bool) -> Example:
    from transformers import ViTConfig, ViTModel

    small = {} if real else {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
                             "num_attention_heads": 4, "image_size": 32,
                             "patch_size": 8}  # fmt: skip
    model = ViTModel(ViTConfig(**small), add_pooling_layer=False)
    side = 224 if real else 32
    return (
        Heads(model, "pixel_values"),
        (torch.randn(2, 3, side, side),),
        ["pixel_values"],
        [{0: "batch"}],
    )


def _gpt2(real: bool) -> Example:
    from transformers import GPT2Config, GPT2Model

    small = {} if real else {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 1000}
    return _text(GPT2Model(GPT2Config(use_cache=False, **small)), "input_ids", "attention_mask")


def _t5(real: bool) -> Example:
    from transformers import T5Config, T5EncoderModel

    sizes = {} if real else {"num_layers": 2, "d_model": 64, "d_ff": 128, "num_heads": 4,
                             "d_kv": 16, "vocab_size": 1000}  # fmt: skip
    model = T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes))
    return _text(model, "input_ids", "attention_mask")


def _llama(real: bool) -> Example:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
             "vocab_size": 1000, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    if real:  # SmolLM2-135M
        sizes = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
                 "vocab_size": 49152, "num_attention_heads": 9,
                 "num_key_value_heads": 3}  # fmt: skip
    model = LlamaModel(LlamaConfig(use_cache=False, **sizes))
    return _text(model, "input_ids", "attention_mask")


MODELS: dict[str, Callable[[bool], Example]] = {
    "minilm": lambda real: _minilm("sdpa", real),
    "minilm-eager": lambda real: _minilm("eager", real),
    "bert-base": lambda real: _bert("sdpa", real),
    "bert-base-eager": lambda real: _bert("eager", real),
    "nn-encoder": _nn_encoder,
    "nn-transformer": _nn_transformer,
    "hand": _hand,
    "vit": _vit,
    "gpt2": _gpt2,
    "t5": _t5,
    "llama": _llama,
}


def module(name: str, size: str = "tiny") -> Example:
    """The model in eval mode, example inputs, their names, and their axes that vary."""
    torch.manual_seed(0)
    model, feeds, names, dims = MODELS[name](size == "real")
    return model.eval(), feeds, names, dims


def export(name: str, how: str, path: Path, size: str = "tiny") -> Path:
    """Write the file, as the plain call of torch.onnx.export gives it."""
    model, feeds, names, dims = module(name, size)
    dynamo, opset = HOW[how]
    axes: dict[str, Any] = {}
    if dynamo:
        shapes = tuple(dict.fromkeys(d, torch.export.Dim.DYNAMIC) for d in dims)
        # A module of *args takes its shapes as one nested tuple.
        axes["dynamic_shapes"] = (shapes,) if isinstance(model, Heads) else shapes
        axes["verbose"] = False
    else:
        axes["dynamic_axes"] = dict(zip(names, dims, strict=True))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one op, which no exporter knows
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                model, feeds, str(path), input_names=names, output_names=["output"],
                opset_version=opset, dynamo=dynamo, **axes,
            )  # fmt: skip
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    return path
