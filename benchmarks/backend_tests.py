"""The ONNX project's own backend tests, before and after `optimize`.

    python benchmarks/backend_tests.py [WORD ...]       only cases whose name has one of the words

Every node and simple model that the onnx package ships, and that ONNX Runtime's CPU provider
runs right, goes through the whole pipeline and has to give the expected outputs again. A case is
`declined` where optimize says no in words of ours; all else that is not right is `wrong`.
It takes about a minute on one core; results/backend_tests.json.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

sys.path.insert(0, str(Path(__file__).parent))
from common import finish, machine, versions


@dataclass(frozen=True)
class Case:
    """One model with its data sets: inputs and expected outputs."""

    name: str
    proto: onnx.ModelProto
    data: list[tuple[list[Any], list[Any]]]
    rtol: float
    atol: float


def cases(*words: str) -> Iterator[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # onnx computes overflows on purpose
        found = [case for kind in ("node", "simple") for case in load_model_tests(kind=kind)]
    for case in found:
        if words and not any(word in case.name for word in words):
            continue
        if case.model is not None:
            proto, data = case.model, case.data_sets or []
        else:
            folder = Path(case.model_dir)
            proto = onnx.load(folder / "model.onnx")
            data = [_read(proto.graph, sets) for sets in sorted(folder.glob("test_data_set_*"))]
        yield Case(case.name, proto, data, case.rtol, case.atol)


def _read(graph: onnx.GraphProto, folder: Path) -> tuple[list[Any], list[Any]]:
    def side(word: str, values: Any) -> list[Any]:
        paths = [folder / f"{word}_{i}.pb" for i in range(len(values))]
        return [
            _value(value.type, path.read_bytes())
            for value, path in zip(values, paths, strict=True)
            if path.exists()
        ]

    return side("input", graph.input), side("output", graph.output)


def _value(kind: onnx.TypeProto, data: bytes) -> Any:
    match kind.WhichOneof("value"):
        case "sequence_type":
            return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
        case "optional_type":
            return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def session(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    return ort.InferenceSession(proto.SerializeToString(), options, providers=providers)


def complaint(case: Case, proto: onnx.ModelProto) -> str | None:
    """Why `proto` does not give what `case` expects, or None."""
    try:
        opened = session(proto)
        names = [i.name for i in opened.get_inputs()]
        for inputs, outputs in case.data:
            # onnx makes scalars where ONNX Runtime wants arrays of rank 0.
            feeds = [np.asarray(x) if isinstance(x, np.generic) else x for x in inputs]
            got = opened.run(None, dict(zip(names, feeds, strict=True)))
            for index, (have, want) in enumerate(zip(got, outputs, strict=True)):
                if said := _differ(have, want, case):
                    return f"output {index}: {said}"
    except Exception as e:  # ONNX Runtime raises a class of its own for each kind of failure
        return f"{type(e).__name__}: {str(e).splitlines()[0][:300]}"
    return None


def _differ(have: Any, want: Any, case: Case) -> str | None:
    if isinstance(want, list):
        if not isinstance(have, list) or len(have) != len(want):
            return f"a sequence of {len(want)} expected"
        pairs = zip(have, want, strict=True)
        return next((said for a, b in pairs if (said := _differ(a, b, case))), None)
    if have is None or want is None:
        return None if have is want else "one of the two is None"
    have, want = np.asarray(have), np.asarray(want)
    if have.shape != want.shape:
        return f"shape {have.shape}, expected {want.shape}"
    if want.dtype.kind in "OSU":
        same = [str(x) for x in have.reshape(-1)] == [_text(x) for x in want.reshape(-1)]
        return None if same else "strings differ"
    if have.dtype != want.dtype:
        return f"{have.dtype}, expected {want.dtype}"
    a, b = (x if x.dtype.kind in "biu" else x.astype(np.complex128) for x in (have, want))
    if np.allclose(a, b, rtol=case.rtol, atol=case.atol, equal_nan=True):
        return None
    return f"differs by up to {np.nanmax(np.abs(np.subtract(a, b, dtype=np.complex128))):.3g}"


def _text(x: Any) -> str:
    return x.decode() if isinstance(x, bytes) else str(x)


def optimized(proto: onnx.ModelProto) -> onnx.ModelProto:
    from onnxpress.optimizers import TARGETS, optimize

    model = ir.from_proto(proto)
    optimize(model, TARGETS["cpu"])
    return ir.to_proto(model)


def check(
    case: Case, change: Callable[[onnx.ModelProto], onnx.ModelProto] = optimized
) -> tuple[str, str]:
    """(`not run`, `right`, `declined` or `wrong`, and why) of one case."""
    from onnxpress.errors import OnnxpressError

    if not case.data or (said := complaint(case, case.proto)):
        return "not run", said if case.data else "no data"
    try:
        proto = change(case.proto)
    except OnnxpressError as e:
        return "declined", e.what
    except Exception as e:  # a crash of a pass is a result here
        frame = traceback.extract_tb(e.__traceback__)[-1]
        notes = " ".join(getattr(e, "__notes__", []))
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        cause = e.__cause__ or e
        return "wrong", f"{type(cause).__name__}: {str(cause)[:300]} ({place}; {notes})"
    said = complaint(case, proto)
    return ("wrong", said) if said else ("right", "")


def main(*words: str) -> int:
    faulthandler.enable()
    ort.set_default_logger_severity(4)
    counts: Counter[str] = Counter()
    reasons: dict[str, dict[str, str]] = {"declined": {}, "wrong": {}}
    start = time.perf_counter()
    for case in cases(*words):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            verdict, why = check(case)
        counts["cases"] += 1
        counts[verdict] += 1
        if verdict in reasons:
            reasons[verdict][case.name] = why
            print(f"{verdict}: {case.name}: {why}", flush=True)
    seconds = time.perf_counter() - start
    run = counts["cases"] - counts["not run"]
    result = {
        "cases": counts["cases"],
        "run_by_onnxruntime": run,
        "right": counts["right"],
        "declined": reasons["declined"],
        "wrong": reasons["wrong"],
        "machine": machine(),
        "versions": versions("onnx", "onnx-ir", "onnxscript", "onnxruntime"),
    }
    print(f"{counts['right']} of {run} right, in {seconds:.0f} s")
    if not words:
        finish("backend_tests", result)
    return 1 if reasons["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
