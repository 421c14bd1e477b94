"""Small graphs with weights large enough for int8, and how the tests of int8 run and judge them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
from onnxpress.optimizers.clean.infer_shapes import InferShapes

from .onnx_models import graph, normal

D, HEADS, SIZE, FFN = 32, 4, 8, 48  # D * D is the smallest weight that is worth int8
Feeds = dict[str, np.ndarray]


def build(
    inputs: str, outputs: str, body: str, weights: Feeds | None = None, *, opset: int = 23
) -> ir.Model:
    """A graph in ONNX text; its weights are declared here, and quoted there."""
    weights = weights or {}
    kinds = {"float32": "float", "float16": "float16"}
    declared = [
        f'{kinds[w.dtype.name]}[{",".join(map(str, w.shape))}] "{name}"'
        for name, w in weights.items()
    ]
    text = f"g ({', '.join([inputs, *declared])}) => ({outputs}) {{ {body} }}"
    model = graph(text, weights, opset=opset)
    for i, node in enumerate(model.graph):
        node.name = f"n{i}_{node.op_type}"
    InferShapes()(model)
    return model


def session_run(model: ir.Model, feeds: Feeds) -> Feeds:
    return next(run(model, [feeds]))


def run(model: ir.Model, data: Iterable[Feeds]) -> Iterator[Feeds]:
    """What passes are handed: the graph as it is, without ONNX Runtime's own rewrites."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # of the initializers that an unread layer leaves
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [o.name for o in session.get_outputs()]
    for feeds in data:
        yield dict(zip(names, session.run(None, feeds), strict=True))


def signature(model: ir.Model) -> list[tuple]:
    return [(v.name, v.dtype, str(v.shape)) for v in (*model.graph.inputs, *model.graph.outputs)]


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def text(model: ir.Model) -> str:
    return ir.to_onnx_text(model, exclude_initializers=True)


def weights_of(model: ir.Model) -> Feeds:
    return {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}


def apply(model: ir.Model, *passes: ir.passes.InPlacePass) -> list:
    """Run passes, and hold each of them to what it owes; what they returned."""
    outcomes, before = [], signature(model)
    for p in passes:
        outcome = p(model)
        outcomes.append(outcome)
        assert signature(model) == before
        assert outcome.modified == bool(outcome.hits)
        common.CheckerPass(full_check=not any(n.domain for n in model.graph))(model)
        written = ir.to_onnx_text(model)
        again = p(model)
        assert (again.hits, again.modified) == (0, False), "not idempotent"
        assert ir.to_onnx_text(model) == written
    return outcomes


def error(got: Feeds, want: Feeds) -> float:
    """Greatest distance of an output, over the length of that output."""
    assert set(got) == set(want)
    assert all(np.isfinite(got[n]).all() for n in got)
    return max(
        float(np.linalg.norm(got[n].astype(np.float64) - want[n]) / np.linalg.norm(want[n]))
        for n in want
    )


def block(
    *,
    pre: bool = True,
    rms: bool = False,
    kv: int = HEADS,
    ffn: str = "Gelu",
    bias: bool = True,
    outliers: float = 1.0,
    seed: int = 0,
) -> ir.Model:
    """One Transformer block x -> y, its norms before or after what they norm.

    `outliers` is what two channels of each norm are multiplied by, and what their weights are
    divided by, as training leaves them.
    """
    weights: Feeds = {}
    lines: list[str] = []
    rng = np.random.default_rng(seed)

    def norm(x: str, out: str) -> None:
        scale = (1 + 0.1 * rng.standard_normal(D)).astype(np.float32)
        scale[[3, 17]] *= outliers
        weights[f"{out}.weight"] = scale
        if rms:
            lines.append(f'{out} = RMSNormalization({x}, "{out}.weight")')
        else:
            weights[f"{out}.bias"] = (0.3 * rng.standard_normal(D)).astype(np.float32)
            lines.append(f'{out} = LayerNormalization({x}, "{out}.weight", "{out}.bias")')

    def linear(x: str, out: str, k: int, n: int) -> None:
        w = rng.standard_normal((k, n)) / np.sqrt(k)
        if x.startswith("ln"):
            w[[3, 17]] /= outliers
        weights[f"{out}.weight"] = w.astype(np.float32)
        if bias:
            weights[f"{out}.bias"] = rng.standard_normal(n).astype(np.float32)
            lines.append(f'{out}_m = MatMul({x}, "{out}.weight")')
            lines.append(f'{out} = Add({out}_m, "{out}.bias")')
        else:
            lines.append(f'{out} = MatMul({x}, "{out}.weight")')

    def attention(x: str) -> None:
        for name, heads in (("q", HEADS), ("k", kv), ("v", kv)):
            linear(x, name, D, heads * SIZE)
        lines.append(f"a = Attention<q_num_heads={HEADS}, kv_num_heads={kv}>(q, k, v)")
        linear("a", "o", D, D)
        lines.append("r = Add(x, o)")

    def feed_forward(x: str) -> None:
        linear(x, "up", D, FFN)
        if ffn == "gated":
            linear(x, "gate", D, FFN)
            lines.extend(["s = Sigmoid(gate)", "f = Mul(s, up)"])
        else:
            lines.append(f"f = {ffn}(up)")
        linear("f", "down", FFN, D)

    if pre:
        norm("x", "ln1")
        attention("ln1")
        norm("r", "ln2")
        feed_forward("ln2")
        lines.append("y = Add(r, down)")
    else:
        attention("x")
        norm("r", "ln1")
        feed_forward("ln1")
        lines.append("t = Add(ln1, down)")
        norm("t", "y")
    return build(f"float[b,s,{D}] x", f"float[b,s,{D}] y", "  ".join(lines), weights)


def feeds(seed: int = 0, batch: int = 2, length: int = 16) -> Feeds:
    return {"x": normal(seed, batch, length, D)}
