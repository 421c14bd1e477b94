"""A 7B-shaped Llama goes through the optimizer: seconds and memory, its weights left on disk.

    python benchmarks/scale.py

The graph is what an exporter writes at opset 18 in float16: decomposed RMSNorm, rotate-half
rotary, scaled_dot_product_attention with an additive causal and padding mask, SwiGLU. Its 13 GB of
weights are a hole in a sparse file. For every target a fresh process loads, optimizes and saves
the graph; its peak RSS beyond the imports counts what was read, as pages of mapped files count too.
`--transposed` stores weights as torch does and adds a Transpose each. Before that, the same graph
in small and with numbers in it is run in ONNX Runtime, as it is and optimized for each target.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

BUDGET_S, BUDGET_MB = 60, 2048
TARGETS = ("cpu", "cuda", "tensorrt")
WEIGHTS = "model.onnx.data"
SIZES = {  # layers, width, width inside the FFN, heads, key heads, vocabulary
    "7B": (32, 4096, 11008, 32, 32, 32000),
    "tiny": (2, 64, 128, 4, 2, 1000),
}
EXPECTED = {"Attention": 1, "RMSNormalization": 2, "RotaryEmbedding": 2}  # a layer; one norm more


# The graph ---------------------------------------------------------------------------------------


class Writer:
    """Nodes in order; small constants by value; weights as places in a file that grows."""

    def __init__(self, folder: Path, random: bool) -> None:
        import numpy as np
        import onnx_ir as ir

        self.ir, self.np, self.tape = ir, np, ir.tape.Tape()
        self.folder, self.offset = folder, 0
        self.rng = np.random.default_rng(0) if random else None
        self.constants: dict[str, Any] = {}

    def __call__(self, op: str, *inputs: Any, **attributes: Any) -> Any:
        values = [self.constant(x) if isinstance(x, (list, int, float)) else x for x in inputs]
        return self.tape.op(op, values, attributes)

    def constant(self, x: Any, dtype: str = "") -> Any:
        """int64 for ints, float32 for floats, or of `dtype`; one initializer for each."""
        kind = dtype or ("float32" if isinstance(x, float) else "int64")
        key = f"const_{kind}_{x}"
        if key not in self.constants:
            self.constants[key] = self.tape.initializer(
                self.ir.tensor(self.np.array(x, kind), name=key)
            )
        return self.constants[key]

    def weight(self, name: str, *shape: int) -> Any:
        length = 2 * math.prod(shape)
        self.offset = (self.offset + 4095) // 4096 * 4096
        tensor = self.ir.ExternalTensor(
            WEIGHTS, self.offset, length, self.ir.DataType.FLOAT16,
            shape=self.ir.Shape(shape), name=name, base_dir=str(self.folder),
        )  # fmt: skip
        if self.rng is not None:
            scale = 1 if len(shape) == 1 else shape[0] ** -0.5
            numbers = self.rng.standard_normal(shape) * scale
            with (self.folder / WEIGHTS).open("r+b") as file:
                file.seek(self.offset)
                file.write(numbers.astype(self.np.float16).tobytes())
        self.offset += length
        return self.tape.initializer(tensor)


def build(folder: Path, size: str, transposed: bool) -> dict[str, int]:
    """Write model.onnx and its weights, a hole where they are not wanted at random."""
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass
    from onnxpress.optimizers import count_ops

    layers, width, inner, heads, kv_heads, vocabulary = SIZES[size]
    dim = width // heads
    (folder / WEIGHTS).touch()
    op = Writer(folder, random=size == "tiny")
    f16, f32 = ir.DataType.FLOAT16, ir.DataType.FLOAT

    def half(x: float) -> Any:
        return op.constant(x, "float16")

    def linear(x: Any, name: str, wide: int, high: int) -> Any:
        if not transposed:
            return op("MatMul", x, op.weight(name, wide, high))
        return op("MatMul", x, op("Transpose", op.weight(name, high, wide), perm=[1, 0]))

    def norm(x: Any, name: str) -> Any:
        x32 = op("Cast", x, to=f32)
        mean = op("ReduceMean", op("Pow", x32, 2.0), [-1], keepdims=1)
        scale = op("Reciprocal", op("Sqrt", op("Add", mean, 1e-6)))
        y = op("Cast", op("Mul", x32, scale), to=f16)
        return op("Mul", op.weight(name, width), y)

    def split_heads(x: Any, n: int) -> Any:
        shape = op("Concat", batch, length, [-1], [dim], axis=0)
        return op("Transpose", op("Reshape", x, shape, allowzero=1), perm=[0, 2, 1, 3])

    def rotate(x: Any) -> Any:
        near = op("Slice", x, [0], [dim // 2], [3], [1])
        far = op("Slice", x, [dim // 2], [2**63 - 1], [3], [1])
        turned = op("Concat", op("Neg", far), near, axis=-1)
        cos_, sin_ = (op("Unsqueeze", t, [1]) for t in (cos, sin))
        return op("Add", op("Mul", x, cos_), op("Mul", turned, sin_))

    def repeat(x: Any) -> Any:
        if heads == kv_heads:
            return x
        shape = op("Concat", batch, [kv_heads], [heads // kv_heads], length, [dim], axis=0)
        wide = op("Expand", op("Unsqueeze", x, [2]), shape)
        return op("Reshape", wide, op("Concat", batch, [heads], length, [dim], axis=0))

    def attention(x: Any, name: str) -> Any:
        q = split_heads(linear(x, f"{name}.q_proj.weight", width, width), heads)
        k = split_heads(linear(x, f"{name}.k_proj.weight", width, kv_heads * dim), kv_heads)
        v = split_heads(linear(x, f"{name}.v_proj.weight", width, kv_heads * dim), kv_heads)
        q, k, v = rotate(q), repeat(rotate(k)), repeat(v)
        # torch's scaled_dot_product_attention: K is transposed in 3 dimensions, and scaled as Q is.
        sizes = op("Shape", k, start=0)
        high, wide = op("Slice", sizes, [-2], [-1]), op("Slice", sizes, [-1], [2**63 - 1])
        flat = op("Reshape", k, op("Concat", [-1], high, wide, axis=0), allowzero=0)
        sizes = op("Concat", op("Slice", sizes, [-(2**63)], [-2]), wide, high, axis=0)
        k = op("Reshape", op("Transpose", flat, perm=[0, 2, 1]), sizes, allowzero=0)
        root = half(dim**-0.25)
        mask = op("Where", allowed, half(0.0), half(-65504.0))
        scores = op("Add", op("MatMul", op("Mul", q, root), op("Mul", k, root)), mask)
        weights = op("Softmax", scores, axis=-1)
        weights = op("Where", op("IsNaN", weights), half(0.0), weights)
        y = op("Transpose", op("MatMul", weights, v), perm=[0, 2, 1, 3])
        y = op("Reshape", y, op("Concat", batch, length, [-1], axis=0), allowzero=1)
        return linear(y, f"{name}.o_proj.weight", width, width)

    def feed_forward(x: Any, name: str) -> Any:
        gate = linear(x, f"{name}.gate_proj.weight", width, inner)
        gate = op("Mul", gate, op("Sigmoid", gate))
        y = op("Mul", gate, linear(x, f"{name}.up_proj.weight", width, inner))
        return linear(y, f"{name}.down_proj.weight", inner, width)

    text = ir.Shape(["batch", "length"])
    ids, seen = (ir.val(n, ir.DataType.INT64, text) for n in ("input_ids", "attention_mask"))
    batch = op("Shape", ids, start=0, end=1)
    length = op("Shape", ids, start=1, end=2)
    # A key that lies ahead, or is padding, is not allowed.
    place = op("Range", op.constant(0), op("Squeeze", length), op.constant(1))
    past = op("LessOrEqual", op("Unsqueeze", place, [0]), op("Unsqueeze", place, [1]))
    real = op("Unsqueeze", op("Cast", seen, to=ir.DataType.BOOL), [1, 2])
    allowed = op("And", op("Unsqueeze", past, [0, 1]), real)
    frequency = op.np.float32(10000.0) ** -(op.np.arange(0, dim, 2, dtype="float32") / dim)
    turns = op("Cast", op("Unsqueeze", place, [0, 2]), to=f32)
    turns = op("Mul", turns, op.constant(frequency[None, None].tolist(), "float32"))
    turns = op("Concat", turns, turns, axis=-1)
    cos, sin = (op("Cast", op(f, turns), to=f16) for f in ("Cos", "Sin"))

    x = op("Gather", op.weight("embed_tokens.weight", vocabulary, width), ids, axis=0)
    for i in range(layers):
        name = f"layers.{i}"
        y = attention(norm(x, f"{name}.input_layernorm.weight"), f"{name}.self_attn")
        x = op("Add", x, y)
        y = norm(x, f"{name}.post_attention_layernorm.weight")
        x = op("Add", x, feed_forward(y, f"{name}.mlp"))
    logits = linear(norm(x, "norm.weight"), "lm_head.weight", width, vocabulary)
    logits.name = "logits"

    graph = ir.Graph(
        [ids, seen], [logits], nodes=op.tape.nodes, initializers=op.tape.initializers,
        opset_imports={"": 18}, name="llama",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10, producer_name="scale.py")
    if size != "tiny":
        os.truncate(folder / WEIGHTS, op.offset)
    logits.dtype, logits.shape = f16, ir.Shape(["batch", "length", vocabulary])
    ShapeInferencePass()(model)  # exporters write the types too
    ir.save(model, folder / "model.onnx")
    on_disk = (folder / WEIGHTS).stat().st_blocks * 512
    return {
        "nodes": sum(count_ops(model).values()),
        "weights_bytes": op.offset,
        "weights_bytes_on_disk": on_disk,
        "graph_bytes": (folder / "model.onnx").stat().st_size,
    }


# What the fresh process does ---------------------------------------------------------------------


def peak_mb() -> float:
    """The high-water mark of this process: getrusage's also knows the parent's before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 1024


def optimize_here(folder: Path, target: str, out: Path) -> dict[str, Any]:
    import onnx_ir as ir

    # What passes import on their first call is no part of their memory.
    import onnxscript.optimizer
    import onnxscript.rewriter
    import onnxscript.version_converter  # noqa: F401
    from onnxpress.optimizers import TARGETS, count_ops, optimize

    before, at = peak_mb(), time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(stage: str) -> None:
        nonlocal at
        now = time.perf_counter()
        seconds[stage], at = round(now - at, 3), now

    model = ir.load(folder / "model.onnx")
    lap("load")
    nodes = sum(count_ops(model).values())
    peaks: list[float] = []
    steps = optimize(
        model, TARGETS[target], observers=[lambda *_: peaks.append(round(peak_mb() - before))]
    )
    lap("optimize")
    new = replace_weights(model, folder)
    out.mkdir(exist_ok=True)
    ir.save(model, out / "model.onnx")
    lap("save")
    peak = peak_mb() - before
    largest = max(model.graph.initializers.values(), key=lambda v: v.const_value.nbytes)
    largest.const_value.numpy().max()  # the control: had a weight been read, the peak would show it
    control = peak_mb() - before - peak
    return {
        "target": target,
        "seconds": {**seconds, "total": round(sum(seconds.values()), 3)},
        "peak_mb_beyond_imports": round(peak),
        "imports_mb": round(before),
        "control_mb_of_reading_one_weight": [
            round(control),
            round(largest.const_value.nbytes / 2**20),
        ],
        "within_budget": sum(seconds.values()) < BUDGET_S and peak < BUDGET_MB,
        "nodes": [nodes, sum(count_ops(model).values())],
        "fused": fused(model),
        "weights_not_as_in_the_file": new,
        "misses": [str(m) for s in steps for m in s.misses],
        "passes": [
            {
                "name": s.name,
                "seconds": round(s.seconds, 3),
                "peak_mb": peak,
                "hits": s.hits,
                "ops": s.ops,
                "notes": len(s.notes),
                "first_note": s.notes[0] if s.notes else "",
            }
            for s, peak in zip(steps, peaks, strict=True)
        ],
        "ops": count_ops(model),
    }


def fused(model: Any) -> dict[str, int]:
    from fusion import KINDS
    from onnxpress.optimizers import count_ops

    ops = count_ops(model)
    return {
        kind: sum(n for op, n in ops.items() if op.rsplit("::", 1)[-1] in KINDS[kind])
        for kind in EXPECTED
    }


def replace_weights(model: Any, folder: Path) -> dict[str, int]:
    """Stand-ins in the same file for large weights that passes made: only the graph is saved.

    Saving in full would compute and write them, one at a time.
    """
    import onnx_ir as ir

    made = [
        value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if not isinstance(value.const_value, ir.ExternalTensor) and value.const_value.nbytes > 1e6
    ]
    for value in made:
        old = value.const_value
        value.const_value = ir.ExternalTensor(
            WEIGHTS, 0, old.nbytes, old.dtype, shape=old.shape, name=value.name,
            base_dir=str(folder),
        )  # fmt: skip
    return {"count": len(made), "bytes": sum(v.const_value.nbytes for v in made)}


def small_difference(transposed: bool) -> dict[str, Any]:
    """The tiny graph, optimized for each target, against itself: the builder writes a Llama."""
    import numpy as np
    import onnx_ir as ir
    import onnxruntime as rt
    from onnxpress import artifact
    from onnxpress.optimizers import TARGETS as known
    from onnxpress.optimizers import optimize

    options = rt.SessionOptions()
    options.graph_optimization_level = rt.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    feeds = {
        "input_ids": np.random.default_rng(1).integers(0, 1000, (3, 13)),
        "attention_mask": (np.arange(13)[None] < np.array([[13], [8], [3]])).astype(np.int64),
    }
    real = feeds["attention_mask"].astype(bool)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, "tiny", transposed)

        def run(path: Path) -> Any:
            session = rt.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            return session.run(None, feeds)[0][real]

        want = run(folder / "model.onnx").astype(np.float32)
        result["largest_output"] = float(np.abs(want).max())
        for target in TARGETS:
            try:
                model = ir.load(folder / "model.onnx")
                optimize(model, known[target])
                out = folder / target
                out.mkdir()
                artifact.save_model(model, out)
                result[target] = float(np.abs(run(out / "model.onnx") - want).max())
            except Exception as e:  # no CPU kernel for what another target runs
                result[target] = f"{type(e).__name__}: {e}".splitlines()[0][:200]
    return result


# The one that starts them ------------------------------------------------------------------------


def main() -> None:
    if sys.argv[1:2] == ["--in"]:
        folder, target = sys.argv[2:]
        out = Path(folder) / target
        print(json.dumps(optimize_here(Path(folder), target, out)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--transposed", action="store_true")
    parser.add_argument("--name", default="scale", help="of the file in benchmarks/results")
    args = parser.parse_args()

    result: dict[str, Any] = {
        "machine": common.machine(),
        "versions": common.versions("onnx", "onnx-ir", "onnxscript", "numpy"),
        "budget": {"seconds": BUDGET_S, "mb": BUDGET_MB},
        "transposed": args.transposed,
        "tiny_max_abs": small_difference(args.transposed),
    }
    layers = SIZES["7B"][0]
    result["expected"] = {k: n * layers + (k == "RMSNormalization") for k, n in EXPECTED.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < 1 << 30:
            sys.exit(f"{folder} has less than 1 GB free")
        start = time.perf_counter()
        result["graph"] = build(folder, "7B", args.transposed)
        print(f"built in {time.perf_counter() - start:.1f} s: {result['graph']}", flush=True)
        if result["graph"]["weights_bytes_on_disk"] > 1 << 28:
            sys.exit(f"{folder} does not keep sparse files: set TMPDIR to a place that does")
        rows = []
        for target in args.targets:
            done = subprocess.run(
                [sys.executable, __file__, "--in", name, target], capture_output=True, text=True
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines()
                rows.append({"target": target, "error": lines[-1] if lines else done.returncode})
                print(f"{target}: {rows[-1]['error']}", flush=True)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            print(f"\n### {target}: {row['seconds']}, {row['peak_mb_beyond_imports']} MB beyond "
                  f"{row['imports_mb']}, nodes {row['nodes']}, fused {row['fused']} of "
                  f"{result['expected']}, {len(row['misses'])} misses\n")  # fmt: skip
            print("| pass | s | peak MB | hits | notes |\n|---|---|---|---|---|")
            for p in row["passes"]:
                cells = (p["name"], p["seconds"], p["peak_mb"], p["hits"], p["notes"])
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
        result["rows"] = rows
    common.finish(args.name, result)


if __name__ == "__main__":
    main()
