"""all-MiniLM-L6-v2: how close the artifact is to PyTorch, and how fast beside it.

    python benchmarks/minilm.py

Contestants, interleaved in one run: the pressed artifact; PyTorch eager on models/encoder.py and
on transformers' BertModel (sdpa); and that BertModel as torch.onnx.export writes it, in ONNX
Runtime with all of its own optimizations. Embeddings are compared with sentence-transformers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import common
import numpy as np
import onnxpress
import onnxruntime
import torch
from onnxpress.exporter import resolve
from onnxpress.runtime import random_feeds, time_runs
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

SHAPES = [(1, 16), (1, 128), (8, 16), (8, 128)]
TEXTS = [
    "A cat sits on the warm windowsill.",
    "The kitten is asleep by the window.",
    "Quarterly revenue rose by nine percent.",
    "",
    "word " * 400,
    "Über die Brücke - 日本語のテキスト, émojis 🙂 and a URL https://example.org/?q=1",
    "1234567890",
    "a",
]


def as_exported(model: torch.nn.Module, folder: Path) -> onnxruntime.InferenceSession:
    ids = torch.ones(2, 7, dtype=torch.int64)
    dims = {0: "batch", 1: "sequence"}
    names = ["input_ids", "attention_mask", "token_type_ids"]
    program = torch.onnx.export(
        model,
        kwargs={n: ids.clone() for n in names},
        dynamic_shapes=dict.fromkeys(names, dims),
        dynamo=True,
        verbose=False,
    )
    program.save(str(folder / "as_exported.onnx"))
    return onnxruntime.InferenceSession(folder / "as_exported.onnx")


def main() -> None:
    source = common.minilm()
    out = common.CACHE / "minilm"
    manifest = onnxpress.press(str(source), out, force=True, measure=False)
    embedder = onnxpress.load(out)
    parity = manifest.parity or {}

    theirs = SentenceTransformer(str(source), device="cpu").encode(TEXTS)
    ours = embedder.embed(TEXTS)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)

    module = resolve(str(source)).module
    hf = AutoModel.from_pretrained(source).eval()
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        exported = as_exported(hf, Path(folder))
        for batch, length in SHAPES:
            feeds = random_feeds(embedder.session.inputs, {"batch": batch, "sequence": length})
            tensors = {k: torch.from_numpy(v) for k, v in feeds.items()}
            timed = time_runs(
                {
                    "onnxpress": lambda f=feeds: embedder.session.run(f),
                    "torch, models/encoder.py": lambda t=tensors: module(**t),
                    "torch, transformers": lambda t=tensors: hf(**t),
                    "ORT, torch.onnx.export default": lambda f=feeds: exported.run(None, f),
                },
                rounds=11,
                min_seconds=0.2,
            )
            ms = {k: round(t.median, 2) for k, t in timed.items()}
            rows.append({"batch": batch, "length": length, "ms": ms})
            print(f"{batch}x{length}: {ms}", flush=True)

    common.finish(
        "minilm",
        {
            "machine": common.machine(),
            "versions": common.versions("torch", "onnxruntime", "transformers"),
            "parity_points": len(parity["points"]),
            "token_outputs_max_abs": max(p["max_abs"] for p in parity["points"]),
            "nodes": sum(manifest.ops.values()),
            "min_cosine_to_sentence_transformers": float(cosine.min()),
            "texts": len(TEXTS),
            "rounds": 11,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
