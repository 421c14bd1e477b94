"""Transformers as other exporters write them: every layer is lifted, and the numbers stay."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxpress
import onnxruntime as ort
import pytest
from onnxpress.optimizers import TARGETS, optimize
from onnxpress.optimizers.explain import explain

_path = Path(onnxpress.__file__).parent / "benchmarks" / "corpus.py"
_spec = importlib.util.spec_from_file_location("corpus", _path)
assert _spec is not None
assert _spec.loader is not None
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)

# What two layers of each hold: Attention, norms, GELU, rotary embeddings.
LAYERS = {
    "minilm": (2, 5, 2, 0),
    "minilm-eager": (2, 5, 2, 0),
    "nn-encoder": (2, 4, 2, 0),
    "nn-transformer": (6, 12, 0, 0),
    "hand": (6, 12, 0, 0),
    "vit": (2, 5, 2, 0),
    "gpt2": (2, 5, 2, 0),
    "t5": (2, 5, 2, 0),
    "llama": (2, 5, 0, 4),
}
# TorchScript writes the length into the reshapes of nn.MultiheadAttention: only that one runs.
FROZEN = {("nn-encoder", "script14"), ("nn-transformer", "script14")}
CASES = [
    *((name, "script14") for name in LAYERS),
    ("minilm-eager", "script11"),
    ("minilm", "dynamo18"),
    ("llama", "dynamo18"),
]


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def resized(feeds: dict[str, np.ndarray], batch: int, length: int) -> dict[str, np.ndarray]:
    """The example inputs at another size; text ends in padding in its last row."""
    found = {}
    for name, x in feeds.items():
        if x.ndim == 4:  # an image
            found[name] = np.resize(x, (batch, *x.shape[1:]))
            continue
        found[name] = np.resize(x, (batch, length, *x.shape[2:]))
        if name in ("attention_mask", "padding"):
            found[name][:] = name == "attention_mask"
            found[name][-1, length // 2 + 1 :] = name == "padding"
    return found


@pytest.mark.parametrize(("name", "how"), CASES)
def test_every_layer_is_fused(name: str, how: str, tmp_path: Path) -> None:
    before = corpus.export(name, how, tmp_path / "before.onnx")
    model = ir.load(before)
    steps = optimize(model, TARGETS["cpu"])
    table = {fusion.kind: fusion for fusion in explain(model, steps)}

    kinds = ("Attention", "LayerNormalization", "Gelu", "RotaryEmbedding")
    count = Counter()
    for kind, fusion in table.items():
        count["LayerNormalization" if kind == "RMSNormalization" else kind] += fusion.fused
    assert tuple(count[kind] for kind in kinds) == LAYERS[name]
    assert not [miss for fusion in table.values() for miss in fusion.missed]

    ir.save(model, after := tmp_path / "after.onnx")
    _, example, names, _ = corpus.module(name)
    given = dict(zip(names, (x.numpy() for x in example), strict=True))
    sizes = [] if (name, how) in FROZEN else [(1, 1), (3, 5)]
    for feeds in (given, *(resized(given, *size) for size in sizes)):
        for a, b in zip(run(after, feeds), run(before, feeds), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
