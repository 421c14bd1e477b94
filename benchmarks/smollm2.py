"""SmolLM2-135M-Instruct: logits and greedy tokens of the artifact against PyTorch.

    python benchmarks/smollm2.py

Logits at a cache of 0, 1 and 600 tokens, the cache written by PyTorch itself; 32 greedy tokens
for five prompts, PyTorch recomputing the whole text at every step, without a cache.
"""

from __future__ import annotations

import common
import numpy as np
import onnxpress
import torch
from onnxpress.exporter import pytorch, resolve

PROMPTS = [
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):\n",
    "The three laws of motion are",
    "Water boils at a temperature of",
]


def main() -> None:
    source = str(common.smollm2())
    out = common.CACHE / "smollm2"
    manifest = onnxpress.press(source, out, force=True, measure=False)
    generator = onnxpress.load(out)
    built = resolve(source)
    reference = pytorch(built)

    kv = manifest.kv or {}
    text = np.array([generator.tokenizer.encode(" ".join(PROMPTS) * 20)[0].ids])
    empty = {
        f"past_key_values.{i}.{part}": np.zeros((1, kv["kv_heads"], 0, kv["head_dim"]), np.float32)
        for i in range(kv["layers"])
        for part in ("key", "value")
    }

    def feeds(ids: np.ndarray, past: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
        n = ids.shape[1]
        return {
            "input_ids": ids,
            "attention_mask": np.ones((1, length + n), np.int64),
            "position_ids": np.arange(length, length + n)[None],
            **past,
        }

    differences = {}
    for length in (0, 1, 600):
        past = empty
        if length:
            written = reference.run(feeds(text[:, :length], empty, 0))[1:]
            past = dict(zip(empty, written, strict=True))
        given = feeds(text[:, length : length + 16], past, length)
        ours = generator.session.run(given)["logits"]
        differences[length] = float(np.abs(ours - reference.run(given)[0]).max())
        print(f"past {length}: max |difference| of logits {differences[length]:.1e}", flush=True)

    same = 0
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = np.array([generator.tokenizer.encode(prompt)[0].ids])
            ours = generator.generate_ids(ids, max_new_tokens=32)[0]
            seen = ids
            while seen.shape[1] < ids.shape[1] + 32:
                step = reference.run(feeds(seen, empty, 0))[0][:, -1].argmax(-1)
                seen = np.concatenate([seen, step[None]], axis=1)
            theirs = seen[0, ids.shape[1] :].tolist()
            theirs = theirs[: len(ours)] if len(ours) < 32 else theirs
            same += ours == theirs
            print(f"{prompt!r}: {'same' if ours == theirs else (ours, theirs)}", flush=True)

    words = generator.next_word(PROMPTS[0])
    print(words)
    common.finish(
        "smollm2",
        {
            "machine": common.machine(),
            "versions": common.versions("torch", "onnxruntime"),
            "logits_max_abs_at_past": differences,
            "prompts_with_the_same_32_greedy_tokens": f"{same} of {len(PROMPTS)}",
            "next_word": words[0],
            "nodes": sum(manifest.ops.values()),
        },
    )


if __name__ == "__main__":
    main()
