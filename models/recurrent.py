"""A recurrent sentiment classifier: embedding, bidirectional LSTM, mean, one dense layer.

Hochreiter & Schmidhuber 1997, "Long Short-Term Memory"; both directions as in Graves &
Schmidhuber 2005.

Notable choices:
- `pack_padded_sequence` cannot be exported. Instead the valid part of each text is reversed by a
  gather, and an ordinary LSTM reads it: padding stays on the right in both directions, so that it
  comes after every valid word. Padded results equal unpadded ones, and equal those of
  nn.LSTM(bidirectional=True) on packed sequences. The price is two ONNX LSTM nodes a layer.
- The text is the mean over its valid places.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import expect, fill, need, read_config, read_weights


@dataclass(frozen=True)
class RecurrentConfig:
    """Sizes of the classifier."""

    vocab_size: int
    dim: int
    hidden_dim: int
    n_layer: int
    n_label: int = 2
    bidirectional: bool = True


SIZES = {
    "tiny": RecurrentConfig(vocab_size=256, dim=64, hidden_dim=64, n_layer=2),
    "base": RecurrentConfig(vocab_size=30522, dim=256, hidden_dim=512, n_layer=2),
}


class Layer(nn.Module):
    """One LSTM layer, in one or both directions."""

    def __init__(self, dim: int, hidden_dim: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.onward = nn.LSTM(dim, hidden_dim, batch_first=True)
        self.backward_ = nn.LSTM(dim, hidden_dim, batch_first=True) if bidirectional else None

    def forward(self, x: Tensor, places: Tensor, reverse: Tensor) -> Tensor:
        """x (B, S, D), places (S,) in order, reverse (B, S) reversed -> (B, S, H or 2H)."""
        # Reading by places changes nothing but the length on paper: torch's export takes the
        # traced length for the output of an LSTM, and would freeze it in what follows.
        y: Tensor = self.onward(x)[0].index_select(1, places)
        if self.backward_ is None:
            return y
        z = self.backward_(take(x, reverse))[0]
        return torch.cat((y, take(z, reverse)), dim=-1)  # reversing twice restores the order


def take(x: Tensor, places: Tensor) -> Tensor:
    """Reorder each text: x (B, S, D), places (B, S) -> (B, S, D)."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class Recurrent(nn.Module):
    """LSTM classifier of texts."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.config = config
        out = config.hidden_dim * (2 if config.bidirectional else 1)
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            Layer(out if i else config.dim, config.hidden_dim, bidirectional=config.bidirectional)
            for i in range(config.n_layer)
        )
        self.classifier = nn.Linear(out, config.n_label)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Classify a batch.

        Args:
            input_ids: (B, S) int64.
            attention_mask: (B, S) int64, ones and then zeros: padding belongs on the right, only
                the number of ones is read. A row of zeros gives the classifier's bias.

        Returns:
            logits: (B, n_label) float.
        """
        places = torch.arange(input_ids.shape[1])  # (S,)
        lengths = attention_mask.sum(1, keepdim=True)  # (B, 1)
        valid = places < lengths  # (B, S)
        reverse = torch.where(valid, lengths - 1 - places, places)
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x, places, reverse)
        total = (x * valid.unsqueeze(-1).to(x.dtype)).sum(1)
        return {"logits": self.classifier(total / lengths.clamp(min=1).to(x.dtype))}


def example(config: RecurrentConfig) -> dict[str, Any]:
    """Keyword inputs to trace with: batch 2, length 5, one row padded."""
    ids = torch.arange(10).reshape(2, 5) % config.vocab_size
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}


# Checkpoints: our own format, since no library has one. config.json holds the fields of
# RecurrentConfig and model_type "recurrent", model.safetensors the state_dict.


def config_from(config: dict[str, Any]) -> RecurrentConfig:
    """The contents of config.json as a RecurrentConfig; SourceError for a missing size."""
    expect(config, "model_type", "recurrent")
    expect(config, "bidirectional", True, False)
    return RecurrentConfig(
        vocab_size=need(config, "vocab_size"),
        dim=need(config, "dim"),
        hidden_dim=need(config, "hidden_dim"),
        n_layer=need(config, "n_layer"),
        n_label=need(config, "n_label"),
        bidirectional=config.get("bidirectional", True),
    )


def load(path: Path, *, trust_pickle: bool = False) -> Recurrent:
    """A checkpoint in eval mode; SourceError where configuration and weights do not fit."""
    config = config_from(read_config(path))
    with torch.device("meta"):
        module = Recurrent(config)
    fill(module, read_weights(path, trust_pickle=trust_pickle), where=path)
    return module.eval()


def build(size: str) -> Recurrent:
    """A Recurrent of a named size with random weights, in eval mode."""
    return Recurrent(SIZES[size]).eval()
