"""int8 beside its peers: how far it drifts, how fast it runs, what it weighs; and pruning.

    pip install openvino nncf ctranslate2      # the peers, in a virtual environment of their own
    python benchmarks/int8.py
    python benchmarks/int8.py --only speed --models minilm --cells "1x16 8x128" --cache DIR

Two models: all-MiniLM-L6-v2, and the shape of BERT-base with random weights, for speed alone.
Drift is the cosine of embeddings (mean over tokens, normalized) to PyTorch in float32, on texts of
Python's standard library, which no one calibrates on. Speed is the median of rounds in which all
contestants take turns, 2 threads each. Every step (make, embed, time, open) is a process of its
own: a contestant that crashes or is not installed becomes a row that says so. `--cache DIR` keeps
what was made for the next run. What is of other versions, or of other code of onnxpress, is made
again then, unless `--keep`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import common
import int8_steps as steps
import numpy as np
import peers
from int8_steps import BERT, CONTESTANTS, FLOAT, INT8, MINILM, PRUNED, UNSMOOTHED
from peers import EXACT

CELLS = {MINILM: "1x16 8x16 1x128 8x128 1x512", BERT: "1x16 1x128 8x128"}  # batch x length
PRUNED_CELLS = "1x128 8x128"
TABLES = ("drift", "speed", "session", "pruning")
PACKAGES = (
    "onnxruntime", "openvino", "nncf", "ctranslate2", "neural-compressor", "torch", "transformers",
    "onnx", "onnx-ir", "numpy",
)  # fmt: skip
SHARED = {
    "OMP_NUM_THREADS": str(peers.THREADS),
    "TOKENIZERS_PARALLELISM": "false",
}

# The one that starts them ---------------------------------------------------------------------


def process(task: str, timeout: float = 600.0, **request: Any) -> dict[str, Any]:
    """What `work_TASK(**request)` returns, run in a process of its own; or {"error": why not}."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [sys.executable, __file__, "--work", task, json.dumps(request), str(answer)]
        with log.open("w") as sink:
            child = subprocess.Popen(
                command, stdout=sink, stderr=sink, cwd=folder, start_new_session=True,
                env={**os.environ, **SHARED},
            )  # fmt: skip
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


class Bench:
    """One run: what was made so far, and what became of whom."""

    def __init__(self, args: argparse.Namespace, cache: Path) -> None:
        self.args, self.cache = args, cache
        self.facts: dict[tuple[str, str], dict[str, Any]] = {}

    def make(self, model: str, contestant: str) -> dict[str, Any]:
        """Make what a contestant runs, where it is not there yet; what there is to say of it."""
        key = model, contestant
        if key not in self.facts:
            self.facts[key] = self._made(model, contestant)
            if "error" in self.facts[key]:
                print(f"{model} {contestant}: {self.facts[key]['error']}", flush=True)
        return self.facts[key]

    def _made(self, model: str, contestant: str) -> dict[str, Any]:
        entry, case = CONTESTANTS[contestant], steps.case_of(model, str(self.cache))
        if missing := entry.missing():
            return {"error": missing}
        if entry.after and "error" in (before := self.make(model, entry.after)):
            return {"error": f"needs {entry.after}: {before['error']}"}
        if entry.make is None:
            return {}
        out = entry.folder(contestant, case)
        note = out.with_suffix(".json")
        code = source_hash() if contestant.startswith("onnxpress") else versions()
        if out.exists() and note.exists():
            there = json.loads(note.read_text())
            if self.args.keep or there["of"] == code:
                return there["facts"]
        print(f"{model} {contestant}: make", flush=True)
        with tempfile.TemporaryDirectory(dir=case.folder) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            facts = process(
                "make", model=model, cache=str(self.cache), contestant=contestant, out=str(made)
            )
            if "error" not in facts:
                facts["bytes"] = sum(f.stat().st_size for f in made.glob("model.*"))
                if out.exists():
                    out.rename(Path(scratch) / "old")
                made.rename(out)
                note.write_text(json.dumps({"of": code, "facts": facts}))
        return facts

    def made(self, model: str, contestants: list[str]) -> list[str]:
        return [c for c in contestants if "error" not in self.make(model, c)]

    # The four tables --------------------------------------------------------------------------

    def drift(self, contestants: list[str]) -> list[dict[str, Any]]:
        """Rows of cosines to PyTorch in float32, MiniLM alone."""
        rows, want = [], None
        for name in [EXACT, *(c for c in contestants if c != EXACT)]:
            row = {"contestant": name, **self.make(MINILM, name)}
            rows.append(row)
            if "error" in row:
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = f"{folder}/vectors.npy"
                row |= process(
                    "embed", model=MINILM, cache=str(self.cache), contestant=name,
                    sentences=self.args.sentences, out=out,
                )  # fmt: skip
                vectors = None if "error" in row else np.load(out)
            if name == EXACT and vectors is None:
                return rows
            if vectors is not None:
                want = vectors if want is None else want
                cosine = (vectors * want).sum(1)
                row |= {
                    "mean_cosine": round(float(cosine.mean()), 6),
                    "min_cosine": round(float(cosine.min()), 6),
                }
        return rows

    def speed(self, model: str, contestants: list[str]) -> dict[str, Any]:
        """Medians by cell, and what the ratios are."""
        cells = (self.args.cells or CELLS[model]).split()
        timed = self.time(model, contestants, cells)
        timed["ratios"] = {cell: ratios(ms) for cell, ms in timed.get("ms", {}).items()}
        return timed

    def time(self, model: str, contestants: list[str], cells: list[str]) -> dict[str, Any]:
        ready = self.made(model, contestants)
        print(f"{model}: time {', '.join(ready)}", flush=True)
        timed = process(
            "time", 1800, model=model, cache=str(self.cache), contestants=ready, cells=cells,
            rounds=self.args.rounds, limit=self.args.limit,
        )  # fmt: skip
        out = {c: self.make(model, c)["error"] for c in contestants if c not in ready}
        return {**timed, "left_out": out}

    def session(self) -> list[dict[str, Any]]:
        """Opening and memory, medians of three processes."""
        rows = []
        for name in (FLOAT, INT8, EXACT):
            row: dict[str, Any] = {"contestant": name, **self.make(MINILM, name)}
            rows.append(row)
            seen = [] if "error" in row else [
                process("session", model=MINILM, cache=str(self.cache), contestant=name)
                for _ in range(4)
            ][1:]  # the first one reads from the disk  # fmt: skip
            if failed := next((s for s in seen if "error" in s), None):
                row |= failed
            elif seen:
                row["open_ms"] = statistics.median(s["open_ms"] for s in seen)
                row["mb"] = {k: statistics.median(s["mb"][k] for s in seen) for k in seen[0]["mb"]}
        return rows

    def pruning(self) -> dict[str, Any]:
        """A quarter of the heads and of the feed-forward columns: speed of one, drift of both."""
        result: dict[str, Any] = {}
        if BERT in self.args.models:
            timed = self.time(BERT, [FLOAT, PRUNED], PRUNED_CELLS.split())
            result |= {"speed": timed, "times_faster": {
                cell: round(ms[FLOAT] / ms[PRUNED], 3)
                for cell, ms in timed.get("ms", {}).items() if PRUNED in ms and FLOAT in ms
            }}  # fmt: skip
        if MINILM in self.args.models:
            result["minilm_drift"] = self.drift([PRUNED])[-1]
        return result


def ratios(ms: dict[str, float]) -> dict[str, Any]:
    """How many times faster than its peers our int8 is, each peer at its best in the cell."""
    if INT8 not in ms:
        return {}
    ours, found = ms[INT8], {}
    for name, kin in (
        ("ort-dynamic", ["ort-dynamic"]),
        ("ort-static", [c for c in ms if c.startswith("ort-static")]),
        ("openvino", [c for c in ms if c.startswith("openvino")]),
        ("torch", [c for c in ms if c.startswith("torch")]),
    ):
        if there := [c for c in kin if c in ms]:
            best = min(there, key=lambda c: ms[c])
            found[name] = {"times_faster": round(ms[best] / ours, 3), "best": best}
    if UNSMOOTHED in ms:
        found["smoothing_costs"] = round(ours / ms[UNSMOOTHED] - 1, 3)
    return found


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "python": sys.version.split()[0]}


def source_hash() -> str:
    """Of the code that presses: what it made before it changed is no longer its."""
    root = Path(__file__).parent.parent
    rooms = ("artifact", "exporter", "models", "optimizers", "press")
    files = [f for room in rooms for f in sorted((root / room).rglob("*.py"))]
    files += [Path(steps.__file__), peers.CALIBRATION]
    return sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next((x for x in lines if x.startswith("flags")), "").split())
    return {**common.machine(), **{f: f in flags for f in ("avx512_vnni", "amx_int8")}}


# What is said of it ---------------------------------------------------------------------------


LEVEL, SMOOTH = round(1 / 1.15, 4), round(1 / 1.1, 4)  # 15% and 10% slower, as times faster


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What issue 4 asks for, what there is, and whether that reaches it."""
    rows = []

    def goal(what: str, least: float, have: float | None) -> None:
        if have is not None:
            rows.append({"goal": what, "least": least, "have": have, "reached": have >= least})

    drift = {row["contestant"]: row for row in result.get("drift", [])}
    ours = drift.get(INT8, {})
    goal("minilm, mean cosine", 0.998, ours.get("mean_cosine"))
    goal("minilm, minimum cosine", 0.985, ours.get("min_cosine"))
    if "bytes" in ours:
        goal("minilm, 24 MB over the size of the file", 1.0, round(24e6 / ours["bytes"], 3))
    for model, timed in result.get("speed", {}).items():
        for cell, found in timed["ratios"].items():
            where = f"{model} {cell}"

            def faster(peer: str, found: dict[str, Any] = found) -> float | None:
                return found.get(peer, {}).get("times_faster")

            if model == MINILM and "smoothing_costs" in found:
                share = round(1 / (1 + found["smoothing_costs"]), 3)
                goal(f"{where}, speed with smoothing over that without", SMOOTH, share)
            if where == f"{MINILM} 8x128":
                goal(f"{where}, times faster than quantize_dynamic", 1.9, faster("ort-dynamic"))
                goal(f"{where}, times faster than quantize_static", 2.0, faster("ort-static"))
            if where != f"{MINILM} 1x512":
                least = LEVEL if model == BERT and cell != "1x16" else 1.0
                goal(f"{where}, times faster than OpenVINO's best", least, faster("openvino"))
    for cell, times in result.get("pruning", {}).get("times_faster", {}).items():
        goal(f"{BERT} {cell}, times faster with a quarter pruned", 1.2, times)
    return rows


def markdown(title: str, head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([f"\n### {title}\n", *(f"| {' | '.join(map(str, x))} |" for x in lines)])


def drift_table(title: str, rows: list[dict[str, Any]]) -> str:
    return markdown(title, ["contestant", "mean cosine", "min cosine", "MB", "made in s"], [
        [row["contestant"], row["error"][:150], "", "", ""] if "error" in row else
        [row["contestant"], f"{row['mean_cosine']:.5f}", f"{row['min_cosine']:.4f}",
         f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "", row.get("make_seconds", "")]
        for row in rows
    ])  # fmt: skip


def speed_table(model: str, timed: dict[str, Any]) -> str:
    if "error" in timed:  # one of them took the process down
        return f"\n{model}: {timed['error']}"
    cells, rows = list(timed["ms"]), []
    tried = [*timed["ms"].values(), *timed["failed"].values()]
    for name in dict.fromkeys(c for names in tried for c in names):
        ms = [timed["ms"][cell].get(name, timed["failed"][cell].get(name, "")) for cell in cells]
        rows.append([name, *ms])
    rows += [[name, why, *[""] * (len(cells) - 1)] for name, why in timed["left_out"].items()]
    for peer in ("ort-dynamic", "ort-static", "openvino", "torch"):
        found = [timed["ratios"][cell].get(peer) for cell in cells]
        shown = [f"{f['times_faster']:.2f}x ({f['best']})" if f else "" for f in found]
        if any(shown):
            rows.append([f"**{INT8} against {peer}**", *shown])
    costs = [timed["ratios"][cell].get("smoothing_costs") for cell in cells]
    if any(c is not None for c in costs):
        rows.append(["**smoothing costs**", *("" if c is None else f"{c:+.1%}" for c in costs)])
    return markdown(f"{model}, ms", ["contestant", *cells], rows)


def session_table(rows: list[dict[str, Any]]) -> str:
    head = ["contestant", "open ms", "peak MB: python", "imports", "open", "8x128 run"]
    return markdown("Opening, in a fresh process", head, [
        [row["contestant"], row["error"], "", "", "", ""] if "error" in row else
        [row["contestant"], row["open_ms"], *row["mb"].values()]
        for row in rows
    ])  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        steps.work(*sys.argv[2:])
        return
    # A SIGTERM unwinds as Ctrl-C does: the child and the temporary files go too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=CELLS, default=list(CELLS))
    usual = [c for c in CONTESTANTS if c != PRUNED]
    parser.add_argument("--contestants", nargs="+", choices=usual, default=usual)
    parser.add_argument("--cells", help='such as "1x16 8x128"; by default it depends on the model')
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sentences", type=int, default=320, help="to measure drift on")
    parser.add_argument("--limit", type=float, default=4.0, help="skip a cell whose run takes more")
    parser.add_argument("--cache", type=Path, help="keep what is made here, for the next run")
    parser.add_argument("--keep", action="store_true", help="even where it is out of date")
    parser.add_argument("--name", default="int8", help="of the file in benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(args, (args.cache or Path(folder)).resolve())
    common.finish(args.name, result)


def run(args: argparse.Namespace, cache: Path) -> dict[str, Any]:
    texts = steps.held_out(args.sentences)
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "threads": peers.THREADS,
        "rounds": args.rounds,
        "sentences": {"count": len(texts), "sha256": sha256("\n".join(texts).encode()).hexdigest()},
    }
    for model in args.models:
        (cache / model).mkdir(parents=True, exist_ok=True)
        made = process("weights", model=model, cache=str(cache))
        if "error" in made:
            sys.exit(f"{model}: {made['error']}")
    bench = Bench(args, cache)
    if "drift" in args.only and MINILM in args.models:
        result["drift"] = bench.drift(args.contestants)
        print(drift_table(f"MiniLM, {len(texts)} texts held out", result["drift"]), flush=True)
    if "speed" in args.only:
        result["speed"] = {}
        for model in args.models:
            # What smoothing costs is asked of weights that need it.
            known = [c for c in args.contestants if model == MINILM or c != UNSMOOTHED]
            timed = result["speed"][model] = bench.speed(model, known)
            print(speed_table(model, timed), flush=True)
    if "session" in args.only and MINILM in args.models:
        result["session"] = bench.session()
        print(session_table(result["session"]), flush=True)
    if "pruning" in args.only:
        found = result["pruning"] = bench.pruning()
        if "minilm_drift" in found:
            print(drift_table("MiniLM, a quarter pruned", [found["minilm_drift"]]))
        print(f"\nPruned BERT-base, times faster: {found.get('times_faster')}", flush=True)
    result["goals"] = goals(result)
    print(markdown("Goals", ["goal", "least", "have", ""], [
        [g["goal"], g["least"], g["have"], "" if g["reached"] else "**missed**"]
        for g in result["goals"]
    ]))  # fmt: skip
    return result


if __name__ == "__main__":
    main()
