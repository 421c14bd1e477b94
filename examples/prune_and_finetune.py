"""Prune a module in PyTorch, distill what it lost from the original, then press it.

    python examples/prune_and_finetune.py
    onnxpress press examples/prune_and_finetune.py:pruned -o out/pruned --target cpu

`--prune` prunes a graph and makes up for the mean of what goes; it does not train. Here are the
same scores and surgery in PyTorch, and steps towards the outputs of the original, without labels.
"""

from __future__ import annotations

import copy
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, DIM, HEADS, HIDDEN = 100, 64, 4, 256


class Block(nn.Module):
    """Attention and a feed-forward block, each added to its input; (B, S, DIM) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.up, self.down = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        n = F.layer_norm(x, (DIM,))
        parts = (f(n).unflatten(2, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (DIM,)))))


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The original, which stands for one of yours, and example inputs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(VOCAB, DIM), Block(), Block()).eval()
    return module, {"input": torch.randint(0, VOCAB, (2, 7))}


@torch.no_grad()
def shrink(net: nn.Module, ids: Tensor, units: int, into: nn.Linear, *makers: nn.Linear) -> None:
    """Leave three quarters of the units that enter `into`: what strays most from its mean."""
    seen: list[Tensor] = []
    with into.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1))):
        net(ids)
    mean = seen[0].mean(0)
    apart, weight = (t.unflatten(1, (units, -1)) for t in (seen[0] - mean, into.weight))
    scores = torch.einsum("nuw,ouw->nuo", apart, weight).square().sum(2).mean(0)
    kept = scores.topk(units * 3 // 4).indices.sort().values
    channels = torch.arange(len(mean)).unflatten(0, (units, -1))[kept].flatten()
    mean[channels] = 0.0
    into.bias += into.weight @ mean  # what goes gives its mean from now on
    into.weight = nn.Parameter(into.weight[:, channels])
    for maker in makers:
        maker.weight, maker.bias = (nn.Parameter(p[channels]) for p in (maker.weight, maker.bias))


def pruned() -> tuple[nn.Module, dict[str, Tensor]]:
    """The original without a quarter of its heads and columns, distilled for 100 steps."""
    teacher, example = build()
    student, ids = copy.deepcopy(teacher), torch.randint(0, VOCAB, (64, 16))
    for block in student[1:]:
        shrink(student, ids, HEADS, block.out, block.q, block.k, block.v)
        block.heads = HEADS * 3 // 4
        shrink(student, ids, HIDDEN, block.down, block.up)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(101):
        batch = torch.randint(0, VOCAB, (32, 16))  # yours: a few thousand of your texts
        want = teacher(batch).detach()
        loss = F.mse_loss(student(batch), want)
        if step % 50 == 0:
            print(f"step {step:3}: relative error {(loss / want.square().mean()).sqrt():.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.eval(), example


if __name__ == "__main__":
    import onnxpress

    with tempfile.TemporaryDirectory() as folder:
        manifest = onnxpress.press(f"{__file__}:pruned", f"{folder}/pruned")
    print(f"pressed, {len((manifest.parity or {})['points'])} points against PyTorch")
