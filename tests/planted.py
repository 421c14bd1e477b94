"""Artifacts with one thing planted in them that low precision does not hold. No test is in here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnxpress import artifact
from onnxpress.optimizers.pipeline import raised, run_passes
from onnxpress.press.data import prepare
from onnxpress.press.lab import Lab

from .onnx_models import HIDDEN, PAD, VOCAB, WORDS, graph, normal, publish, tokenizer

D = 64  # a weight of D x D is large enough to be made int8
RARE = "river"
EMBED = {"pooling": "mean", "normalize": True, "max_length": 12, "pad_token_id": PAD}


def texts(path: Path, count: int, seed: int) -> Path:
    """A .txt of ragged texts of the tokenizer's own words."""
    rng = np.random.default_rng(seed)
    rows = (" ".join(rng.choice(WORDS, rng.integers(2, 11))) for _ in range(count))
    path.write_text("\n".join(rows))
    return path


def arrays(path: Path, count: int, seed: int) -> Path:
    """A directory of .npz files for the input x, (batch, D)."""
    path.mkdir()
    for i in range(count):
        np.savez(path / f"{i}.npz", x=normal(seed + i, 4, D))
    return path


def lab(directory: Path, folder: Path, calibration: Path, evaluation: Path, target: str) -> Lab:
    """Where the candidates of an artifact are tried."""
    manifest, model = artifact.read_manifest(directory), artifact.open_model(directory)
    run_passes(model, raised())
    sets = prepare(manifest.task, manifest.inputs, calibration=calibration, evaluation=evaluation)
    files = {n: (directory / n).read_bytes() for n in manifest.files if "model" not in n}
    return Lab(model, target, sets, manifest, files, folder)


def _declared(weights: dict[str, np.ndarray]) -> str:
    return ", ".join(f"float[{','.join(map(str, w.shape))}] {n}" for n, w in weights.items())


def embedder(path: Path, *, channel: float = 1.0, rare: int = 0, value: float = 1.0) -> Path:
    """One attention, two feed-forward blocks, each after its norm.

    Args:
        path: The artifact.
        channel: The norm before the last block has this gain on one channel. The rows of the
            weight behind it are as much smaller, so that the float32 answer hardly knows of it.
        rare: So many layers read the embeddings as they are, of which one word's are 500 times
            the others'. A norm follows, so the other words matter as much: no channel stands out,
            and no smoothing helps.
        value: The projection of the values of the attention is this much larger, and what reads
            them this much smaller.
    """
    w = {"table": normal(1, len(VOCAB), D), "one": np.ones(D, np.float32)}
    w |= {f"w{n}": normal(10 + i, D, D) / 8 for i, n in enumerate("qkvo")}
    w["wv"] *= value
    w["wo"] /= value
    if rare:
        w["table"][VOCAB.index(RARE)] *= 500
    body, x = [], "x0"
    for i in range(rare):
        w[f"raw{i}"] = normal(80 + i, D, D) / 8
        body.append(f"r{i} = MatMul(x0, raw{i})  y{i} = LayerNormalization(r{i}, one)")
        if i:
            body.append(f"s{i} = Add({x}, y{i})")
        x = f"s{i}" if i else "y0"
    for i in range(2):
        gain, up = 1 + 0.1 * normal(20 + i, D), normal(30 + i, D, D) / 8
        if i:
            gain[7] *= channel
            up[7] /= channel
        w |= {f"g{i}": gain, f"b{i}": 0.1 * normal(40 + i, D), f"u{i}": up}
        w |= {f"ub{i}": 0.1 * normal(50 + i, D), f"d{i}": normal(60 + i, D, D) / 8}
        w[f"db{i}"] = 0.1 * normal(70 + i, D)
        read = x if not i else "h1"
        body.append(f"""n{i} = LayerNormalization({read}, g{i}, b{i})""")
        if not i:
            body.append("""q = MatMul(n0, wq)  k = MatMul(n0, wk)  v = MatMul(n0, wv)
              a = Attention<q_num_heads=4, kv_num_heads=4>(q, k, v, mask)
              o = MatMul(a, wo)  f0 = Add(n0, o)""")
        else:
            body.append("f1 = Identity(n1)")
        body.append(f"""m{i} = MatMul(f{i}, u{i})  p{i} = Add(m{i}, ub{i})  e{i} = Gelu(p{i})
          c{i} = MatMul(e{i}, d{i})  h{i + 1} = Add(c{i}, db{i})""")
    model = graph(
        f"""g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask,
        {_declared(w)}) => (float[batch,sequence,{D}] last_hidden_state) {{
        real = Cast<to=9>(attention_mask)  axes = Constant<value_ints=[1, 2]>()
        real4 = Unsqueeze(real, axes)
        yes = Constant<value_float=0.0>()  no = Constant<value_float=-3.4028234e38>()
        mask = Where(real4, yes, no)
        x0 = Gather(table, input_ids)
        {" ".join(body)} last_hidden_state = LayerNormalization(h2, one) }}""",
        w,
    )
    return publish(path, model, task="embed", settings=EMBED, tokenizer_json=tokenizer())


def classifier(path: Path) -> Path:
    """logits = masked mean @ head, with a head that is large enough for int8."""
    w = {"table": normal(1, len(VOCAB), D), "head": normal(2, D, 32)}
    model = graph(
        f"""g (int64[batch,sequence] input_ids, int64[batch,sequence] attention_mask,
        {_declared(w)}) => (float[batch,32] logits)
        {{ {HIDDEN} flat = Squeeze(mean, one)  logits = MatMul(flat, head) }}""",
        w,
    )
    settings = {
        "labels": [f"label {i}" for i in range(32)],
        "problem": "single",
        "max_length": 12,
        "pad_token_id": PAD,
    }
    return publish(path, model, task="classify", settings=settings, tokenizer_json=tokenizer())


def tensors(path: Path, *, peak: float = 1.0, seed: int = 0) -> Path:
    """x -> h -> r -> k -> y: h and r reach about 30 times `peak`, and k is as small again."""
    w = {
        "first": normal(seed + 1, D, D) * np.float32(peak),
        "second": normal(seed + 2, D, D) / np.float32(8 * peak),
        "third": normal(seed + 3, D, D) / 8,
        "bias": normal(seed + 4, D),
    }
    model = graph(
        f"""g (float[batch,{D}] x, {_declared(w)}) => (float[batch,{D}] y)
        {{ h = MatMul(x, first)  r = Relu(h)  k = MatMul(r, second)  b = Add(k, bias)
           s = MatMul(b, third)  y = Gelu(s) }}""",
        w,
    )
    return publish(path, model)


def chain(path: Path) -> Path:
    """Layers that read each other, with nothing in between."""
    w = {f"w{i}": normal(i, D, D) / 8 for i in range(3)}
    model = graph(
        f"""g (float[batch,{D}] x, {_declared(w)}) => (float[batch,{D}] y)
        {{ a = MatMul(x, w0)  b = MatMul(a, w1)  y = MatMul(b, w2) }}""",
        w,
    )
    return publish(path, model)


def without_layers(path: Path) -> Path:
    """y = sqrt(|x|): no MatMul at all."""
    model = graph(f"g (float[batch,{D}] x) => (float[batch,{D}] y) {{ a = Abs(x) y = Sqrt(a) }}")
    return publish(path, model)


def dtypes(directory: Path) -> dict[str, ir.DataType | None]:
    """The type of each value that a published graph computes."""
    nodes = ir.traversal.RecursiveGraphIterator(artifact.open_model(directory).graph)
    return {str(v.name): v.dtype for node in nodes for v in node.outputs}
