"""The Transformer: encoder-decoder for translation.

Vaswani et al. 2017, "Attention Is All You Need". Marian / OPUS-MT checkpoints (Junczys-Dowmunt
et al. 2018) are this architecture, and load here.

Notable choices:
- Post-norm: LayerNorm after each residual sum, as in the paper.
- Sinusoidal positions with all sines before all cosines, as Marian has them. The paper
  interleaves them, which is the same up to the order of features.
- One embedding for source, target and output logits, scaled by sqrt(D) on the way in.
- The target's causal mask is attention's own flag; the padding mask of the source, which all
  cross-attentions share, is built once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SourceError
from .checkpoint import drop_copies, expect, fill, need, read_config, read_weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "swish": F.silu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Sizes and constants of an encoder-decoder Transformer."""

    vocab_size: int
    dim: int
    n_layer: int
    n_head: int
    ffn_dim: int
    n_decoder_layer: int | None = None  # None: as many as in the encoder, as for the next two
    n_decoder_head: int | None = None
    decoder_ffn_dim: int | None = None
    max_positions: int = 512
    activation: str = "relu"
    scale_embedding: bool = True


SIZES = {
    "tiny": EncoderDecoderConfig(vocab_size=256, dim=64, n_layer=2, n_head=4, ffn_dim=128),
    "base": EncoderDecoderConfig(vocab_size=37000, dim=512, n_layer=6, n_head=8, ffn_dim=2048),
    "big": EncoderDecoderConfig(vocab_size=37000, dim=1024, n_layer=6, n_head=16, ffn_dim=4096),
}


def sinusoids(n_position: int, dim: int) -> Tensor:
    """(n_position, dim) float32: sines of falling frequency, then the cosines of the same."""
    angles = np.arange(n_position)[:, None] / 10000.0 ** (np.arange(0, dim, 2) / dim)
    return torch.from_numpy(np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32))


def padding_mask(attention_mask: Tensor, n_query: int, dtype: torch.dtype) -> Tensor:
    """(B, S), 0 for padding -> (B, 1, n_query, S): 0 where valid, else huge and negative.

    Half of the lowest number, and expanded: see encoder.padding_mask for the reasons.
    """
    B, S = attention_mask.shape
    mask = torch.where(attention_mask.bool(), 0.0, torch.finfo(dtype).min / 2).to(dtype)
    return mask[:, None, None, :].expand(B, 1, n_query, S)


class Attention(nn.Module):
    """Multi-head attention of x to a memory, which is x itself for self-attention."""

    def __init__(self, dim: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, n_head, S, D / n_head)."""
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, D), memory (B, S, D), mask (B, 1, T, S), None for causal -> (B, T, D)."""
        q, k = self.heads(self.q_proj(x)), self.heads(self.k_proj(memory))
        v = self.heads(self.v_proj(memory))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        return out


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward. Names are those of Marian checkpoints."""

    def __init__(self, dim: int, n_head: int, ffn_dim: int, activation: str) -> None:
        super().__init__()
        self.self_attn = Attention(dim, n_head)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, S, D), mask (B, 1, S, S) -> (B, S, D)."""
        x = self.self_attn_layer_norm(x + self.self_attn(x, x, mask))
        y: Tensor = self.final_layer_norm(x + self.fc2(self.activation(self.fc1(x))))
        return y


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the source, and feed-forward."""

    def __init__(self, dim: int, n_head: int, ffn_dim: int, activation: str) -> None:
        super().__init__()
        self.self_attn = Attention(dim, n_head)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.encoder_attn = Attention(dim, n_head)
        self.encoder_attn_layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, source: Tensor, source_mask: Tensor) -> Tensor:
        """x (B, T, D), source (B, S, D), source_mask (B, 1, T, S) -> (B, T, D)."""
        x = self.self_attn_layer_norm(x + self.self_attn(x, x, None))
        x = self.encoder_attn_layer_norm(x + self.encoder_attn(x, source, source_mask))
        y: Tensor = self.final_layer_norm(x + self.fc2(self.activation(self.fc1(x))))
        return y


class Stack(nn.Module):
    """The layers of one side; a module of its own only for the names in checkpoints."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """x and what its layers take besides -> x."""
        for layer in self.layers:
            x = layer(x, *context)
        return x


class EncoderDecoder(nn.Module):
    """The Transformer with its output head."""

    positions: Tensor
    final_logits_bias: Tensor

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        D, act = config.dim, config.activation
        n_layer = config.n_decoder_layer or config.n_layer
        n_head = config.n_decoder_head or config.n_head
        ffn_dim = config.decoder_ffn_dim or config.ffn_dim
        self.scale = math.sqrt(D) if config.scale_embedding else 1.0
        self.shared = nn.Embedding(config.vocab_size, D)
        self.encoder = Stack(
            [EncoderLayer(D, config.n_head, config.ffn_dim, act) for _ in range(config.n_layer)]
        )
        self.decoder = Stack([DecoderLayer(D, n_head, ffn_dim, act) for _ in range(n_layer)])
        # Shared with the output, so that logits start with a spread of about one.
        nn.init.normal_(self.shared.weight, std=D**-0.5)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.vocab_size))
        positions = sinusoids(config.max_positions, D)
        self.register_buffer("positions", positions, persistent=False)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, S) -> (B, S, D)."""
        x: Tensor = self.shared(ids) * self.scale + self.positions[: ids.shape[1]]
        return x

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> dict[str, Tensor]:
        """Score the next target word at every target place.

        Args:
            input_ids: (B, S) int64, the source.
            attention_mask: (B, S) int64, 0 for padding of the source, on either side.
            decoder_input_ids: (B, T) int64, the target so far. Padding belongs on the right,
                where causality hides it from the words before.

        Returns:
            logits: (B, T, vocab_size) float.
        """
        x, y = self.embed(input_ids), self.embed(decoder_input_ids)
        S, T = x.shape[1], y.shape[1]
        source = self.encoder(x, padding_mask(attention_mask, S, x.dtype))
        y = self.decoder(y, source, padding_mask(attention_mask, T, x.dtype))
        return {"logits": F.linear(y, self.shared.weight) + self.final_logits_bias}


def example(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Keyword inputs to trace with: batch 2, source 5 with one row padded, target 3."""
    return {
        "input_ids": torch.arange(10).reshape(2, 5) % config.vocab_size,
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "decoder_input_ids": torch.arange(3, 9).reshape(2, 3) % config.vocab_size,
    }


# Checkpoints ------------------------------------------------------------------------------------


def config_from(config: dict[str, Any]) -> EncoderDecoderConfig:
    """The contents of a Marian config.json as a config of ours; SourceError for what we lack."""
    expect(config, "model_type", "marian")
    expect(config, "activation_function", "gelu", *ACTIVATIONS)
    expect(config, "normalize_before", False, None)
    expect(config, "normalize_embedding", False, None)
    expect(config, "add_final_layer_norm", False, None)
    expect(config, "static_position_embeddings", True, None)
    expect(config, "share_encoder_decoder_embeddings", True, None)
    expect(config, "tie_word_embeddings", True, None)
    expect(config, "quantization_config", None)
    vocab_size, dim = need(config, "vocab_size"), need(config, "d_model")
    expect(config, "decoder_vocab_size", None, vocab_size)
    if dim % 2:
        raise SourceError(f"d_model = {dim} is odd; sines and cosines come in pairs",
                          where="config.json")  # fmt: skip
    return EncoderDecoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        n_layer=need(config, "encoder_layers"),
        n_head=need(config, "encoder_attention_heads"),
        ffn_dim=need(config, "encoder_ffn_dim"),
        n_decoder_layer=need(config, "decoder_layers"),
        n_decoder_head=need(config, "decoder_attention_heads"),
        decoder_ffn_dim=need(config, "decoder_ffn_dim"),
        max_positions=need(config, "max_position_embeddings"),
        activation=config.get("activation_function", "gelu"),
        scale_embedding=config.get("scale_embedding", False),
    )


def load(path: Path, *, trust_pickle: bool = False) -> EncoderDecoder:
    """A Marian checkpoint (MarianMTModel) in eval mode.

    Raises:
        SourceError: a configuration that is not supported, or weights that do not fit it.
    """
    config = config_from(read_config(path))
    weights = read_weights(path, trust_pickle=trust_pickle)
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    copies = ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    drop_copies(weights, "shared.weight", *copies, where=path)
    with torch.device("meta"):
        module = EncoderDecoder(config)
    for name in ("encoder.embed_positions.weight", "decoder.embed_positions.weight"):
        table = weights.pop(name, module.positions)
        if table.shape != module.positions.shape or (table - module.positions).abs().max() > 1e-5:
            raise SourceError(f"{name} does not hold the sinusoids of the paper", where=str(path))
    fill(module, weights, where=path)
    return module.eval()


def build(size: str) -> EncoderDecoder:
    """An EncoderDecoder of a named size with random weights, in eval mode."""
    return EncoderDecoder(SIZES[size]).eval()
