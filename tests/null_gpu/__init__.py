"""A machine with a GPU that is not there, for tests: placement, options, binding and refusals of
the real CUDA provider of onnxruntime-gpu. Results and times mean nothing. No test is in here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from .build import CUDA, build


def gpu_site() -> Path:
    """The folder that onnxruntime-gpu is unpacked in; the test is skipped where there is none.

    It is $ONNXPRESS_GPU_SITE, or the folder `gpu` of this environment, where `make .venv/.gpu` puts
    it: beside the environment's own onnxruntime, since both wheels provide the same module.
    """
    site = Path(os.environ.get("ONNXPRESS_GPU_SITE") or Path(sys.prefix, "gpu"))
    if not (site / CUDA).exists():
        pytest.skip(f"onnxruntime-gpu is not unpacked in {site}: `make .venv/.gpu` does it")
    return site


def null_gpu(*, cudnn: bool = True, tensorrt: bool = False) -> dict[str, str]:
    """The environment of a process that sees the null GPU (see `build`), or a skip."""
    site = gpu_site()
    for tool in ("gcc", "readelf"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool}, which the null GPU is built with, is missing: install gcc")
    return build(site, Path(sys.prefix, "null_gpu"), cudnn=cudnn, tensorrt=tensorrt)


def on_null_gpu(
    script: str,
    *args: object,
    env: Mapping[str, str] | None = None,
    cudnn: bool = True,
    tensorrt: bool = False,
) -> Any:
    """Run Python source in a process of its own that sees a GPU (sm_90, 139.8 GiB) and no results.

    Args:
        script: the source; it is dedented, and ends by printing one line of JSON.
        args: become its `sys.argv[1:]`.
        env: further variables: NULL_GPU_DRIVER, NULL_GPU_DEVICES, NULL_GPU_MEMORY, NULL_GPU_SM,
            NULL_GPU_TRACE (cudart.c says what each does), or onnxruntime's own.
        cudnn, tensorrt: whether those libraries are there, see `build`.

    Returns:
        What the last line on its standard output says.

    Raises:
        AssertionError: it failed; the message is its standard error.
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, args)],
        env={**os.environ, **null_gpu(cudnn=cudnn, tensorrt=tensorrt), **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])
