"""What optimizers make of ten Transformers: layers fused, time to optimize, max difference, speed.

    python benchmarks/fusion.py                                  # ten models, real sizes
    python benchmarks/fusion.py --size tiny --rounds 1 --name fusion-tiny

Every model is exported once for each `--how` and given to every contestant. Each step (export,
optimize, check, time) is a process of its own: a crash or a hang becomes a row. A graph is checked
against the exported one under ORT_DISABLE_ALL, with padding, at shapes that were not traced and at
the one that was; where that one does not run, against PyTorch, and `compared_to` says so. All
contestants of a model are then timed against each other in one process, 2 threads each.
Rows are written after each model. onnxslim is taken from .cache/peers, if it is not installed:

    pip install --no-deps --target .cache/peers onnxslim colorama

Columns: `fused` counts what the tool's file holds, but for `as-exported` what ONNX Runtime made of
it in memory (ORT_ENABLE_ALL is that row's optimizer); optimize s is reading the file and
optimizing, without imports and saving; x is how many times faster than `as-exported`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

THREADS = 2
PEERS = common.CACHE / "peers"
CHECKS = [(3, 13), (1, 1), (2, 11)]  # batch x length; corpus.py traces the last
REFERENCE = "reference.npz"

# Layers, heads, width: real and tiny. Attentions, norms, GELUs and rotaries follow from the family.
BERT, NN = "bert", "nn"
SIZES: dict[str, tuple[str, tuple[int, int, int], tuple[int, int, int]]] = {
    "minilm": (BERT, (6, 12, 384), (2, 4, 64)),
    "bert-base": (BERT, (12, 12, 768), (2, 4, 64)),
    "minilm-eager": (BERT, (6, 12, 384), (2, 4, 64)),
    "bert-base-eager": (BERT, (12, 12, 768), (2, 4, 64)),
    "nn-encoder": (NN, (6, 4, 512), (2, 4, 32)),
    "nn-transformer": ("seq2seq", (6, 4, 512), (2, 4, 32)),
    "hand": ("seq2seq", (6, 8, 512), (2, 4, 32)),
    "vit": ("vit", (12, 12, 768), (2, 4, 64)),
    "gpt2": ("gpt2", (12, 12, 768), (2, 4, 64)),
    "t5": ("t5", (6, 8, 512), (2, 4, 64)),
    "llama": ("llama", (30, 9, 576), (2, 4, 64)),
}
TEN = [name for name in SIZES if name != "bert-base-eager"]  # minilm-eager in twice the size
# In each layer, and once more at the end.
EXPECTED: dict[str, dict[str, tuple[int, int]]] = {
    BERT: {"Attention": (1, 0), "LayerNormalization": (2, 1), "Gelu": (1, 0)},
    NN: {"Attention": (1, 0), "LayerNormalization": (2, 0), "Gelu": (1, 0)},
    "seq2seq": {"Attention": (3, 0), "LayerNormalization": (5, 2)},
    "vit": {"Attention": (1, 0), "LayerNormalization": (2, 1), "Gelu": (1, 0)},
    "gpt2": {"Attention": (1, 0), "LayerNormalization": (2, 1), "Gelu": (1, 0)},
    "t5": {"Attention": (1, 0), "RMSNormalization": (2, 1), "Gelu": (1, 0)},
    "llama": {"Attention": (1, 0), "RMSNormalization": (2, 1), "RotaryEmbedding": (2, 0)},
}
# Op types by kind; ONNX Runtime keeps some of its ops in ai.onnx, so the domain says nothing.
KINDS = {
    "Attention": {"Attention", "MultiHeadAttention", "GroupQueryAttention"},
    "LayerNormalization": {
        "LayerNormalization", "SkipLayerNormalization", "EmbedLayerNormalization",
    },
    "RMSNormalization": {
        "RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization",
    },
    "Gelu": {"Gelu", "BiasGelu", "FastGelu", "QuickGelu"},
    "RotaryEmbedding": {"RotaryEmbedding"},
}  # fmt: skip
# model_type of onnxruntime.transformers; its own Llama script says gpt2 too.
MODEL_TYPE = {BERT: "bert", NN: "bert", "seq2seq": "bert", "llama": "gpt2"}
CELLS = {
    "minilm": "1x16 1x128 8x128 1x512 8x512",
    "bert-base": "1x16 1x128 8x128 1x512",
    "vit": "1x1 8x1",
}  # batch x length; a picture has no length
USUAL_CELLS = "1x16 1x128 8x128"


# The contestants: generators that import what they need, yield, optimize what lies in `source`,
# and yield the function that saves it. The time between the two yields is measured. ---------------


def onnxpress_cpu(source: str, **_: Any) -> Any:
    import onnx_ir as ir
    from onnxpress import artifact
    from onnxpress.optimizers import TARGETS, optimize

    yield
    model = ir.load(source)
    optimize(model, TARGETS["cpu"])
    yield lambda path: artifact.save_model(model, Path(path).parent)


def ort_transformers(
    source: str, family: str, heads: int, width: int, level: int | None = 0, **_: Any
) -> Any:
    from onnxruntime.transformers.optimizer import optimize_model

    yield
    kind = MODEL_TYPE.get(family, family)
    model = optimize_model(
        source, kind, num_heads=heads, hidden_size=width, opt_level=level, only_onnxruntime=False
    )
    yield lambda path: model.save_model_to_file(path, use_external_data_format=True)


def ort_transformers_default(source: str, **facts: Any) -> Any:
    return ort_transformers(source, level=None, **facts)


def optimize_for_ort(source: str, **_: Any) -> Any:
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort as optimize

    yield
    model, _counts = optimize(ir.load(source))
    yield lambda path: ir.save(model, path, external_data="model.onnx.data")


def onnxsim(source: str, **_: Any) -> Any:
    import onnx
    import onnxsim as tool

    yield
    model, ok = tool.simplify(onnx.load(source))
    if not ok:
        raise RuntimeError("onnxsim says that its result differs from the original")
    yield lambda path: _save_proto(model, path)


def onnxslim(source: str, **_: Any) -> Any:
    try:
        import onnxslim as tool
    except ImportError as e:
        raise RuntimeError(
            f"not installed ({e}): pip install --no-deps --target .cache/peers onnxslim colorama"
        ) from e

    yield
    model = tool.slim(source)
    yield lambda path: _save_proto(model, path)


def transformers_exporters(source: str, name: str, size: str, **_: Any) -> Any:
    import onnx_ir as ir
    import torch
    from corpus import Heads, module
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    model, feeds, names, dims = module(name, size)
    assert isinstance(model, Heads)
    shapes = {
        n: dict.fromkeys(d, torch.export.Dim.DYNAMIC) for n, d in zip(names, dims, strict=True)
    }
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions="cpu")
    inner, inputs = model.model, dict(zip(names, feeds, strict=True))
    yield
    exported = OnnxExporter().export(inner, inputs, config=config)
    yield lambda path: ir.save(exported.program, path, external_data="model.onnx.data")


def _save_proto(model: Any, path: str) -> None:
    import onnx

    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")


BASE, OURS, EXPORTS = "as-exported", "onnxpress", "transformers.exporters"
CONTESTANTS = {
    BASE: None,
    OURS: onnxpress_cpu,
    "onnxruntime.transformers": ort_transformers,
    "onnxruntime.transformers default level": ort_transformers_default,
    "optimize_for_ort": optimize_for_ort,
    "onnxsim": onnxsim,
    "onnxslim": onnxslim,
    EXPORTS: transformers_exporters,
}
NOTES = {EXPORTS: "exports by itself, at its own opset: the time is that of the export too"}
# Its default level differs little from level 0 and costs a tenth of the time: on request.
USUAL = [c for c in CONTESTANTS if c != "onnxruntime.transformers default level"]


# What the processes do ---------------------------------------------------------------------------


def work_export(name: str, how: str, size: str, path: str) -> dict[str, Any]:
    """The file, and beside it what it gives on the feeds of CHECKS: what others are compared to.

    Where the exported graph itself does not run (a shape that the exporter froze, a mask that the
    kernel does not broadcast), PyTorch says what is right.
    """
    import corpus
    import numpy as np
    import onnxruntime as rt
    import torch

    corpus.export(name, how, Path(path), size)
    model, example, names, _ = corpus.module(name, size)
    inputs = [
        (n, str(x.numpy().dtype), tuple(x.shape)) for n, x in zip(names, example, strict=True)
    ]
    options = session_options()
    options.graph_optimization_level = rt.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = rt.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs, compared_to = {}, {}
    for batch, length in CHECKS:
        cell = f"{batch}x{length}"
        feeds, _ = make_feeds(inputs, batch, length, padded=True)
        try:
            outputs[cell], compared_to[cell] = run(session, feeds), "the graph as exported"
        except Exception:
            with torch.no_grad():
                y = model(*(torch.from_numpy(feeds[n]) for n in names))
            outputs[cell], compared_to[cell] = y.numpy(), "PyTorch"
    np.savez(Path(path).with_name(REFERENCE), **outputs)
    return {"compared_to": compared_to, "inputs": inputs}


def work_optimize(contestant: str, out: str, **facts: Any) -> dict[str, Any]:
    if PEERS.is_dir():
        sys.path.append(str(PEERS))
    steps = CONTESTANTS[contestant](**facts)
    next(steps)  # imports, and for an exporter the model
    start = time.perf_counter()
    save = next(steps)
    read_and_optimized = time.perf_counter()
    save(out)
    saved = time.perf_counter()
    return {
        "seconds": round(read_and_optimized - start, 3),
        "save_seconds": round(saved - read_and_optimized, 3),
    }


def work_check(
    contestant: str, path: str, reference: str, inputs: list[list[Any]]
) -> dict[str, Any]:
    """Counts, and differences to the reference; text where the graph does not run."""
    import numpy as np

    result = count(path)
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(contestant, path, save_as=f"{folder}/opened.onnx")
        result["session"] = count(f"{folder}/opened.onnx")
    result["max_abs"], result["max_abs_with_padding"] = {}, {}
    references = np.load(reference)
    for batch, length in CHECKS:
        feeds, valid = make_feeds(inputs, batch, length, padded=True)
        cell = f"{batch}x{length}"
        want = references[cell]
        try:
            have = run(session, feeds)
        except Exception as e:
            result["max_abs"][cell] = f"does not run: {first_line(e)}"
            continue
        if have.shape != want.shape:
            result["max_abs"][cell] = f"wrong: the output is {have.shape}, not {want.shape}"
            continue
        differ = np.where(np.isnan(have) & np.isnan(want), 0, np.abs(have - want))
        result["max_abs_with_padding"][cell] = number(differ.max())
        result["max_abs"][cell] = number(differ.max() if valid is None else differ[valid].max())
    return result


def work_time(
    paths: dict[str, str], cells: list[str], rounds: int, limit: float, inputs: list[list[Any]]
) -> dict[str, Any]:
    """Medians by cell and contestant; a contestant that fails in a cell is left out of it."""
    from onnxpress.runtime import time_runs

    sessions = {contestant: open_session(contestant, path) for contestant, path in paths.items()}
    ms: dict[str, dict[str, float]] = {}
    failed: dict[str, dict[str, str]] = {cell: {} for cell in cells}
    for cell in cells:
        batch, length = map(int, cell.split("x"))
        feeds, _ = make_feeds(inputs, batch, length, padded=False)
        fns = {}
        for contestant, session in sessions.items():
            try:
                run(session, feeds)
                start = time.perf_counter()
                run(session, feeds)
                took = time.perf_counter() - start
            except Exception as e:
                failed[cell][contestant] = f"does not run: {first_line(e)}"
                continue
            if took > limit:
                failed[cell][contestant] = f"one run takes {took:.1f} s"
            else:
                fns[contestant] = lambda s=session, f=feeds: run(s, f)
        timed = time_runs(fns, rounds=rounds)
        ms[cell] = {c: round(t.median, 3) for c, t in timed.items()}
    return {"ms": ms, "failed": failed}


def session_options() -> Any:
    import onnxruntime as rt

    options = rt.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 4
    return options


def open_session(contestant: str, path: str, save_as: str | None = None) -> Any:
    """As users open it: ours by onnxpress.runtime.Session, others with ONNX Runtime's defaults."""
    import onnxruntime as rt
    from onnxpress.optimizers import TARGETS
    from onnxpress.runtime import Session

    entry = "session.optimized_model_external_initializers_file_name"
    if contestant == OURS:
        # As press records it in the manifest of an artifact for this target.
        off = TARGETS["cpu"].disabled_optimizers
        session = Session(Path(path).parent, threads=THREADS, disabled_optimizers=off)
        if save_as:
            session._open({entry: "opened.data"}, save_as=Path(save_as))
        return session
    options = session_options()
    if save_as:
        options.optimized_model_filepath = save_as
        options.add_session_config_entry(entry, "opened.data")
    return rt.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: Any, feeds: dict[str, Any]) -> Any:
    """The first output; transformers.exporters keeps other names and may drop an input."""
    if hasattr(session, "get_inputs"):
        return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0]
    return next(iter(session.run({i.name: feeds[i.name] for i in session.inputs}).values()))


def make_feeds(
    inputs: list[Any], batch: int, length: int, *, padded: bool
) -> tuple[dict[str, Any], Any]:
    """Feeds for the inputs of corpus.py, and which rows of the output stand for real tokens.

    `inputs` holds name, dtype and the shape of the example of each.
    """
    import numpy as np

    rng = np.random.default_rng(batch * 1000 + length)
    feeds: dict[str, Any] = {}
    valid = None
    for name, dtype, example in inputs:
        # Where padding is asked for, source and target differ in length too.
        own = max(1, length - 4) if padded and name == "target" else length
        lengths = np.maximum(1, own - 5 * np.arange(batch)) if padded else np.full(batch, own)
        real = np.arange(own)[None] < lengths[:, None]
        shape = (batch, *example[1:]) if name == "pixel_values" else (batch, own, *example[2:])
        if name == "attention_mask":
            feeds[name], valid = real.astype(dtype), real
        elif name == "padding":
            feeds[name], valid = ~real, real
        elif name == "token_type_ids":
            feeds[name] = np.broadcast_to(np.arange(own) % 2, shape).astype(dtype)
        elif dtype == "int64":
            feeds[name] = rng.integers(1, 900, shape)
            if name in ("source", "target"):  # 0 is their padding
                feeds[name] *= real
                valid = real  # the target's, which comes last
        else:
            feeds[name] = rng.standard_normal(shape, np.float32)
    return feeds, valid


def count(path: str) -> dict[str, Any]:
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass
    from onnxpress.optimizers import count_ops

    model = ir.load(path)
    InlinePass()(model)
    ops = count_ops(model)
    fused = {
        kind: sum(n for op, n in ops.items() if op.rsplit("::", 1)[-1] in types)
        for kind, types in KINDS.items()
    }
    for node in model.graph:
        if node.op_type == "GroupQueryAttention" and node.attributes.get_int("do_rotary", 0):
            fused["RotaryEmbedding"] += 2  # of Q and of K
    # Old exporters write constants as nodes; ONNX Runtime has none of them left after loading.
    return {"nodes": sum(n for op, n in ops.items() if op != "Constant"), "fused": fused}


def number(x: Any) -> float | str:
    import math

    return float(f"{float(x):.3g}") if math.isfinite(x) else str(float(x))  # JSON has no nan


def first_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {e}".strip().splitlines()[0][:300]


# The one that starts them ------------------------------------------------------------------------


def process(task: str, timeout: float, **request: Any) -> dict[str, Any]:
    """What `work_TASK(**request)` returns, run in a process of its own; or {"error": why not}."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [sys.executable, __file__, "--work", task, json.dumps(request), str(answer)]
        with log.open("w") as sink:
            child = subprocess.Popen(
                command, stdout=sink, stderr=sink, cwd=folder, start_new_session=True
            )
            try:
                code = child.wait(timeout)
            except subprocess.TimeoutExpired:
                return {"error": f"{task}: stopped after {timeout:.0f} s"}
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        if answer.exists():
            return json.loads(answer.read_text())
        last = log.read_text().strip().splitlines()[-1:] or [""]
        how = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return {"error": f"{task}: {how}: {last[0][:300]}"}


def work(task: str, request: str, answer: str) -> None:
    """In the process: the answer, or the error that it ended with."""
    try:
        result = globals()[f"work_{task}"](**json.loads(request))
    except Exception as e:
        result = {"error": f"{task}: {first_line(e)}"}
    Path(answer).write_text(json.dumps(result))


def rows_of(
    name: str, how: str, args: argparse.Namespace, folder: Path, done: set[str]
) -> list[dict[str, Any]]:
    """Every contestant on one exported model."""
    family, *sizes = SIZES[name]
    layers, heads, width = sizes[args.size == "tiny"]
    expected = {kind: n * layers + more for kind, (n, more) in EXPECTED[family].items()}
    source = folder / "source.onnx"
    exported = process("export", args.timeout, name=name, how=how, size=args.size, path=str(source))
    rows, paths = [], {}
    for contestant in args.contestants:
        row: dict[str, Any] = {"model": name, "exporter": how, "contestant": contestant}
        rows.append({**row, "expected": expected})
        row = rows[-1]
        path = (
            source if contestant == BASE else folder / contestant.replace(" ", "-") / "model.onnx"
        )
        path.parent.mkdir(exist_ok=True)
        if contestant == EXPORTS:
            row["note"] = NOTES[contestant]
            if name in ("nn-encoder", "nn-transformer", "hand"):
                row["error"] = "not a model of transformers"
                continue
            if name in done:  # it would write the same again
                row["error"] = "takes no exported graph: see the first exporter"
                continue
            done.add(name)
        elif "error" in exported:
            row["error"] = exported["error"]
            continue
        if contestant != BASE:
            row |= process(
                "optimize", args.timeout, contestant=contestant, out=str(path), source=str(source),
                name=name, size=args.size, family=family, heads=heads, width=width,
            )  # fmt: skip
        if "error" not in row and "error" not in exported:
            row["compared_to"] = exported["compared_to"]
            row |= process(
                "check", args.timeout, contestant=contestant, path=str(path),
                reference=str(source.with_name(REFERENCE)), inputs=exported["inputs"],
            )  # fmt: skip
            if "error" not in row:
                paths[contestant] = str(path)
    if args.no_time or not paths:
        return rows
    cells = (args.cells or CELLS.get(name, USUAL_CELLS)).split()
    timed = process(
        "time", 3600, paths=paths, cells=cells, rounds=args.rounds, limit=args.limit,
        inputs=exported["inputs"],
    )  # fmt: skip
    for row in rows:
        contestant = row["contestant"]
        if contestant not in paths:
            continue
        if "error" in timed:  # one of them took the process down
            row["not_timed"] = dict.fromkeys(cells, timed["error"])
            continue
        row["ms"] = {cell: ms[contestant] for cell, ms in timed["ms"].items() if contestant in ms}
        row["times_faster"] = {
            cell: round(timed["ms"][cell][BASE] / ms, 3)
            for cell, ms in row["ms"].items()
            if BASE in timed["ms"][cell]
        }
        row["not_timed"] = {
            cell: why[contestant] for cell, why in timed["failed"].items() if contestant in why
        }
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One model's rows as markdown."""
    kinds = list(rows[0]["expected"])
    cells = list(
        dict.fromkeys(c for row in rows for key in ("ms", "not_timed") for c in row.get(key, {}))
    )
    head = ["contestant", "nodes", *kinds, "optimize s", "max diff", *(f"{c} ms" for c in cells)]
    lines = [f"\n### {rows[0]['model']}, {rows[0]['exporter']}\n", head, ["---"] * len(head)]
    for row in rows:
        shown = row.get("session", {}) if row["contestant"] == BASE else row
        line = [row["contestant"], str(shown.get("nodes", ""))]
        if "fused" in shown:
            line += [f"{shown['fused'][k]} of {row['expected'][k]}" for k in kinds]
        else:
            line += [""] * len(kinds)
        line += [str(row.get("seconds", "")), row.get("error", "")[:120] or differences(row)]
        for cell in cells:
            if cell in row.get("ms", {}):
                faster = row["times_faster"].get(cell)
                line.append(f"{row['ms'][cell]:.2f}" + (f" ({faster:.2f}x)" if faster else ""))
            else:
                line.append(row.get("not_timed", {}).get(cell, "").split(":")[0])
        lines.append(line)
    return "\n".join(x if isinstance(x, str) else f"| {' | '.join(x)} |" for x in lines)


def differences(row: dict[str, Any]) -> str:
    """The largest over the checked shapes, and the shapes at which there is none."""
    numbers = [v for v in row.get("max_abs", {}).values() if isinstance(v, float)]
    texts = [
        f"{v.split(':')[0]} at {cell}"
        for cell, v in row.get("max_abs", {}).items()
        if isinstance(v, str)
    ]
    to_torch = [
        cell
        for cell, other in row.get("compared_to", {}).items()
        if other == "PyTorch" and isinstance(row["max_abs"][cell], float)
    ]
    texts += [f"to PyTorch at {', '.join(to_torch)}"] if to_torch else []
    return "; ".join([*(str(n) for n in [max(numbers, default=None)] if n is not None), *texts])


def behind(rows: list[dict[str, Any]]) -> list[str]:
    """Where a peer fuses more layers than we do, or is ahead in time by more than a tie."""
    said = []
    ours = {(r["model"], r["exporter"]): r for r in rows if r["contestant"] == OURS}
    for row in rows:
        mine = ours.get((row["model"], row["exporter"]))
        where = f"{row['model']} {row['exporter']}: {row['contestant']}"
        if mine is None or mine is row:
            continue
        for kind in row["expected"] if "error" not in row else ():
            shown = row["session"] if row["contestant"] == BASE else row
            have = min(shown["fused"][kind], row["expected"][kind])
            own = mine.get("fused", {}).get(kind, 0)
            if have > own:
                said.append(f"{where} has {have} {kind}, we have {own}")
        for cell, ms in row.get("ms", {}).items():
            own = mine.get("ms", {}).get(cell)
            if own is None or own > ms * 1.05:
                said.append(f"{where} takes {ms} ms at {cell}, we take {own}")
    return said


def keep(name: str, result: dict[str, Any]) -> None:
    """What there is so far: an interrupted run keeps its rows."""
    common.RESULTS.mkdir(exist_ok=True)
    (common.RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
        return
    # A SIGTERM unwinds as Ctrl-C does: the child and the temporary files go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=TEN)
    parser.add_argument("--how", nargs="+", choices=["dynamo18", "dynamo23", "script14"],
                        default=["dynamo18"])  # fmt: skip
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=USUAL)
    parser.add_argument("--size", choices=["real", "tiny"], default="real")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cells", help='such as "1x16 8x512"; by default it depends on the model')
    parser.add_argument("--limit", type=float, default=4.0, help="skip a cell whose run takes more")
    parser.add_argument("--timeout", type=float, default=600.0, help="of one step, in seconds")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--name", default="fusion", help="of the file in benchmarks/results")
    args = parser.parse_args()

    result: dict[str, Any] = {
        "machine": common.machine(),
        "versions": {
            **common.versions(
                "onnx", "onnx-ir", "onnxruntime", "onnxscript", "onnxsim", "torch", "transformers"
            ),
            **{d.name: d.version for d in importlib.metadata.distributions(path=[str(PEERS)])},
        },
        "size": args.size,
        "threads": THREADS,
        "rounds": args.rounds,
        "rows": [],
    }
    done: set[str] = set()
    for name in args.models:
        for how in args.how:
            with tempfile.TemporaryDirectory() as folder:
                rows = rows_of(name, how, args, Path(folder), done)
            print(table(rows), flush=True)
            result["rows"] += rows
            result["behind"] = behind(result["rows"])
            keep(args.name, result)
    print("\nWhere we are behind, by more than 5%:")
    print("\n".join(f"- {line}" for line in result["behind"]) or "- nowhere")
    common.finish(args.name, result)


if __name__ == "__main__":
    main()
