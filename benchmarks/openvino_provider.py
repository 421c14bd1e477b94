"""MiniLM on the CPU provider, on OpenVINO's provider, and in OpenVINO itself.

    make .venv/.openvino                    # the wheel onnxruntime-openvino, in a folder of its own
    pip install openvino                    # OpenVINO itself, here or in another environment
    python benchmarks/openvino_provider.py
    python benchmarks/openvino_provider.py --native /path/to/python --cells "1x16 8x128" --cache DIR

The artifacts are pressed here: fp32 and int8, for cpu and for openvino. A process has one module
onnxruntime, so each wheel has a process of its own, which is told over a pipe what to run. Rounds
go over all contestants in a new order each, with a pause before every turn: thread pools spin for
a while. Speed is the median of the rounds, 2 threads each. `first` is the first run of a shape:
OpenVINO prepares kernels for each.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np

THREADS = 2
CELLS = "1x16 8x16 1x128 8x128 1x512"
HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
PRESSED = (("cpu", "fp32"), ("cpu", "int8"), ("openvino", "fp32"), ("openvino", "int8"))
CONTESTANTS = {
    "cpu": ("fp32", "int8"),
    "openvino": ("fp32", "bf16", "int8"),
    "native": ("fp32", "bf16", "int8"),
}
Run = Callable[[dict[str, np.ndarray]], object]


# In a worker ----------------------------------------------------------------------------------


def opened(kind: str, precision: str, cache: Path) -> Run:
    """What runs a contestant; bf16 is the graph of fp32 with a hint."""
    graph = "int8" if precision == "int8" else "fp32"
    folder = cache / f"{'cpu' if kind == 'cpu' else 'openvino'}-{graph}"
    if kind == "native":
        import openvino as ov

        settings = {
            "INFERENCE_NUM_THREADS": THREADS,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[precision],
        }
        model = ov.Core().compile_model(folder / "model.onnx", "CPU", settings)
        request = model.create_infer_request()
        return lambda feeds: request.infer(feeds, share_inputs=True, share_outputs=True)
    from onnxpress.runtime import Session, openvino

    given = {}
    if kind == "openvino":
        given = {"openvino": {**openvino.options(precision), "num_of_threads": THREADS}}
    session = Session(folder, provider=kind, threads=THREADS, provider_options=given or None)
    assert session.provider == kind  # every node
    return session.run


def work(kind: str, cache: Path) -> None:
    """Answers lines of JSON with lines of JSON; what libraries print goes elsewhere."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    runs: dict[str, Run] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["precision"]
        try:
            if name not in runs:
                runs[name] = opened(kind, name, cache)
            start = time.perf_counter()
            for _ in range(request["calls"]):
                runs[name](feeds(request["cell"]))
            found = {"ms": (time.perf_counter() - start) / max(1, request["calls"]) * 1e3}
        except Exception as e:  # a contestant that fails becomes a row that says so
            found = {"error": f"{type(e).__name__}: {e}"[-300:]}
        answers.write(json.dumps(found) + "\n")


def feeds(cell: str, made: dict[str, dict[str, np.ndarray]] = {}) -> dict[str, np.ndarray]:  # noqa: B006
    """Random words without padding, made once for each cell."""
    if cell not in made:
        batch, length = map(int, cell.split("x"))
        ids = np.random.default_rng(0).integers(1000, 30000, (batch, length))
        names = ("input_ids", "attention_mask", "token_type_ids")
        given = (ids, np.ones_like(ids), np.zeros_like(ids))
        made[cell] = dict(zip(names, given, strict=True))
    return made[cell]


# The one that starts them ---------------------------------------------------------------------


class Worker:
    """A process with one wheel, which runs what it is told."""

    def __init__(self, kind: str, python: str, cache: Path, wheel: Path | None) -> None:
        path = [str(wheel)] if wheel else []
        path += filter(None, [os.environ.get("PYTHONPATH")])
        self.process = subprocess.Popen(
            [python, __file__, "--work", kind, str(cache)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path),
                 "OMP_NUM_THREADS": str(THREADS)},
        )  # fmt: skip

    def ask(self, precision: str, cell: str, calls: int) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        request = {"precision": precision, "cell": cell, "calls": calls}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"error": "the process is gone"}


def press(cache: Path) -> None:
    """The artifacts that are not there yet."""
    import onnxpress

    for target, precision in PRESSED:
        out = cache / f"{target}-{precision}"
        if not (out / "manifest.json").exists():
            print(f"press for {target} in {precision}", flush=True)
            onnxpress.press(
                str(common.minilm()), out, target=target, precision=precision, measure=False
            )


def race(workers: dict[str, Worker], cells: list[str], rounds: int) -> dict[str, Any]:
    """Medians by cell and contestant, first runs, and what failed."""
    names = [(kind, p) for kind, worker in workers.items() if worker for p in CONTESTANTS[kind]]
    result: dict[str, Any] = {"ms": {}, "first": {}, "failed": {}}
    shuffle = random.Random(0).shuffle
    for cell in cells:
        calls, times, first = {}, {}, {}
        for kind, precision in names:
            label = f"{kind} {precision}"
            if label in result["failed"]:
                continue
            workers[kind].ask(precision, cell, 0)  # opens it
            begun = workers[kind].ask(precision, cell, 1)
            took = workers[kind].ask(precision, cell, 2)
            if why := begun.get("error") or took.get("error"):
                result["failed"][label] = why
                continue
            first[label] = round(begun["ms"], 2)
            calls[kind, precision] = max(1, int(100 / took["ms"]))
            times[kind, precision] = []
        order = list(times)
        for _ in range(rounds):
            shuffle(order)
            for kind, precision in order:
                time.sleep(0.1)
                workers[kind].ask(precision, cell, 1)  # its threads wake up
                answer = workers[kind].ask(precision, cell, calls[kind, precision])
                times[kind, precision].append(answer["ms"])
        result["ms"][cell] = {f"{k} {p}": round(median(t), 3) for (k, p), t in times.items()}
        result["first"][cell] = first
    return result


def table(result: dict[str, Any]) -> str:
    cells = list(result["ms"])
    labels = dict.fromkeys(label for cell in cells for label in result["ms"][cell])
    lines = [["ms", *cells], ["---"] * (len(cells) + 1)]
    lines += [[label, *(str(result["ms"][c].get(label, "")) for c in cells)] for label in labels]
    lines += [[label, why] for label, why in result["failed"].items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", type=Path, default=Path(sys.prefix) / "openvino")
    parser.add_argument("--native", help="a Python with the package openvino; this one by default")
    parser.add_argument("--cells", default=CELLS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cache", type=Path, help="keep what is pressed here, for the next run")
    parser.add_argument("--name", default="openvino", help="of the file in benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = (args.cache or Path(folder)).resolve()
        cache.mkdir(parents=True, exist_ok=True)
        press(cache)
        workers = {"cpu": Worker("cpu", sys.executable, cache, None)}
        absent = {}
        if (args.wheel / "onnxruntime").is_dir():
            workers["openvino"] = Worker("openvino", sys.executable, cache, args.wheel)
        else:
            absent["openvino"] = f"no wheel in {args.wheel.name}: make .venv/.openvino"
        if args.native or importlib.util.find_spec("openvino"):
            workers["native"] = Worker("native", args.native or sys.executable, cache, None)
        else:
            absent["native"] = "pip install openvino"
        try:
            result = race(workers, args.cells.split(), args.rounds)
        finally:
            for worker in workers.values():
                worker.process.kill()
    result = {
        "machine": common.machine(),
        "versions": common.versions("onnxruntime", "numpy"),
        "threads": THREADS,
        "rounds": args.rounds,
        "absent": absent,
        **result,
    }
    print(table(result))
    common.finish(args.name, result)


if __name__ == "__main__":
    main()
