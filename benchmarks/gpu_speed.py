"""How fast: onnxpress against PyTorch by CUDA events, in turns, over a roofline measured first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gpu_decode import Decoding, DeviceLoop
from gpu_models import Bert, Llama, tables
from gpu_place import Place, Report, brief
from onnxpress.runtime.measure import random_feeds

Call = Callable[[], Any]


class Clock:
    """Milliseconds of n calls: between two CUDA events on the place's stream, or by the host."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def __call__(self, call: Call, n: int) -> float:
        if self.place.stream is None:
            start = time.perf_counter()
            for _ in range(n):
                call()
            return (time.perf_counter() - start) * 1e3 / n
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.place.stream):
            first.record()
            for _ in range(n):
                call()
            last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) / n


def race(place: Place, contestants: dict[str, Callable[[], Call]]) -> dict[str, Any]:
    """Medians of all that could be set up, in ms, each round a turn of every one.

    A contestant is a function that sets it up and gives what is timed; one that fails is told
    with its error, and the others run.
    """
    clock, calls, rows = Clock(place), {}, {}
    for name, make in contestants.items():
        try:
            call = make()
            clock(call, 3)
            most = 2 if place.rehearse else 200
            calls[name] = (call, max(1, min(most, round(20 / max(clock(call, 2), 1e-3)))))
        except Exception as e:  # each library has its own; the others still count
            rows[name] = brief(e)
            place.free()
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(place.rounds):
        for name, (call, n) in calls.items():
            seen[name].append(clock(call, n))
    for name, times in seen.items():
        rows[name] = {
            "ms": round(statistics.median(times), 4),
            "least": round(min(times), 4),
            "most": round(max(times), 4),
            "calls": calls[name][1],
        }
    return rows


def captured(place: Place, call: Call) -> Call:
    """A PyTorch call as a CUDA graph."""
    if place.stream is None:  # a rehearsal
        return call
    with torch.cuda.stream(place.stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=place.stream):
        call()
    return graph.replay


def compiled(call: Call, mode: str | None) -> Call:
    torch._dynamo.reset()
    return torch.compile(call, mode=mode, fullgraph=True, dynamic=False)


# Roofline -----------------------------------------------------------------------------------------


def roofline(place: Place, report: Report) -> None:
    """Bandwidth and FLOP that this machine reaches, which all fractions are of."""
    big = 4096 if not place.rehearse else 4
    side = 8192 if not place.rehearse else 64
    clock = Clock(place)

    def bandwidth() -> dict[str, Any]:
        source = torch.ones(big << 20, dtype=torch.uint8, device=place.device)
        target = torch.empty_like(source)
        clock(lambda: target.copy_(source), 3)
        times = [clock(lambda: target.copy_(source), 5) for _ in range(place.rounds)]
        return {"gb_per_s": round(2 * source.nbytes / statistics.median(times) / 1e6, 1)}

    def reading() -> dict[str, Any]:
        source = torch.ones(big << 18, dtype=torch.float32, device=place.device)
        clock(source.sum, 3)
        times = [clock(source.sum, 5) for _ in range(place.rounds)]
        return {"gb_per_s": round(source.nbytes / statistics.median(times) / 1e6, 1)}

    def flop(dtype: torch.dtype) -> dict[str, Any]:
        a, b = (torch.randn(side, side, device=place.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        clock(lambda: torch.mm(a, b, out=out), 3)
        times = [clock(lambda: torch.mm(a, b, out=out), 5) for _ in range(place.rounds)]
        return {"tflop_per_s": round(2 * side**3 / statistics.median(times) / 1e9, 2)}

    report.do("copy", bandwidth)
    report.do("read", reading)
    report.do("fp16", lambda: flop(torch.float16))
    report.do("bf16", lambda: flop(torch.bfloat16))


def fractions(place: Place, rows: dict[str, Any], flop: float, nbytes: float) -> None:
    """Add to each row which part of the two rooflines it reaches, where they were measured."""
    peak = place.found("roofline", "fp16", "tflop_per_s")
    band = place.found("roofline", "copy", "gb_per_s")
    for row in rows.values():
        if "ms" in row:
            if peak:
                row["of_flop"] = round(flop / row["ms"] / 1e9 / peak, 4)
            if band:
                row["of_bandwidth"] = round(nbytes / row["ms"] / 1e6 / band, 4)


# Encoders -----------------------------------------------------------------------------------------


def encoders(place: Place, report: Report) -> None:
    models = ("minilm", "bert-base", "bert-large")
    shapes = [(1, 128), (8, 128), (32, 512)] if not place.rehearse else [(1, 8), (2, 16)]
    for model in models:
        for shape in shapes:
            if place.store.has(model, "cuda-fp16"):
                report.do(f"{model} {shape[0]}x{shape[1]}", lambda: encoder(place, model, shape))  # noqa: B023
        place.store.drop(model, "cuda-fp16")


def encoder(place: Place, model: str, shape: tuple[int, int]) -> dict[str, Any]:
    batch, length = shape
    recipe = place.store.recipe(model, "cuda-fp16")
    config = recipe["config"]
    path = place.store.path(model, "cuda-fp16")
    high = {"input_ids": config["vocab_size"], "token_type_ids": config["n_type"]}
    keep: dict[str, Any] = {}

    def feeds(session: Any) -> dict[str, Any]:
        return random_feeds(session.inputs, {"batch": batch, "sequence": length}, high=high)

    def plain() -> Call:
        session = keep["plain"] = place.session(path, recipe)
        arrays = feeds(session)
        return lambda: session.run(arrays)

    def bound(graph: bool) -> Call:
        session = place.session(path, recipe, graph=True) if graph else keep["plain"]
        binding = session.bind()
        for name, array in feeds(session).items():
            binding.input(name, array)
        return binding.run

    parameters = place.parameters(model, "cuda-fp16")
    bert = Bert(config, parameters).eval()
    arrays = np.random.default_rng(0).integers(0, config["vocab_size"], (batch, length))
    ids = torch.tensor(arrays, device=place.device)
    types = torch.zeros_like(ids)

    def eager() -> Any:
        with torch.inference_mode():
            return bert(ids, types)

    def compile_it(mode: str | None) -> Call:
        function = compiled(bert, mode)

        def call() -> Any:
            with torch.inference_mode():
                return function(ids, types)

        return call

    rows = race(
        place,
        {
            "onnxpress run": plain,
            "onnxpress binding": lambda: bound(False),
            "onnxpress cuda graph": lambda: bound(True),
            "torch eager": lambda: eager,
            "torch cuda graph": lambda: captured(place, eager),
            **{f"torch compile {m or 'default'}": lambda m=m: compile_it(m) for m in place.modes},
        },
    )
    d, layers = config["dim"], config["n_layer"]
    tokens = batch * length
    flop = 2 * tokens * layers * (4 * d * d + 2 * d * config["ffn_dim"])
    flop += 4 * tokens * length * d * layers
    looked_up = sum(
        p.nbytes for n, p in parameters.items() if n in ("tokens.weight", "positions.weight")
    )
    nbytes = sum(p.nbytes for p in parameters.values()) - looked_up
    fractions(place, rows, flop, nbytes)
    return rows


# Decoders -----------------------------------------------------------------------------------------


def decoders(place: Place, report: Report) -> None:
    for model in ("llama-1b", "llama-7b"):
        if not place.store.has(model, "cuda-fp16"):
            continue
        prompt, cache = (2048, 1024) if not place.rehearse else (16, 32)
        report.do(f"{model} prefill {prompt}", lambda: prefill(place, model, prompt))  # noqa: B023
        for batch in (1, 32) if not place.rehearse else (1, 2):
            report.do(
                f"{model} decode {batch}x{cache}",
                lambda: decode(place, model, batch, cache),  # noqa: B023
            )
        place.store.drop(model, "cuda-fp16")


def llama(place: Place, model: str, batch: int, capacity: int) -> Llama:
    config = place.store.recipe(model, "cuda-fp16")["config"]
    parameters = place.parameters(model, "cuda-fp16")
    return Llama(config, parameters, batch, capacity, tables(config)).eval()


def weights_read(place: Place, model: str) -> tuple[int, int]:
    """Bytes of weights that every step reads, and their number: those looked up are not."""
    recipe = place.store.recipe(model, "cuda-fp16")
    parameters = place.parameters(model, "cuda-fp16")
    tied = recipe["config"]["tie_embeddings"]
    read = [p for n, p in parameters.items() if tied or n != "embed_tokens.weight"]
    return sum(p.nbytes for p in read), sum(p.numel() for p in read)


def prefill(place: Place, model: str, length: int) -> dict[str, Any]:
    recipe = place.store.recipe(model, "cuda-fp16")
    config, path = recipe["config"], place.store.path(model, "cuda-fp16")
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (1, length))
    keep: dict[str, Any] = {}

    def ours() -> Call:
        session = place.session(path, recipe)
        run = keep["run"] = Decoding(session, recipe["kv"], 1, length, frozen=False)
        binding = keep["binding"] = run.bind()
        lengths = np.array([length])
        run.feed(binding, ids, np.arange(length)[None], lengths)
        return lambda: binding.run() and None

    theirs = llama(place, model, 1, length)
    given = torch.tensor(ids, device=place.device)

    def eager() -> Any:
        with torch.inference_mode():
            return theirs(given, 0)

    rows = race(
        place,
        {
            "onnxpress binding": ours,
            "torch eager": lambda: eager,
            **{
                f"torch compile {m or 'default'}": (
                    lambda m=m: _inferring(compiled(theirs, m), given, 0)
                )
                for m in place.modes
            },
        },
    )
    nbytes, count = weights_read(place, model)
    attention = 2 * length * length * config["n_head"] * config["head_dim"] * config["n_layer"]
    fractions(place, rows, 2 * count * length + attention, nbytes)
    _tokens(rows, length)
    return rows


def decode(place: Place, model: str, batch: int, filled: int) -> dict[str, Any]:
    recipe = place.store.recipe(model, "cuda-fp16")
    config, kv = recipe["config"], recipe["kv"]
    path = place.store.path(model, "cuda-fp16")
    keep: dict[str, Any] = {}

    def ours(graph: bool) -> Call:
        session = place.session(path, recipe, graph=graph)
        run = Decoding(session, kv, batch, filled, frozen=graph)
        loop = keep[f"loop {graph}"] = DeviceLoop(run, batch, filled, place.device)
        return loop.step

    def unchosen() -> Call:
        """Without torch's tensors and its argmax: what the session alone takes."""
        run = Decoding(place.session(path, recipe), kv, batch, filled, frozen=False)
        binding = keep["unchosen"] = run.bind()
        tokens = np.full((batch, 1), 7)
        run.feed(binding, tokens, tokens * 0 + filled - 1, np.full(batch, filled))
        return binding.run

    theirs = llama(place, model, batch, filled)
    ids = torch.full((batch, 1), 7, dtype=torch.int64, device=place.device)

    def step(function: Any = theirs) -> Call:
        def call() -> None:
            with torch.inference_mode():
                ids.copy_(function(ids, filled - 1).argmax(-1))

        return call

    rows = race(
        place,
        {
            "onnxpress binding": lambda: ours(False),
            "onnxpress cuda graph": lambda: ours(True),
            "onnxpress binding, no token chosen": unchosen,
            "torch eager": lambda: step(),
            "torch cuda graph": lambda: captured(place, step()),
            **{
                f"torch compile {m or 'default'}": lambda m=m: step(compiled(theirs, m))
                for m in place.modes
            },
        },
    )
    nbytes, count = weights_read(place, model)
    cache = 2 * batch * filled * config["n_kv_head"] * config["head_dim"] * config["n_layer"] * 2
    attention = 4 * batch * filled * config["n_head"] * config["head_dim"] * config["n_layer"]
    fractions(place, rows, 2 * count * batch + attention, nbytes + cache)
    _tokens(rows, batch)
    for graph, name in ((False, "binding"), (True, "cuda graph")):
        if loop := keep.get(f"loop {graph}"):
            try:
                rows[f"copies a step, {name}"] = copies(place, loop.step)
            except Exception as e:  # the profiler is no part of the race
                rows[f"copies a step, {name}"] = brief(e)
    return rows


def copies(place: Place, call: Call, steps: int = 4) -> dict[str, Any]:
    """Copies between host and device in a step, as CUPTI sees those of the whole process."""
    from torch.profiler import ProfilerActivity, profile

    if place.stream is None:
        call()
        return {"unknown": "no GPU"}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        Clock(place)(call, steps)
    names = [e.name for e in seen.events() if str(e.device_type).endswith("CUDA")]
    host = [n for n in names if "Memcpy" in n and ("HtoD" in n or "DtoH" in n)]
    return {
        "between_host_and_device": len(host) / steps,
        "kernels": sum("Memcpy" not in n and "Memset" not in n for n in names) / steps,
        "seen": sorted({n for n in names if "Memcpy" in n}),
    }


def _inferring(function: Any, *args: Any) -> Call:
    def call() -> Any:
        with torch.inference_mode():
            return function(*args)

    return call


def _tokens(rows: dict[str, Any], tokens: int) -> None:
    for row in rows.values():
        if "ms" in row:
            row["tokens_per_s"] = round(tokens / row["ms"] * 1e3, 1)
