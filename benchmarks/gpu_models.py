"""What onnxpress runs against: BERT and Llama in PyTorch, written for speed and to be read.

Both take the parameters of models/encoder.py and models/decoder.py by name. They differ from those
where PyTorch is faster another way, which is what a contestant is owed: attention without a mask
where nothing is padded, and a cache that stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from onnxpress.models import decoder
from torch import Tensor, nn

Parameters = dict[str, Tensor]


def _stay(tensors: Iterable[Tensor]) -> None:
    """Tell torch.compile that these keep their addresses: its CUDA graphs copy others each time."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)


class Bert(nn.Module):
    """(B, S) ids to (B, S, D): no row is padded, so that attention needs no mask."""

    def __init__(self, config: dict[str, Any], parameters: Parameters) -> None:
        super().__init__()
        self.config, self.p = config, parameters
        _stay(parameters.values())

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.p[f"{name}.weight"], self.p[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.config["norm_eps"])

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.config["n_head"], -1).transpose(1, 2)

    def forward(self, ids: Tensor, types: Tensor) -> Tensor:
        p = self.p
        x = F.embedding(ids, p["tokens.weight"]) + F.embedding(types, p["types.weight"])
        x = self.norm(x + p["positions.weight"][: ids.shape[1]], "norm")
        for i in range(self.config["n_layer"]):
            at = f"layers.{i}"
            q, k, v = (
                self.heads(self.linear(x, f"{at}.attention.{n}")) for n in ("query", "key", "value")
            )
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = self.norm(x + self.linear(y, f"{at}.attention.out"), f"{at}.attention_norm")
            y = self.linear(F.gelu(self.linear(x, f"{at}.up")), f"{at}.down")
            x = self.norm(x + y, f"{at}.ffn_norm")
        return x


class Llama(nn.Module):
    """Llama over a cache of fixed capacity, which is written in place.

    Args:
        config: Of models/decoder.py, as a dict.
        parameters: Its parameters.
        batch: Rows of the cache.
        capacity: Tokens of the cache.
        turns: cos and sin, (positions, head_dim / 2) each: of `tables`.
    """

    def __init__(
        self,
        config: dict[str, Any],
        parameters: Parameters,
        batch: int,
        capacity: int,
        turns: tuple[Tensor, Tensor],
    ) -> None:
        super().__init__()
        self.config, self.p = config, parameters
        like = parameters["norm.weight"]
        self.cos, self.sin = (torch.cat((t, t), -1).to(like) for t in turns)
        shape = (batch, config["n_kv_head"], capacity, config["head_dim"])
        self.cache = [
            (torch.zeros(shape, dtype=like.dtype, device=like.device),
             torch.zeros(shape, dtype=like.dtype, device=like.device))
            for _ in range(config["n_layer"])
        ]  # fmt: skip
        _stay([*parameters.values(), *(t for pair in self.cache for t in pair)])

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.p[f"{name}.weight"]
        return F.rms_norm(x, weight.shape, weight, self.config["norm_eps"])

    def rotate(self, x: Tensor, first: int) -> Tensor:
        last, half = first + x.shape[2], x.shape[-1] // 2
        cos, sin = self.cos[first:last], self.sin[first:last]
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def forward(self, ids: Tensor, first: int) -> Tensor:
        """(B, S) ids at the places from `first` on, a number of the trace: (B, S, vocabulary)."""
        c, p = self.config, self.p
        x = F.embedding(ids, p["embed_tokens.weight"])
        last = first + ids.shape[1]
        grouped = c["n_head"] != c["n_kv_head"]
        for i, (keys, values) in enumerate(self.cache):
            at = f"layers.{i}"
            y = self.norm(x, f"{at}.input_layernorm")
            q, k, v = (
                F.linear(y, p[f"{at}.self_attn.{n}_proj.weight"])
                .view(*ids.shape, -1, c["head_dim"])
                .transpose(1, 2)
                for n in "qkv"
            )
            q = self.rotate(q, first)
            keys[:, :, first:last] = self.rotate(k, first)
            values[:, :, first:last] = v
            # One token sees all before it, and a prompt itself: no mask, so that flash serves.
            y = F.scaled_dot_product_attention(
                q, keys[:, :, :last], values[:, :, :last], is_causal=first == 0, enable_gqa=grouped
            )
            x = x + F.linear(y.transpose(1, 2).flatten(2), p[f"{at}.self_attn.o_proj.weight"])
            y = self.norm(x, f"{at}.post_attention_layernorm")
            gate = F.silu(F.linear(y, p[f"{at}.mlp.gate_proj.weight"]))
            y = gate * F.linear(y, p[f"{at}.mlp.up_proj.weight"])
            x = x + F.linear(y, p[f"{at}.mlp.down_proj.weight"])
        head = p["embed_tokens.weight" if c["tie_embeddings"] else "lm_head.weight"]
        return F.linear(self.norm(x, "norm"), head)


def tables(config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, as models/decoder.py has them."""
    own = decoder.DecoderConfig(**config)
    positions = torch.arange(own.max_positions, dtype=torch.float32)
    angles = torch.outer(positions, decoder.frequencies(own))
    return angles.cos(), angles.sin()
