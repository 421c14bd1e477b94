"""Which attention kernels the CUDA provider chooses, in its own words.

The provider prints its choice for each attention node to standard output, and only where
ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO was set before it was loaded. So a child process runs the
model once on small feeds, and what it prints is read:

    Operator=GroupQueryAttention Node=/layers.0 DataType=fp16 SdpaKernel=FLASH_ATTENTION
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import ProviderError
from .profiles import names_of
from .session import Session
from .warmup import feeds_of

TOKENS = 8  # of the run: enough for a kernel to be chosen
TIMEOUT = 300  # seconds


@dataclass(frozen=True)
class AttentionKernel:
    """The kernel that ran one attention node: its operator, name (may be empty), dtype, kernel."""

    op: str
    node: str
    dtype: str
    kernel: str


def attention_kernels(path: str | os.PathLike[str], provider: str) -> list[AttentionKernel] | None:
    """The attention kernels of one run of the model, or None where the provider does not say.

    Args:
        path: A model.onnx, or an artifact directory.
        provider: Short name; only "cuda" reports.

    Raises:
        ProviderError: The run failed.
    """
    if provider != "cuda":
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, os.fspath(path), provider],
            env=os.environ | {"ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise ProviderError(
            f"the run that was to show the attention kernels took more than {TIMEOUT} seconds",
            where=str(path),
            hint="`onnxpress doctor` tries the provider on one node",
        ) from e
    if done.returncode:
        last = done.stderr.strip().splitlines()[-8:]
        raise ProviderError(
            "the run that was to show the attention kernels failed: " + "\n".join(last),
            where=str(path),
            hint="`onnxpress doctor` tries the provider on one node",
        )
    return parse(done.stdout + done.stderr)


def parse(text: str) -> list[AttentionKernel]:
    """The kernels in what the provider printed, in order, each node once."""
    found = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        pairs = dict(re.findall(r"(\w+)=(\S+)", line))
        if "Operator" not in pairs:
            continue
        # Releases before 1.21 give each kernel as NAME=1.
        flags = [k for k, v in pairs.items() if k.isupper() and v == "1"]
        kernel = pairs.get("SdpaKernel") or "+".join(flags) or "?"
        found.append(
            AttentionKernel(
                pairs["Operator"], pairs.get("Node", ""), pairs.get("DataType", "?"), kernel
            )
        )
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    session = Session(Path(sys.argv[1]), provider=sys.argv[2])
    few = {n: 1 if n == "batch" else TOKENS for n in names_of(session.inputs)}
    session.run(feeds_of(session, few))
