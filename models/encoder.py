"""BERT: bidirectional Transformer encoder.

Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding". MiniLM (Wang et al. 2020) and all-MiniLM sentence encoders are the same thing,
smaller.

Notable choices:
- Post-norm: LayerNorm after each residual sum, as in the paper.
- Learned positions, read as one slice of their table.
- One additive float mask a forward, finite and expanded to (B, 1, S, S): see `padding_mask`.
- No dropout: this code is written for inference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import expect, fill, need, read_config, read_weights, refuse

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and constants of a BERT model."""

    vocab_size: int
    dim: int
    n_layer: int
    n_head: int
    ffn_dim: int
    max_positions: int = 512
    n_type: int = 2
    n_label: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"


SIZES = {
    "tiny": EncoderConfig(vocab_size=256, dim=64, n_layer=2, n_head=4, ffn_dim=128),
    "minilm": EncoderConfig(vocab_size=30522, dim=384, n_layer=6, n_head=12, ffn_dim=1536),
    "base": EncoderConfig(vocab_size=30522, dim=768, n_layer=12, n_head=12, ffn_dim=3072),
}


def padding_mask(attention_mask: Tensor, n_query: int, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores: 0 where a key is valid, a huge negative number elsewhere.

    Half of the lowest finite number: a row without a valid key then gets uniform attention, in
    PyTorch and in ONNX Runtime alike. The lowest number itself, or -inf, does not: ONNX Runtime
    1.32 writes zeros for such a row. Expanded over the queries, because its CPU Attention kernel
    does not broadcast them.

    Args:
        attention_mask: (B, S) integers, 0 for padding.
        n_query: Length of the query axis, T.
        dtype: Of the scores.

    Returns:
        (B, 1, T, S) of `dtype`.
    """
    B, S = attention_mask.shape
    hidden = torch.finfo(dtype).min / 2
    mask = torch.where(attention_mask.bool(), 0.0, hidden).to(dtype)
    return mask[:, None, None, :].expand(B, 1, n_query, S)


class SelfAttention(nn.Module):
    """Multi-head attention of every token to every valid token."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.query = nn.Linear(config.dim, config.dim)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)

    def heads(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, n_head, S, D / n_head)."""
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D), mask (B, 1, S, S) -> (B, S, D)."""
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each followed by residual sum and LayerNorm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        x = self.attention_norm(x + self.attention(x, mask))
        y: Tensor = self.ffn_norm(x + self.down(self.activation(self.up(x))))
        return y


class Encoder(nn.Module):
    """BERT without a head: one vector a token."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_positions, config.dim)
        self.types = nn.Embedding(config.n_type, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Encode a batch.

        Args:
            input_ids: (B, S) int64, S <= max_positions.
            attention_mask: (B, S) int64, 0 for padding, on either side.
            token_type_ids: (B, S) int64, segment of each token; all 0 where left out.

        Returns:
            last_hidden_state: (B, S, D) float.
        """
        S = input_ids.shape[1]
        segment = self.types.weight[0] if token_type_ids is None else self.types(token_type_ids)
        x = self.norm(self.tokens(input_ids) + segment + self.positions.weight[:S])
        mask = padding_mask(attention_mask, S, x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return {"last_hidden_state": x}


class EncoderClassifier(nn.Module):
    """BERT for one label a text (BertForSequenceClassification)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Encoder(config)
        self.pooler = nn.Linear(config.dim, config.dim)
        self.classifier = nn.Linear(config.dim, config.n_label)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Inputs of `Encoder` -> logits: (B, n_label) float."""
        x = self.bert(input_ids, attention_mask, token_type_ids)["last_hidden_state"]
        return {"logits": self.classifier(torch.tanh(self.pooler(x[:, 0])))}


class EncoderAnswerer(nn.Module):
    """BERT that marks the answer in a text (BertForQuestionAnswering)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = Encoder(config)
        self.qa_outputs = nn.Linear(config.dim, 2)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Inputs of `Encoder` -> start_logits, end_logits: (B, S) float each."""
        x = self.bert(input_ids, attention_mask, token_type_ids)["last_hidden_state"]
        start, end = self.qa_outputs(x).unbind(-1)
        return {"start_logits": start, "end_logits": end}


def example(config: EncoderConfig) -> dict[str, Any]:
    """Keyword inputs to trace with: batch 2, length 5, one row padded."""
    ids = torch.arange(10).reshape(2, 5) % config.vocab_size
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    types = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]) % config.n_type
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


# Checkpoints ------------------------------------------------------------------------------------

HEADS = {"embed": Encoder, "classify": EncoderClassifier, "answer": EncoderAnswerer}
ARCHITECTURES = {
    "BertModel": "embed",
    "BertForSequenceClassification": "classify",
    "BertForQuestionAnswering": "answer",
}
RENAMES = (  # our names -> those of transformers, in this order
    (r"^bert\.", ""),  # stripped from theirs, too
    (r"^norm\.", "embeddings.LayerNorm."),
    (r"^tokens\.", "embeddings.word_embeddings."),
    (r"^positions\.", "embeddings.position_embeddings."),
    (r"^types\.", "embeddings.token_type_embeddings."),
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.(query|key|value)\.", r".attention.self.\1."),
    (r"\.attention\.out\.", ".attention.output.dense."),
    (r"\.attention_norm\.", ".attention.output.LayerNorm."),
    (r"\.up\.", ".intermediate.dense."),
    (r"\.down\.", ".output.dense."),
    (r"\.ffn_norm\.", ".output.LayerNorm."),
    (r"^pooler\.", "pooler.dense."),
)


def config_from(config: dict[str, Any]) -> EncoderConfig:
    """The contents of a BERT config.json as an EncoderConfig; SourceError for what we lack."""
    expect(config, "model_type", "bert")
    expect(config, "hidden_act", *ACTIVATIONS)
    expect(config, "position_embedding_type", "absolute", None)
    expect(config, "is_decoder", False, None)
    expect(config, "add_cross_attention", False, None)
    expect(config, "quantization_config", None)
    return EncoderConfig(
        vocab_size=need(config, "vocab_size"),
        dim=need(config, "hidden_size"),
        n_layer=need(config, "num_hidden_layers"),
        n_head=need(config, "num_attention_heads"),
        ffn_dim=need(config, "intermediate_size"),
        max_positions=need(config, "max_position_embeddings"),
        n_type=config.get("type_vocab_size", 2),
        n_label=len(config.get("id2label") or ()) or config.get("num_labels", 2),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        activation=config.get("hidden_act", "gelu"),
    )


def load(path: Path, *, task: str = "tensors", trust_pickle: bool = False) -> nn.Module:
    """A BERT checkpoint as an Encoder (embed), EncoderClassifier (classify) or EncoderAnswerer
    (answer), in eval mode; `tensors` takes the one that config.json calls `architectures`.

    Raises:
        SourceError: a task or configuration that is not supported, or weights that do not fit.
    """
    raw = read_config(path)
    config = config_from(raw)
    if task == "tensors":
        (name, *_) = raw.get("architectures") or ["BertModel"]
        if name not in ARCHITECTURES:
            refuse("architectures", name, ARCHITECTURES)
        task = ARCHITECTURES[name]
    expect({"task": task}, "task", *HEADS)
    weights = read_weights(path, trust_pickle=trust_pickle)
    weights = {name.removeprefix("bert."): value for name, value in weights.items()}
    # Checkpoints converted from TensorFlow, bert-base-uncased among them, use its words.
    words = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for old, new in words.items():
        weights = {name.replace(old, new): value for name, value in weights.items()}
    with torch.device("meta"):
        module = HEADS[task](config)
    # The head of another task is no error, nor is the position buffer of old versions.
    unused = r"^(pooler|cls|classifier|qa_outputs)\.|^embeddings\.position_ids$"
    fill(module, weights, where=path, renames=RENAMES, unused=unused)
    return module.eval()


def build(size: str) -> Encoder:
    """An Encoder of a named size with random weights, in eval mode."""
    return Encoder(SIZES[size]).eval()
