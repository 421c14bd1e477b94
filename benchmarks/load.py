"""What `onnxpress.load` costs beyond `import onnxruntime` and the model itself.

    python benchmarks/load.py

Fresh processes, in turn: one imports onnxruntime and opens a bare InferenceSession; one does the
same through `onnxpress.load`. The difference of their medians is ours.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import common
import onnxpress

ROUNDS = 11
HEAD = """
import json, sys, time
start = time.perf_counter()
"""
# The high-water mark of this process: getrusage's also knows the parent's before exec.
TAIL = """
print(json.dumps({
    "ms": (time.perf_counter() - start) * 1e3,
    "mb": next(int(x.split()[1]) for x in open("/proc/self/status") if x[:6] == "VmHWM:") / 1024,
    "heavy": sorted({"torch", "onnx", "onnx_ir", "transformers"} & set(sys.modules)),
}))
"""


def run(code: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + code + TAIL], capture_output=True, text=True
    )
    return json.loads(done.stdout)


def main() -> None:
    out = common.CACHE / "minilm"
    onnxpress.press(str(common.minilm()), out, force=True, measure=False)
    model, directory = repr(str(out / "model.onnx")), repr(str(out))
    contestants = {
        "onnxruntime": f"import onnxruntime as o; s = o.InferenceSession({model})",
        "onnxpress": f"import onnxpress; s = onnxpress.load({directory})",
        "without verify": f"import onnxpress; s = onnxpress.load({directory}, verify=False)",
    }
    seen: dict[str, list[dict]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, code in contestants.items():
            seen[name].append(run(code))
    medians = {
        name: {k: round(statistics.median(r[k] for r in rows), 1) for k in ("ms", "mb")}
        for name, rows in seen.items()
    }
    bare = medians["onnxruntime"]
    for name, m in medians.items():
        print(f"{name:26} {m['ms']:7.1f} ms  {m['mb']:7.1f} MB")
    common.finish(
        "load",
        {
            "machine": common.machine(),
            "versions": common.versions("onnxruntime", "tokenizers", "numpy"),
            "rounds": ROUNDS,
            "medians": medians,
            "beyond_onnxruntime_and_model": {
                "ms": round(medians["onnxpress"]["ms"] - bare["ms"], 1),
                "mb": round(medians["onnxpress"]["mb"] - bare["mb"], 1),
            },
            "heavy_modules": seen["onnxpress"][0]["heavy"],
        },
    )


if __name__ == "__main__":
    main()
