"""Models as users write them: each factory gives (module, example inputs). No test is in here."""

from __future__ import annotations

import torch
from torch import nn

D = 16


def _seeded(build):
    def factory():
        torch.manual_seed(0)
        return build()

    return factory


def _padding(*lengths: int, longest: int) -> torch.Tensor:
    """src_key_padding_mask: True is padding."""
    return torch.arange(longest)[None] >= torch.tensor(lengths)[:, None]


@_seeded
def linear():
    return nn.Linear(4, 3), (torch.randn(2, 4),)


def _layer():
    return nn.TransformerEncoderLayer(D, 2, 32, batch_first=True)


@_seeded
def transformer_encoder():
    return nn.TransformerEncoder(_layer(), 2, enable_nested_tensor=False), (torch.randn(2, 5, D),)


@_seeded
def transformer_encoder_masked():
    example = {"src": torch.randn(2, 5, D), "src_key_padding_mask": _padding(5, 3, longest=5)}
    # With nested tensors, as by default: in eval mode PyTorch then takes another path itself.
    return nn.TransformerEncoder(_layer(), 2), example


@_seeded
def transformer():
    model = nn.Transformer(D, 2, 1, 1, 32, batch_first=True)
    return model, (torch.randn(2, 5, D), torch.randn(2, 4, D))


@_seeded
def multihead_attention():
    model = nn.MultiheadAttention(D, 2, batch_first=True)
    return model, (torch.randn(2, 5, D), torch.randn(2, 6, D), torch.randn(2, 6, D))


class HandAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x, mask):
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (D // 2) ** 0.5
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, D))


@_seeded
def hand_attention():
    return HandAttention(), (torch.randn(2, 5, D), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]))


class BiLSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, D)
        self.lstm = nn.LSTM(D, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, 3)

    def forward(self, ids):
        hidden, _ = self.lstm(self.embed(ids))
        return self.head(hidden), self.head(hidden.mean(1))


@_seeded
def bilstm():
    return BiLSTM(), (torch.randint(0, 50, (2, 7)),)


class DictOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = _layer(), nn.Linear(D, 3)

    def forward(self, x):
        hidden = self.layer(x)
        return {"hidden": hidden, "logits": self.head(hidden[:, 0])}


@_seeded
def dict_out():
    return DictOut(), (torch.randn(2, 5, D),)


class KeywordOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, *, query, bias):
        return self.linear(query) + bias


@_seeded
def keyword_only():
    return KeywordOnly(), {"query": torch.randn(2, 5, D), "bias": torch.randn(2, 5, D)}


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, y):
        hidden = self.linear(x) - 2 * y
        return {"first": hidden.tanh(), "second": hidden.sum(-1)}


@_seeded
def two_outputs():
    return TwoOutputs(), (torch.randn(2, 5, 4), torch.randn(2, 5, 4))
