"""The proof on a GPU: is it right, does it lie there, and how fast is it.

    python benchmarks/gpu_proof.py graphs -o DIR    anywhere, with onnxpress[export,hf]
    python benchmarks/gpu_proof.py run DIR          on the GPU: torch, numpy, onnxruntime-gpu
    python benchmarks/gpu_proof.py run DIR --only roofline,encoders    again, beside the others
    python benchmarks/gpu_proof.py --rehearse       all in small on a CPU, numbers meaningless

The graphs hold no weights (gpu_graphs.py says how), so DIR is some megabytes and carries models of
7 billion parameters. There is no network in `run`, and each section is a process of its own with a
limit of time: what one loses, the others keep. The result is benchmarks/results/gpu-NAME.json.

Sections: environment, roofline, numerics, placement (with attention kernels), capture (CUDA
graphs), encoders and decoders (speed, against PyTorch), tensorrt (where its libraries are).
Fractions are of what `roofline` has measured there: bytes of weights and cache that a step must
read, over bandwidth, and the multiplications of the model, over the rate of a large product.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

# How many minutes a section may take; `--minutes` sets all of them.
SECTIONS = {
    "environment": 1,
    "roofline": 1,
    "numerics": 5,
    "placement": 4,
    "capture": 2,
    "encoders": 9,
    "decoders": 9,
    "tensorrt": 6,
}
GRACE = 60  # seconds more until the process is ended: a step may be near its end
MODES: dict[str, str | None] = {"default": None, "reduce-overhead": "reduce-overhead",
                                "max-autotune": "max-autotune"}  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions and devices, and what doctor says of each library."""
    import torch
    from onnxpress.runtime.doctor import examine
    from onnxpress.runtime.gpu import gpu, kernel_driver

    versions = {"python": sys.version.split()[0], "torch_cuda": torch.version.cuda}
    for name in ("onnxruntime-gpu", "onnxruntime", "torch", "numpy", "onnx", "triton", "tensorrt"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    card = gpu()
    found: dict[str, Any] = {
        "machine": common.machine(),
        "versions": versions,
        "driver": kernel_driver(),
        "gpu": vars(card) if card else None,
    }
    if torch.cuda.is_available():
        found["torch_gpu"] = torch.cuda.get_device_name()
        found["cudnn"] = torch.backends.cudnn.version()
    found["doctor"] = [f"{c.name}: {'' if c.works else 'NOT '}{c.detail}" for c in examine()]
    return found


def section(name: str, args: argparse.Namespace) -> None:
    """Run one section in this process; what it finds is in its part."""
    import torch
    from gpu_place import Report

    report = Report(args.parts / f"{name}.json", args.minutes or SECTIONS[name])
    if name == "environment":
        report.do("this machine", environment)
        return
    place = report.do("set up", lambda: _place(args))
    if place is None:
        return
    del report.rows["set up"]
    report.free = place.free
    torch.backends.cuda.matmul.allow_tf32 = False
    if name in ("roofline", "encoders", "decoders"):
        import gpu_speed as module
    else:
        import gpu_checks as module  # type: ignore[no-redef]
    getattr(module, name)(place, report)


def _place(args: argparse.Namespace) -> Any:
    from gpu_place import Place

    return Place(
        args.graphs,
        provider=args.provider,
        device=args.device,
        parts=args.parts,
        rehearse=args.rehearse,
        rounds=2 if args.rehearse else args.rounds,
        modes=tuple(MODES[m] for m in args.modes.split(",") if m),
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Every section that was asked for, each in a process of its own, and the result of all."""
    args.parts = args.out / "gpu-parts"
    wanted = args.only.split(",") if args.only else list(SECTIONS)
    if unknown := set(wanted) - set(SECTIONS):
        sys.exit(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    seconds = {}
    for name in wanted:
        print(f"{name}", flush=True)
        start = time.monotonic()
        part = args.parts / f"{name}.json"
        part.unlink(missing_ok=True)
        if args.here:
            section(name, args)
            ended = None
        else:
            ended = _in_a_process(name, args)
        seconds[name] = round(time.monotonic() - start, 1)
        if ended:
            rows = json.loads(part.read_text()) if part.is_file() else {}
            args.parts.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({**rows, "ended": ended}, indent=1))
            print(f"  {ended}", flush=True)
    return _collect(args, seconds)


def _in_a_process(name: str, args: argparse.Namespace) -> str | None:
    """Why the section's process did not end by itself, or None."""
    limit = (args.minutes or SECTIONS[name]) * 60 + GRACE
    command = [sys.executable, __file__, *args.given, "--section", name]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    try:
        done = subprocess.run(command, timeout=limit, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return f"exit status {done.returncode}" if done.returncode else None


def _collect(args: argparse.Namespace, seconds: dict[str, float]) -> dict[str, Any]:
    parts = {
        name: json.loads((args.parts / f"{name}.json").read_text())
        for name in SECTIONS
        if (args.parts / f"{name}.json").is_file()
    }
    here = parts.get("environment", {}).get("this machine", {})
    name = here.get("torch_gpu") or (here.get("gpu") or {}).get("name") or "none"
    result = {
        "gpu": name,
        "provider": args.provider,
        "rehearsal": args.rehearse,
        "seconds": seconds,
        "failed": sorted(_failed(parts)),
        **parts,
    }
    slug = "rehearsal" if args.rehearse else re.sub(r"[^a-z0-9]+", "-", str(name).lower())
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{slug}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _failed(rows: Any, at: str = "") -> list[str]:
    """The places in the result with an error, or with a check that was not passed."""
    if not isinstance(rows, dict):
        return []
    bad = any(k in rows for k in ("error", "ended", "unfinished")) or rows.get("passed") is False
    return ([at] if bad else []) + [
        found for k, v in rows.items() for found in _failed(v, f"{at} / {k}" if at else k)
    ]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("command", nargs="?", choices=("graphs", "run"))
    found.add_argument("graphs", nargs="?", type=Path, help="the folder that `graphs` has written")
    found.add_argument("-o", "--output", type=Path, help="of `graphs`: the folder to write")
    found.add_argument("--models", default="", help="of `graphs`: some models, with commas")
    found.add_argument("--rehearse", action="store_true", help="small shapes on a CPU")
    found.add_argument("--only", default="", help=f"of {', '.join(SECTIONS)}, with commas")
    found.add_argument("--minutes", type=float, help="limit of each section")
    found.add_argument("--rounds", type=int, default=11, help="turns of each contestant")
    found.add_argument("--modes", default="default,reduce-overhead", help=f"of {', '.join(MODES)}")
    found.add_argument("--provider", default="", help="cuda, or cpu in a rehearsal")
    found.add_argument("--device", default="", help="torch's; cpu where --provider is a null GPU")
    found.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    found.add_argument("--here", action="store_true", help="all sections in this process")
    found.add_argument("--section", help=argparse.SUPPRESS)
    return found


def main(given: list[str]) -> None:
    args = parser().parse_args(given)
    args.given = given
    args.provider = args.provider or ("cpu" if args.rehearse else "cuda")
    args.device = args.device or ("cpu" if args.rehearse else "cuda")
    if args.command == "graphs":
        import gpu_graphs

        only = tuple(m for m in args.models.split(",") if m)
        gpu_graphs.build(
            args.output or Path("gpu-graphs"), tiny=args.rehearse, only=only,
            convert=args.provider != "cpu",
        )  # fmt: skip
        return
    if args.section:
        args.parts = args.out / "gpu-parts"
        section(args.section, args)
        return
    if args.command is None and not args.rehearse:
        print(__doc__)
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.graphs is None:
            if not args.rehearse:
                sys.exit("run DIR: the folder that `graphs` has written")
            import gpu_graphs

            args.graphs = Path(folder) / "graphs"
            gpu_graphs.build(args.graphs, tiny=True, convert=args.provider != "cpu")
            args.given = ["run", str(args.graphs), *given]
        result = run(args)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
