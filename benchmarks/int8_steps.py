"""The steps of int8.py, each a function that runs in a process of its own.

Our own contestants are here too; peers.py has the others.
"""

from __future__ import annotations

import ast
import json
import pydoc_data.topics
import random
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import peers
from peers import EXACT, THREADS, Case, Contestant, Feeds, Prepare

MINILM, BERT = "minilm", "bert-base"
EXAMPLES = {MINILM: 128, BERT: 4}  # texts to calibrate on; random weights learn nothing

# onnxpress ------------------------------------------------------------------------------------


def press(case: Case, folder: Path, **how: Any) -> dict[str, Any]:
    """By the public API, gate and all."""
    import onnxpress

    manifest = onnxpress.press(
        str(case.weights), folder, measure=False, force=True, progress=say, **how
    )
    found = manifest.precision or {}
    kept = [layer["name"] for layer in found.get("layers", []) if layer["precision"] == "fp32"]
    return {
        "layers_in_float": kept,
        "recipe": found.get("recipe", {}),
        "drift_at_the_gate": found.get("drift", {}).get("extra", {}),
    }


def press_int8(case: Case, folder: Path) -> dict[str, Any]:
    """By the public API; of random weights the same passes, which no gate can judge."""
    return press(case, folder, precision="int8") if case.trained else learned(case, folder, True)


def unsmoothed(case: Case, folder: Path) -> dict[str, Any]:
    """The int8 of press in everything but SmoothQuant: what that costs."""
    return learned(case, folder, False)


def learned(case: Case, folder: Path, smooth: bool) -> dict[str, Any]:
    from onnxpress.optimizers.pipeline import Change
    from onnxpress.optimizers.precision.learn_int8 import Int8, learn
    from onnxpress.optimizers.precision.quantize_embeddings import QuantizeEmbeddings
    from onnxpress.optimizers.precision.quantize_static import Scheme

    def make(lab: Any) -> tuple[Any, dict[str, Any]]:
        # Where weights are random it does not matter how they are rounded, and takes a minute.
        scheme, care = Scheme(lab.target.quantized), case.trained
        config = Int8(scheme, smooth=smooth, compensate=care, correct=care)
        found = learn(lab.base, config, lab.run, lab.batches, real=lab.real, progress=say)
        change = Change(base=[*found.passes(), QuantizeEmbeddings()])
        return lab.attempt("int8", change), {"smoothed": len(found.smoothings)}

    return in_lab(case, folder, make)


def press_dynamic(case: Case, folder: Path) -> dict[str, Any]:
    if case.trained:
        return press(case, folder, precision="int8-dynamic")
    from onnxpress.press import candidates

    return in_lab(case, folder, lambda lab: (candidates.dynamic(lab, []).make(()), {}))


def in_lab(
    case: Case, folder: Path, make: Callable[[Any], tuple[Any, dict[str, Any]]]
) -> dict[str, Any]:
    """A candidate as press makes it, published without the gate and its search."""
    from onnxpress import artifact
    from onnxpress.exporter import capture, resolve
    from onnxpress.optimizers import pipeline
    from onnxpress.press.data import Sets, prepare
    from onnxpress.press.lab import Lab

    source = resolve(str(case.weights))
    base = capture(source).model
    pipeline.run_passes(base, pipeline.raised())
    sets = prepare("embed")
    if not case.trained:
        sets = Sets(
            sets.calibration.some(range(case.examples)),
            sets.search.some(range(2)),
            sets.evaluation.some(range(2)),
        )
    manifest = artifact.read_manifest(case.folder / "onnxpress-fp32")
    scratch = folder / "lab"
    scratch.mkdir()
    attempt, recipe = make(Lab(base, "cpu", sets, manifest, source.files, scratch))
    artifact.save_model(attempt.model, folder)
    shutil.rmtree(scratch)
    return {"recipe": recipe}


def prune(case: Case, folder: Path) -> dict[str, Any]:
    how: dict[str, Any] = {}
    if not case.trained:  # what is left of random weights is as good as what goes
        few = case.folder / "few.txt"
        few.write_text("\n".join(t.replace("\n", " ") for t in case.texts()))
        how = {"calibration": few}
    return press(case, folder, prune="heads:0.25,ffn:0.25", allow_drift=True, **how)


def open_onnxpress(case: Case, folder: Path) -> Prepare:
    from onnxpress.runtime import Session

    off = None  # the manifest says it
    if not (folder / "manifest.json").exists():
        from onnxpress.optimizers import TARGETS

        off = TARGETS["cpu"].disabled_optimizers
    session = Session(folder, threads=THREADS, disabled_optimizers=off)
    names = [i.name for i in session.inputs]

    def prepare(feeds: Feeds) -> Callable[[], np.ndarray]:
        given = {n: feeds[n] for n in names}
        return lambda: session.run(given)["last_hidden_state"]

    return prepare


def say(step: str) -> None:
    print(step, flush=True)


FLOAT, INT8, UNSMOOTHED, PRUNED = (
    "onnxpress-fp32",
    "onnxpress-int8",
    "onnxpress-int8-unsmoothed",
    "onnxpress-fp32-pruned",
)
CONTESTANTS = {
    INT8: Contestant(press_int8, open_onnxpress, FLOAT),
    UNSMOOTHED: Contestant(unsmoothed, open_onnxpress, FLOAT),
    "onnxpress-int8-dynamic": Contestant(press_dynamic, open_onnxpress, FLOAT),
    FLOAT: Contestant(press, open_onnxpress),
    PRUNED: Contestant(prune, open_onnxpress),
    **peers.PEERS,
}


# Texts ----------------------------------------------------------------------------------------


def held_out(count: int) -> list[str]:
    """Paragraphs of 20 to 600 characters: half of Python's manual, half of docstrings."""
    calibrated = {" ".join(t.split()) for t in Case(MINILM, Path(), Path(), 10**6).texts()}
    manual = paragraphs(pydoc_data.topics.topics.values())
    code = paragraphs(docstrings())
    chosen = []
    for texts, share in ((manual, count - count // 2), (code, count // 2)):
        fresh = sorted(texts - calibrated)
        random.Random(0).shuffle(fresh)
        chosen += fresh[:share]
    return chosen


def paragraphs(texts: Iterable[str]) -> set[str]:
    found = (" ".join(p.split()) for text in texts for p in text.split("\n\n"))
    return {p for p in found if 20 <= len(p) <= 600 and p.count(" ") > 2}


def docstrings() -> Iterator[str]:
    """Those of the modules of the standard library, which are read and not imported."""
    has = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, has) and (text := ast.get_docstring(node)):
                yield text


# What the processes do ------------------------------------------------------------------------


def case_of(model: str, cache: str) -> Case:
    folder = Path(cache) / model
    weights = common.minilm() if model == MINILM else folder / "weights"
    return Case(model, weights, folder, EXAMPLES[model])


def work_weights(model: str, cache: str) -> dict[str, Any]:
    case = case_of(model, cache)
    if model == BERT and not (case.weights / "model.safetensors").exists():
        peers.bert_base(case.weights)
    return {}


def work_make(model: str, cache: str, contestant: str, out: str) -> dict[str, Any]:
    case = case_of(model, cache)
    make = CONTESTANTS[contestant].make
    assert make is not None
    start = time.perf_counter()
    facts = make(case, Path(out))
    return {"make_seconds": round(time.perf_counter() - start, 1), **facts}


def work_embed(model: str, cache: str, contestant: str, sentences: int, out: str) -> dict[str, Any]:
    """Embeddings of the held-out texts, in ragged batches of 8, kept in a file."""
    case = case_of(model, cache)
    entry = CONTESTANTS[contestant]
    prepare = entry.open(case, entry.folder(contestant, case))
    texts, rows = held_out(sentences), []
    for start in range(0, len(texts), 8):
        feeds = peers.tokenize(case.weights, texts[start : start + 8])
        hidden, real = prepare(feeds)(), feeds["attention_mask"][..., None]
        rows.append((hidden * real).sum(1) / real.sum(1))
    vectors = np.concatenate(rows)
    np.save(out, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return {}


def work_time(
    model: str, cache: str, contestants: list[str], cells: list[str], rounds: int, limit: float
) -> dict[str, Any]:
    """Medians and bests by cell and contestant; who fails in a cell is left out of it."""
    case = case_of(model, cache)
    ready, ms, best = {}, {}, {}
    failed: dict[str, dict[str, str]] = {cell: {} for cell in cells}
    for name in contestants:
        try:
            ready[name] = CONTESTANTS[name].open(case, CONTESTANTS[name].folder(name, case))
        except Exception as e:
            for cell in cells:
                failed[cell][name] = f"does not open: {first_line(e)}"
    for cell in cells:
        feeds, runs, lasts = random_feeds(cell), {}, {}
        for name, prepare in ready.items():
            try:
                run = prepare(feeds)
                run()
                took = seconds(run, 1)
            except Exception as e:
                failed[cell][name] = f"does not run: {first_line(e)}"
                continue
            if took > limit:
                failed[cell][name] = f"one run takes {took:.1f} s"
            else:
                runs[name], lasts[name] = run, took
        timed = race(runs, lasts, rounds)
        ms[cell] = {name: round(median(t), 3) for name, t in timed.items()}
        best[cell] = {name: round(min(t), 3) for name, t in timed.items()}
    return {"ms": ms, "best": best, "failed": failed}


def race(
    runs: dict[str, Callable[[], Any]], lasts: dict[str, float], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each in each round, as `onnxpress.runtime.time_runs` takes them.

    But in a new order each round: where turns are taken in a circle, the same one always comes
    after the heaviest. `lasts` says how many seconds a run takes.
    """
    order, times = list(runs), {name: list[float]() for name in runs}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            time.sleep(0.05)  # thread pools spin for a while (ONNX Runtime's for 40 ms)
            if lasts[name] < 0.2:  # its threads wake up, which a long run does not notice
                runs[name]()
            calls = max(1, int(0.1 / lasts[name]))
            times[name].append(seconds(runs[name], calls) * 1e3)
    return times


def seconds(run: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def work_session(model: str, cache: str, contestant: str) -> dict[str, Any]:
    """Opening a model in a fresh process, and the most memory that runs took by then."""
    case, entry = case_of(model, cache), CONTESTANTS[contestant]
    before = peak_mb()
    if contestant == EXACT:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    else:
        import onnxpress
        import onnxruntime  # noqa: F401

        assert onnxpress
    imported = peak_mb()
    start = time.perf_counter()
    prepare = entry.open(case, entry.folder(contestant, case))
    seconds = time.perf_counter() - start
    opened = peak_mb()
    prepare(random_feeds("8x128"))()
    return {
        "open_ms": round(seconds * 1e3, 1),
        "mb": {"python": before, "imports": imported, "open": opened, "8x128": peak_mb()},
    }


def random_feeds(cell: str) -> Feeds:
    """Random words without padding: texts of one length."""
    shape = tuple(map(int, cell.split("x")))
    ids = np.random.default_rng(0).integers(1000, 30000, shape)
    ids[:, 0], ids[:, -1] = 101, 102
    return dict(zip(peers.NAMES, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))


def peak_mb() -> float:
    """The most that this process held; getrusage would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024, 1)


def first_line(e: BaseException) -> str:
    return f"{type(e).__name__}: {e}".strip().splitlines()[0][:300]


def work(task: str, request: str, answer: str) -> None:
    """In the process: the answer, or the error that it ended with."""
    try:
        result = globals()[f"work_{task}"](**json.loads(request))
    except Exception as e:
        result = {"error": f"{task}: {first_line(e)}"}
    Path(answer).write_text(json.dumps(result))
