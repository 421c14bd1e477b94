"""A module of one's own, from PyTorch to an artifact that runs without it.

    python examples/custom_module.py
    onnxpress press examples/custom_module.py:build -o out/reader --target cpu

`build` is the whole contract: a function without arguments that returns the module and example
inputs. Which axes may vary is found; `build_with_dims` says it instead, with a third item.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

VOCAB, DIM, HEADS, CLASSES = 100, 32, 4, 3


class Reader(nn.Module):
    """Token ids to class scores, through one layer of attention and a weighted mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, ids: Tensor, mask: Tensor, *, weights: Tensor) -> dict[str, Tensor]:
        """(B, S) ids and mask (1 is a token), (B, S) weights of the mean."""
        batch, length = ids.shape
        x = self.embedding(ids)
        q, k, v = (
            t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )
        seen = mask.bool()[:, None, None, :]  # stretched over queries: the passes write that out
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = self.norm(x + attended.transpose(1, 2).reshape(batch, length, DIM))
        w = (weights * mask).unsqueeze(-1)
        pooled = (x * w).sum(1) / w.sum(1).clamp(min=1e-6)
        return {"scores": self.head(pooled).softmax(-1), "pooled": pooled}


def build() -> tuple[nn.Module, dict[str, Any]]:
    """The module and its example inputs, by the names of forward's parameters.

    A tuple would be positional; `weights` is keyword-only, so this is a dict. The values do not
    matter much, the sizes a little: 2 or more, and different for axes that are not the same.
    """
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return Reader(), {"ids": ids, "mask": mask, "weights": torch.rand(2, 7)}


def build_with_dims() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The same, with the axes that vary named and bounded, as torch.export takes them."""
    module, example = build()
    axes = {0: Dim("batch"), 1: Dim("words", max=64)}
    return module, example, dict.fromkeys(example, axes)


def main() -> None:
    """Press both variants to a directory that goes away, and run one on other sizes."""
    import numpy as np
    import onnxpress

    with tempfile.TemporaryDirectory() as folder:
        for factory in ("build", "build_with_dims"):
            manifest = onnxpress.press(f"{__file__}:{factory}", Path(folder) / factory)
            parity = manifest.parity or {}
            print(f"{factory}: {len(parity['points'])} points, {parity['max_abs']}")
            for spec in (*manifest.inputs, *manifest.outputs):
                print(f"  {spec}")
        session = onnxpress.load(Path(folder) / "build")
        feeds = {
            "ids": np.random.default_rng(0).integers(0, VOCAB, (5, 12)),
            "mask": np.ones((5, 12), np.int64),
            "weights": np.ones((5, 12), np.float32),
        }
        for name, array in session.run(feeds).items():
            print(f"{name} {array.shape}: {array[0, :3]}")


if __name__ == "__main__":
    main()
