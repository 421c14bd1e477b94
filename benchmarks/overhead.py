"""What Session.run adds to a bare InferenceSession.run: the checks, on a model that does nothing.

    python benchmarks/overhead.py

Both run the same model on the same feeds, in turn, many calls a round. The last line is JSON.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import common
import numpy as np
import onnx_ir as ir
import onnxruntime as rt
from onnxpress.runtime import Session, time_runs

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
g (float[batch,4] x, int64[batch,sequence] mask)
=> (float[batch,4] y, int64[batch,sequence] z) { y = Add(x, x)  z = Add(mask, mask) }"""
BUDGET_US = 30


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        ir.save(ir.from_onnx_text(MODEL), path)
        options = rt.SessionOptions()
        options.intra_op_num_threads = 1
        bare = rt.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session = Session(path, threads=1)
        feeds = {"x": np.ones((2, 4), np.float32), "mask": np.ones((2, 3), np.int64)}
        times = time_runs(
            {
                "bare": lambda: [bare.run(["y", "z"], feeds) for _ in range(1000)],
                "session": lambda: [session.run(feeds) for _ in range(1000)],
            },
            rounds=15,
        )
    # A call of a contestant is 1000 runs: its milliseconds are the microseconds of one.
    micros = {name: round(t.median, 2) for name, t in times.items()}
    overhead = round(micros["session"] - micros["bare"], 2)
    calls = times["bare"].calls * 1000
    print(f"{micros} us a run, {calls} runs each; budget {BUDGET_US} us")
    common.finish(
        "overhead",
        {
            "machine": common.machine(),
            "versions": common.versions("onnxruntime", "numpy"),
            "rounds": 15,
            "bare_us": micros["bare"],
            "session_us": micros["session"],
            "overhead_us": overhead,
            "budget_us": BUDGET_US,
        },
    )


if __name__ == "__main__":
    main()
