"""Where gpu_proof.py runs: the device, its sessions, its weights, and the record of each step."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_weights import Parameters, Recipe, Store
from onnxpress.errors import OnnxpressError
from onnxpress.runtime import Session


class Report:
    """What one section found, written down after every step: what ends it loses nothing.

    Args:
        path: A JSON file.
        minutes: After which no further step begins.
    """

    def __init__(self, path: Path, minutes: float) -> None:
        self.path, self._end = path, time.monotonic() + minutes * 60
        self.rows: dict[str, Any] = {}
        self.free: Callable[[], object] = lambda: None

    def do(self, name: str, step: Callable[[], Any]) -> Any:
        """Run a step and keep what it gives, or its error; that, or None."""
        start, found = time.monotonic(), None
        if start > self._end:
            self.rows[name] = {"skipped": "the section's time was over"}
        else:
            self.rows[name] = {"unfinished": "the process ended in this step"}
            self._write()
            try:
                found = step()
                # What is for other steps alone, arrays among it, is not written.
                self.rows[name] = found if isinstance(found, dict) else {}
            except Exception as e:  # one step must not cost the others
                self.rows[name] = brief(e)
            self.rows[name]["seconds"] = round(time.monotonic() - start, 1)
        self._write()
        self.free()
        print(f"  {name}: {json.dumps(self.rows[name])[:600]}", flush=True)
        return found

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.rows, indent=1))


def brief(e: BaseException) -> dict[str, Any]:
    """An error as it goes into the results: its words, and where it came up."""
    frames = traceback.extract_tb(e.__traceback__)[-4:]
    hint = e.hint if isinstance(e, OnnxpressError) and e.hint else ""
    return {
        "error": f"{type(e).__name__}: {e}"[:1500],
        **({"hint": hint} if hint else {}),
        "at": [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames],
    }


class Place:
    """The device, in both libraries' words.

    Args:
        graphs: The folder of graphs.
        provider: cuda, or cpu for a rehearsal.
        device: torch's name of the same.
        parts: The folder with what other sections found.
        rehearse: Small shapes.
        rounds: Turns of each contestant.
        modes: Those of torch.compile; None is its default.

    Attributes:
        stream: The stream that everything is timed on; None on a CPU.
    """

    def __init__(
        self,
        graphs: Path,
        *,
        provider: str,
        device: str,
        parts: Path,
        rehearse: bool,
        rounds: int,
        modes: tuple[str | None, ...],
    ) -> None:
        self.provider, self.device, self.rehearse = provider, device, rehearse
        self.rounds, self.modes, self._parts = rounds, modes, parts
        self.store = Store(graphs, device)
        self.stream = torch.cuda.Stream() if device == "cuda" else None

    def session(
        self, path: Path, recipe: Recipe, *, graph: bool = False, own_stream: bool = False
    ) -> Session:
        """A session on this place's stream, or on one of ONNX Runtime's own."""
        options: dict[str, dict[str, str]] = {}
        if self.stream is not None and not own_stream:
            options = {"cuda": {"user_compute_stream": str(self.stream.cuda_stream)}}
        if graph and self.provider == "cpu":
            graph = False  # of a rehearsal: the same calls without
        return Session(
            path,
            provider=self.provider,
            provider_options=options,
            cuda_graph=graph,
            disabled_optimizers=recipe["disabled_optimizers"],
        )

    def parameters(self, model: str, variant: str) -> Parameters:
        """A model's parameters, of the type that PyTorch runs here: float16 on a GPU."""
        found = self.store.parameters(model, variant)
        return found if self.device == "cuda" else {n: t.float() for n, t in found.items()}

    def found(self, section: str, step: str, key: str) -> float | None:
        """A number that another section has measured."""
        path = self._parts / f"{section}.json"
        rows = json.loads(path.read_text()) if path.is_file() else {}
        value = rows.get(step, {}).get(key)
        return float(value) if value else None

    def free(self) -> None:
        """Give memory back to the device: sessions of the step before hold none of it then."""
        if self.device == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
