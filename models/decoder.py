"""Llama: causal Transformer decoder with a key/value cache.

Touvron et al. 2023, "LLaMA", with its parts: rotary positions (Su et al. 2021), grouped-query
attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020), RMSNorm (Zhang & Sennrich 2019).
SmolLM2 and Llama 2 and 3 are this file at other sizes.

Notable choices:
- The cache goes in and comes out as plain tensors, so that one graph does prefill and decode.
- Rotary positions are read from two tables, as ONNX RotaryEmbedding has them: they survive half
  precision, in which a product of position and frequency would not.
- Grouped heads go to attention as they are (`enable_gqa`): one ONNX Attention, nothing repeated.
- One additive float mask a forward, causal and padding together, finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SourceError
from .checkpoint import drop_copies, expect, fill, need, read_config, read_weights, refuse

Cache = list[dict[str, Tensor]]  # a layer: {"key", "value"}, each (B, n_kv_head, P, head_dim)


@dataclass(frozen=True)
class Llama3Rope:
    """How Llama 3.1 stretches its slow rotary frequencies to a longer context."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and constants of a Llama model."""

    vocab_size: int
    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    ffn_dim: int
    max_positions: int = 2048
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False


SIZES = {
    "tiny": DecoderConfig(
        vocab_size=256, dim=64, n_layer=2, n_head=4, n_kv_head=2, head_dim=16, ffn_dim=128,
        max_positions=256,
    ),
    "smollm2-135m": DecoderConfig(
        vocab_size=49152, dim=576, n_layer=30, n_head=9, n_kv_head=3, head_dim=64, ffn_dim=1536,
        max_positions=8192, rope_theta=100000.0, tie_embeddings=True,
    ),
    "7b": DecoderConfig(  # Llama 2
        vocab_size=32000, dim=4096, n_layer=32, n_head=32, n_kv_head=32, head_dim=128,
        ffn_dim=11008, max_positions=4096,
    ),
}  # fmt: skip


def frequencies(config: DecoderConfig) -> Tensor:
    """Rotary angle a position step, one a pair of features: (head_dim / 2) float32."""
    # The device is named, because `load` builds on the meta device and this is no weight.
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    freqs = 1.0 / config.rope_theta ** (steps / config.head_dim)
    if (rope := config.rope_scaling) is None:
        return freqs
    # Fast features stay, slow ones are slowed by `factor`, those between are blended.
    turns = rope.original_max_positions * freqs / (2 * math.pi)  # within the trained context
    span = rope.high_freq_factor - rope.low_freq_factor
    keep = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    return keep * freqs + (1 - keep) * freqs / rope.factor


def rotate_half(x: Tensor) -> Tensor:
    """(x1, x2) -> (-x2, x1), halves of the last axis."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features by its angle: x (B, heads, S, Dh), cos and sin (B, 1, S, Dh)."""
    return x * cos + rotate_half(x) * sin


def causal_mask(attention_mask: Tensor, P: int, S: int, dtype: torch.dtype) -> Tensor:
    """What attention adds to its scores: 0 where a key may be seen, else huge and negative.

    Half of the lowest number, so that a row of padding, which may look at nothing, is the same in
    PyTorch and in ONNX Runtime (see encoder.padding_mask).

    Args:
        attention_mask: (B, P+S) integers, 0 for padding.
        P: Length of the cache.
        S: Number of new tokens.
        dtype: Of the scores.

    Returns:
        (B, 1, S, P+S) of `dtype`.
    """
    keys = torch.arange(attention_mask.shape[1])  # places in the cache, not in the text
    queries = torch.arange(P, P + S)
    seen = (keys <= queries[:, None]) & attention_mask.bool()[:, None, None, :]
    return torch.where(seen, 0.0, torch.finfo(dtype).min / 2).to(dtype)


class SelfAttention(nn.Module):
    """Causal attention; n_head queries share n_kv_head keys and values."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        bias, self.head_dim = config.attention_bias, config.head_dim
        self.q_proj = nn.Linear(config.dim, config.n_head * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.dim, config.n_kv_head * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.dim, config.n_kv_head * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.n_head * config.head_dim, config.dim, bias=bias)
        self.grouped = config.n_head != config.n_kv_head

    def heads(self, x: Tensor) -> Tensor:
        """(B, S, heads * Dh) -> (B, heads, S, Dh)."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, S, D), mask (B, 1, S, P+S), past P long -> (B, S, D), present P+S long."""
        q = rotate(self.heads(self.q_proj(x)), cos, sin)
        k = rotate(self.heads(self.k_proj(x)), cos, sin)
        k = torch.cat((past["key"], k), dim=2)
        v = torch.cat((past["value"], self.heads(self.v_proj(x))), dim=2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2)), {"key": k, "value": v}


class MLP(nn.Module):
    """SwiGLU: a gate of SiLU on one projection times another."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.dim, config.ffn_dim, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn_dim, config.dim, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Layer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). Names are those of checkpoints."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `SelfAttention`."""
        y, present = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """Llama with its language-model head."""

    cos_cache: Tensor
    sin_cache: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        # Small enough that tied logits start with a spread of about one.
        nn.init.normal_(self.embed_tokens.weight, std=config.dim**-0.5)
        positions = torch.arange(config.max_positions, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, frequencies(config))  # (max_positions, head_dim / 2)
        self.register_buffer("cos_cache", angles.cos(), persistent=False)
        self.register_buffer("sin_cache", angles.sin(), persistent=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
    ) -> dict[str, Any]:
        """Read S tokens after P that are in the cache; P may be 0.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, P+S) int64, 0 for padding, on either side, cache included.
            position_ids: (B, S) int64, each token's place in its text, < max_positions.
            past_key_values: One {"key", "value"} a layer, each (B, n_kv_head, P, head_dim) float.

        Returns:
            logits: (B, S, vocab_size) float.
            present: As past_key_values, P+S long.
        """
        x = self.embed_tokens(input_ids)
        cos = F.embedding(position_ids, self.cos_cache)  # (B, S, Dh / 2)
        sin = F.embedding(position_ids, self.sin_cache)
        cos = torch.cat((cos, cos), dim=-1).unsqueeze(1)  # (B, 1, S, Dh): both halves alike
        sin = torch.cat((sin, sin), dim=-1).unsqueeze(1)
        mask = causal_mask(
            attention_mask, past_key_values[0]["key"].shape[2], input_ids.shape[1], x.dtype
        )
        present = []
        for layer, past in zip(self.layers, past_key_values, strict=True):
            x, kv = layer(x, cos, sin, mask, past)
            present.append(kv)
        x = self.norm(x)
        head = self.embed_tokens if self.config.tie_embeddings else self.lm_head
        return {"logits": F.linear(x, head.weight), "present": present}


def example(config: DecoderConfig) -> dict[str, Any]:
    """Keyword inputs to trace with: batch 2, length 3 after a past of 2, one row padded left."""
    B, P, S = 2, 2, 3
    shape = (B, config.n_kv_head, P, config.head_dim)
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.arange(B * S).reshape(B, S) % config.vocab_size,
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]),
        "position_ids": torch.tensor([[2, 3, 4], [1, 2, 3]]),
        "past_key_values": [
            {part: torch.randn(shape, generator=generator) for part in ("key", "value")}
            for _ in range(config.n_layer)
        ],
    }


# Checkpoints ------------------------------------------------------------------------------------


def config_from(config: dict[str, Any]) -> DecoderConfig:
    """The contents of a Llama config.json as a DecoderConfig; SourceError for what we lack."""
    expect(config, "model_type", "llama")
    expect(config, "hidden_act", "silu", "swish")
    expect(config, "sliding_window", None)
    expect(config, "num_local_experts", 0, None)
    expect(config, "quantization_config", None)
    for kind in config.get("layer_types") or ():
        expect({"layer_types": kind}, "layer_types", "full_attention")
    dim, n_head = need(config, "hidden_size"), need(config, "num_attention_heads")
    head_dim = config.get("head_dim") or dim // n_head
    n_kv_head = config.get("num_key_value_heads") or n_head
    if n_head % n_kv_head or head_dim % 2:
        raise SourceError(
            f"{n_head} heads of {head_dim} features cannot share {n_kv_head} keys and rotate",
            where="config.json",
        )
    theta, scaling = rope_from(config)
    return DecoderConfig(
        vocab_size=need(config, "vocab_size"),
        dim=dim,
        n_layer=need(config, "num_hidden_layers"),
        n_head=n_head,
        n_kv_head=n_kv_head,
        head_dim=head_dim,
        ffn_dim=need(config, "intermediate_size"),
        max_positions=need(config, "max_position_embeddings"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=config.get("tie_word_embeddings", False),
        attention_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
    )


def rope_from(config: dict[str, Any]) -> tuple[float, Llama3Rope | None]:
    """(theta, scaling) from `rope_parameters`, or from `rope_theta` and `rope_scaling` before it.

    Raises:
        SourceError: a rope type other than default and llama3, or a setting that we do not know.
    """
    rope = {"rope_theta": config.get("rope_theta", 10000.0)}
    rope |= config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    expect({"rope_type": kind}, "rope_type", "default", "llama3")
    rope.pop("type", None)
    expect(config, "partial_rotary_factor", 1.0, None)
    expect(rope, "partial_rotary_factor", 1.0, None)
    rope.pop("partial_rotary_factor", None)
    theta = rope.pop("rope_theta")
    if kind == "default":
        scaling = None
    else:
        try:
            scaling = Llama3Rope(
                factor=rope.pop("factor"),
                low_freq_factor=rope.pop("low_freq_factor"),
                high_freq_factor=rope.pop("high_freq_factor"),
                original_max_positions=rope.pop("original_max_position_embeddings"),
            )
        except KeyError as error:
            raise SourceError(f"rope_parameters has no {error}", where="config.json") from error
    for key, value in rope.items():  # a dictionary for each layer type, for one
        refuse(f"rope_parameters.{key}", value, ["absent"])
    return theta, scaling


def load(path: Path, *, trust_pickle: bool = False) -> Decoder:
    """A Llama checkpoint (safetensors, GGUF, pickle) in eval mode.

    Raises:
        SourceError: a configuration that is not supported, or weights that do not fit it.
    """
    config = config_from(read_config(path))
    weights = read_weights(path, trust_pickle=trust_pickle)
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    if config.tie_embeddings:
        drop_copies(weights, "embed_tokens.weight", "lm_head.weight", where=path)
    with torch.device("meta"):
        module = Decoder(config)
    # Old checkpoints store the rotary frequencies, which follow from the configuration.
    fill(module, weights, where=path, unused=r"\.rotary_emb\.inv_freq$")
    return module.eval()


def build(size: str) -> Decoder:
    """A Decoder of a named size with random weights, in eval mode."""
    return Decoder(SIZES[size]).eval()
