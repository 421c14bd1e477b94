"""Whether what runs on the GPU is right, lies where it should, and is captured as it should be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gpu_decode import Decoding
from gpu_models import Bert, Llama, tables
from gpu_place import Place, Report, brief
from gpu_weights import load_into
from onnxpress.errors import OnnxpressError, UsageError
from onnxpress.models import decoder
from onnxpress.runtime import Session
from onnxpress.runtime.attention_kernels import attention_kernels
from onnxpress.runtime.measure import random_feeds

Array = npt.NDArray[Any]
# ||have - want|| / ||want|| over what no mask hides. float32 without TF32 differs by the order of
# sums; a type of 11 or 8 bits of mantissa rounds each of some hundred steps by half of its last.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
ENCODERS = ("minilm", "bert-base", "vit", "t5")
VARIANTS = ("cuda-fp32", "cuda-fp16", "cuda-bf16")


def difference(have: Array, want: Array) -> float:
    """Relative to the size of what is wanted; inf where one is not finite, or all are zero."""
    have, want = np.asarray(have, np.float64), np.asarray(want, np.float64)
    size = np.linalg.norm(want)
    if have.shape != want.shape or not np.isfinite(have).all() or not size > 0:
        return float("inf")
    return float(np.linalg.norm(have - want) / size)


# Numerics -----------------------------------------------------------------------------------------


def numerics(place: Place, report: Report) -> None:
    for model in ENCODERS:
        if not place.store.has(model, "cpu-fp32"):
            continue
        wanted = report.do(f"{model} cpu", lambda: _reference(place, model))  # noqa: B023
        if wanted and place.store.recipe(model, "cpu-fp32")["kind"] == "encoder":
            report.do(f"{model} torch", lambda: torch_bert(place, model, wanted[1]))  # noqa: B023
        for variant in VARIANTS:
            if wanted and place.store.has(model, variant):
                report.do(
                    f"{model} {variant}",
                    lambda: encoder(place, model, variant, wanted),  # noqa: B023
                )
            place.store.drop(model, variant)
        place.store.drop(model, "cpu-fp32")
    for variant in ("cuda-fp16", "cuda-bf16"):
        if place.store.has("llama-small", variant):
            report.do(f"llama-small {variant}", lambda: llama(place, variant))  # noqa: B023
            place.store.drop("llama-small", variant)
    if place.store.has("llama-small", "cuda-fp32"):
        report.do("llama-small cuda-fp32", lambda: llama_with_a_mask(place))
    for variant in ("cuda-fp32", "cpu-fp32"):
        place.store.drop("llama-small", variant)


def _feeds(session: Session, recipe: dict[str, Any]) -> list[dict[str, Array]]:
    """One token, one row, a ragged batch, a longer one; images need no mask."""
    shapes = [(1, 1), (1, 17), (3, 32), (8, 128)]
    config = recipe["config"]
    high = {"input_ids": config.get("vocab_size", 900), "token_type_ids": config.get("n_type", 2)}
    found = []
    for seed, (batch, length) in enumerate(shapes):
        feeds = random_feeds(
            session.inputs, {"batch": batch, "sequence": length}, seed=seed, high=high
        )
        if "attention_mask" in feeds:
            lengths = np.maximum(length - np.arange(batch) * 7 % length, 1)
            feeds["attention_mask"] = (np.arange(length) < lengths[:, None]).astype(np.int64)
        found.append(feeds)
    return found


def _seen(feeds: dict[str, Array], out: Array) -> Array:
    mask = feeds.get("attention_mask")
    return out if mask is None else out[mask.astype(bool)]


def _reference(place: Place, model: str) -> list[tuple[dict[str, Array], Array]]:
    recipe = place.store.recipe(model, "cpu-fp32")
    session = Session(
        place.store.path(model, "cpu-fp32"), disabled_optimizers=recipe["disabled_optimizers"]
    )
    return [(f, next(iter(session.run(f).values()))) for f in _feeds(session, recipe)]


def encoder(place: Place, model: str, variant: str, wanted: Any) -> dict[str, Any]:
    """Every feed, by a plain run and by a binding, against the CPU."""
    recipe = place.store.recipe(model, variant)
    session = place.session(place.store.path(model, variant), recipe, own_stream=True)
    worst, bound_worst = 0.0, 0.0
    for feeds, want in wanted:
        out = next(iter(session.run(feeds).values()))
        worst = max(worst, difference(_seen(feeds, out), _seen(feeds, want)))
        binding = session.bind()
        for name, array in feeds.items():
            binding.input(name, array)
        bound = next(iter(binding.run().values())).numpy()
        bound_worst = max(bound_worst, difference(_seen(feeds, bound), _seen(feeds, want)))
    return _verdict(variant, run=worst, binding=bound_worst)


def torch_bert(place: Place, model: str, case: tuple[dict[str, Array], Array]) -> dict[str, Any]:
    """The contestant of the race in float32, and through it the weights of all graphs."""
    feeds, want = case  # one row, so that nothing is padded
    recipe = place.store.recipe(model, "cpu-fp32")
    parameters = {n: t.cpu().float() for n, t in place.store.parameters(model, "cpu-fp32").items()}
    with torch.inference_mode():
        ids, types = (torch.tensor(feeds[n]) for n in ("input_ids", "token_type_ids"))
        have = Bert(recipe["config"], parameters)(ids, types)
    return _verdict("cpu-fp32", run=difference(have.numpy(), want))


def _verdict(variant: str, **differences: float) -> dict[str, Any]:
    limit = TOLERANCE[variant.split("-")[1]]
    return {
        **{k: float(f"{v:.3g}") if v < 1e9 else "not finite" for k, v in differences.items()},
        "limit": limit,
        "passed": all(v <= limit for v in differences.values()),
    }


def torch_llama(place: Place) -> decoder.Decoder:
    """llama-small in PyTorch, float32 on the CPU, with the parameters of the graphs."""
    recipe = place.store.recipe("llama-small", "cpu-fp32")
    with torch.device("meta"):
        module = decoder.Decoder(decoder.DecoderConfig(**recipe["config"]))
    parameters = {n: t.cpu() for n, t in place.store.parameters("llama-small", "cpu-fp32").items()}
    found: decoder.Decoder = load_into(module, parameters, torch.float32)
    return found


def torch_logits(module: decoder.Decoder, ids: Array) -> Array:
    """(1, S) ids to (S, vocabulary) logits, without a cache."""
    c, n = module.config, ids.shape[1]
    empty = torch.zeros(1, c.n_kv_head, 0, c.head_dim)
    with torch.inference_mode():
        out = module(
            torch.tensor(ids),
            torch.ones(1, n, dtype=torch.int64),
            torch.arange(n)[None],
            [{"key": empty, "value": empty} for _ in range(c.n_layer)],
        )
    return np.asarray(out["logits"][0])


def llama(place: Place, variant: str) -> dict[str, Any]:
    """Ragged prompts and greedy steps over the shared cache, against PyTorch without one.

    PyTorch chooses the tokens and both read them, so that a near tie costs one token and not all
    that follow; whether the choices agree is counted, near ties beside.
    """
    module, recipe = torch_llama(place), place.store.recipe("llama-small", variant)
    session = place.session(place.store.path("llama-small", variant), recipe, own_stream=True)
    new = 4 if place.rehearse else 32
    lengths = np.array([17, 1, 9])
    rng = np.random.default_rng(3)
    ids = rng.integers(0, recipe["config"]["vocab_size"], (3, 17))
    result: dict[str, Any] = {"torch": torch_contestant(place, module, ids[:1])}
    for frozen in (False, True):
        run = Decoding(session, recipe["kv"], 3, 64, frozen=frozen)
        have = run.prompt(ids, lengths)
        texts = [list(row[:n]) for row, n in zip(ids, lengths, strict=True)]
        want = [torch_logits(module, np.array([t])) for t in texts]
        worst = max(difference(have[i, :n], want[i]) for i, n in enumerate(lengths))
        last = np.stack([w[-1] for w in want])
        chosen = np.stack([have[i, n - 1] for i, n in enumerate(lengths)])
        steps, same, ties = 0.0, 0, 0
        for step in range(new):
            tokens = last.argmax(-1)
            first, second = np.sort(last, -1)[:, [-1, -2]].T
            agree, near = chosen.argmax(-1) == tokens, first - second < 0.02 * last.std(-1)
            same, ties = same + int(agree.sum()), ties + int((~agree & near).sum())
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)
            chosen = run.step(tokens, lengths + step + 1)
            last = np.stack([torch_logits(module, np.array([t]))[-1] for t in texts])
            steps = max(steps, difference(chosen, last))
        key = "total at the capacity" if frozen else "total as it is"
        result[key] = {
            **_verdict(variant, prompt=worst, steps=steps),
            "tokens": 3 * new, "same_tokens": same, "other_tokens_in_near_ties": ties,
        }  # fmt: skip
    return result


def torch_contestant(place: Place, module: decoder.Decoder, ids: Array) -> dict[str, Any]:
    """The contestant of the race, float32 on the CPU: a prompt, and a step behind it."""
    recipe = place.store.recipe("llama-small", "cpu-fp32")
    values = {n: p.detach() for n, p in module.named_parameters()}
    racer = Llama(recipe["config"], values, 1, ids.shape[1], tables(recipe["config"]))
    with torch.inference_mode():
        given = torch.tensor(ids)
        out = torch.cat([racer(given[:, :-1], 0), racer(given[:, -1:], ids.shape[1] - 1)], 1)
    return _verdict("cpu-fp32", run=difference(out[0].numpy(), torch_logits(module, ids)))


def llama_with_a_mask(place: Place) -> dict[str, Any]:
    """float32 has no shared cache on CUDA: the graph with a mask, after a past, against the CPU."""
    graphs = {v: place.store.recipe("llama-small", v) for v in ("cpu-fp32", "cuda-fp32")}
    cpu = Session(
        place.store.path("llama-small", "cpu-fp32"),
        disabled_optimizers=graphs["cpu-fp32"]["disabled_optimizers"],
    )
    gpu = place.session(
        place.store.path("llama-small", "cuda-fp32"), graphs["cuda-fp32"], own_stream=True
    )
    config, worst = graphs["cpu-fp32"]["config"], 0.0
    for seed, (batch, length, past) in enumerate([(1, 1, 0), (2, 16, 0), (2, 1, 16), (1, 5, 7)]):
        feeds = random_feeds(
            cpu.inputs,
            {"batch": batch, "sequence": length, "past_sequence": past},
            seed=seed,
            high={"input_ids": config["vocab_size"], "position_ids": 1},
        )
        feeds["position_ids"] = np.broadcast_to(np.arange(past, past + length), (batch, length))
        feeds["attention_mask"][1:, -1:] = 0 if length > 1 else 1
        mask = feeds["attention_mask"][:, past:].astype(bool)
        want, have = cpu.run(feeds)["logits"], gpu.run(feeds)["logits"]
        worst = max(worst, difference(have[mask], want[mask]))
    return _verdict("cuda-fp32", run=worst)


# Placement and kernels ----------------------------------------------------------------------------


def placement(place: Place, report: Report) -> None:
    for model in (*ENCODERS, "bert-large", "llama-small", "llama-1b"):
        for variant in ("cuda-fp32", "cuda-fp16", "cuda-bf16"):
            if place.store.has(model, variant):
                report.do(f"{model} {variant}", lambda: placed(place, model, variant))  # noqa: B023
                place.store.drop(model, variant)


def placed(place: Place, model: str, variant: str) -> dict[str, Any]:
    path, recipe = place.store.path(model, variant), place.store.recipe(model, variant)
    found = place.session(path, recipe, own_stream=True).placement()
    try:
        kernels = attention_kernels(path, place.provider)
    except OnnxpressError as e:  # where the nodes lie is known without
        return {"nodes": found.counts, "memcpy": found.memcpy, **brief(e)}
    return {
        "nodes": found.counts,
        "memcpy": found.memcpy,
        "passed": len(found.counts) == 1 and found.memcpy == 0,
        "kernels": sorted({f"{k.op} {k.dtype} {k.kernel}" for k in kernels or ()}),
        "attention_nodes": len(kernels or ()),
    }


# CUDA graphs --------------------------------------------------------------------------------------


def capture(place: Place, report: Report) -> None:
    report.do("minilm replay", lambda: replay(place, "minilm"))
    report.do("llama-small decode", lambda: replay_decode(place))
    place.store.drop("minilm", "cuda-fp16")
    place.store.drop("llama-small", "cuda-fp16")


def replay(place: Place, model: str) -> dict[str, Any]:
    """Replays on other values, at two shapes, against plain runs; and an address that moved."""
    path, recipe = place.store.path(model, "cuda-fp16"), place.store.recipe(model, "cuda-fp16")
    plain = place.session(path, recipe, own_stream=True)
    graph = place.session(path, recipe, graph=True, own_stream=True)
    binding, worst, equal = graph.bind(), 0.0, True
    high = {"input_ids": recipe["config"]["vocab_size"], "token_type_ids": 2}
    shapes = [(1, 16), (2, 32), (1, 16), (2, 32)]
    for seed, (batch, length) in enumerate(shapes * 2):
        feeds = random_feeds(
            plain.inputs, {"batch": batch, "sequence": length}, seed=seed, high=high
        )
        feeds["attention_mask"][:, length - seed % 5 :] = 0
        for name, array in feeds.items():
            binding.input(name, array)
        (have,), (want,) = (r.values() for r in (binding.run(), plain.run(feeds)))
        worst = max(worst, difference(have.numpy(), want))
        equal = equal and bool(np.array_equal(have.numpy(), want))
    result = _verdict("cuda-fp16", replay=worst)
    result["bit_equal_to_plain_runs"] = equal
    moved = graph.buffer((2, 32), "int64")
    moved.copy_from(feeds["input_ids"])
    binding.input("input_ids", moved)
    try:
        binding.run()
        result["moved_address"] = "not refused"
    except UsageError as e:
        result["moved_address"] = f"refused: {e.what}"[:200]
    return result


def replay_decode(place: Place) -> dict[str, Any]:
    """Greedy steps replayed with the total at the capacity, against plain ones with the true."""
    path = place.store.path("llama-small", "cuda-fp16")
    recipe = place.store.recipe("llama-small", "cuda-fp16")
    runs = []
    for graph in (False, True):
        session = place.session(path, recipe, graph=graph, own_stream=True)
        runs.append(Decoding(session, recipe["kv"], 2, 64, frozen=graph))
    ids = np.random.default_rng(5).integers(0, recipe["config"]["vocab_size"], (2, 12))
    lengths = np.array([12, 5])
    want, have = (run.prompt(ids, lengths) for run in runs)
    worst, same = max(difference(have[i, :n], want[i, :n]) for i, n in enumerate(lengths)), 0
    last = np.stack([want[i, n - 1] for i, n in enumerate(lengths)])
    steps = 4 if place.rehearse else 24
    for step in range(steps):
        tokens = last.argmax(-1)
        last, other = (run.step(tokens, lengths + step + 1) for run in runs)
        worst = max(worst, difference(other, last))
        same += int((other.argmax(-1) == last.argmax(-1)).sum())
    return {**_verdict("cuda-fp16", replay=worst), "tokens": 2 * steps, "same_tokens": same}


# TensorRT -----------------------------------------------------------------------------------------


def tensorrt(place: Place, report: Report) -> None:
    import onnxpress.runtime.providers as providers
    from onnxpress.runtime.libraries import check

    def available() -> dict[str, Any]:
        rt = providers.onnxruntime()
        library = Path(rt.__file__).parent / "capi" / providers.PROVIDERS["tensorrt"].library
        providers.preload(rt)
        check("tensorrt", library)
        return {"library": str(library.name)}

    if not place.rehearse and report.do("libraries", available) is None:
        return
    for model in ENCODERS:
        if place.store.has(model, "tensorrt-fp16"):
            report.do(f"{model} fp16", lambda: engine(place, model))  # noqa: B023
            place.store.drop(model, "tensorrt-fp16")
            place.store.drop(model, "cpu-fp32")


def engine(place: Place, model: str) -> dict[str, Any]:
    """Build an engine, open it from the cache, and compare it with the CPU."""
    from onnxpress.runtime.warmup import warmup

    wanted = _reference(place, model)
    path, recipe = place.store.path(model, "tensorrt-fp16"), place.store.recipe(model, "cpu-fp32")
    shapes = {"batch": (1, 2, 8), "sequence": (1, 32, 128)}
    names = {d for i in Session(place.store.path(model, "cpu-fp32")).inputs for d in i.shape}
    shapes = {n: s for n, s in shapes.items() if n in names}
    result: dict[str, Any] = {"config": recipe["kind"]}
    if place.provider == "cuda":
        result["warmup"] = warmup(path, provider="tensorrt", shapes=shapes, tell=_tell)
        session = Session(path, provider="tensorrt", shapes=shapes)
    else:
        session = place.session(path, recipe)
    worst = 0.0
    for feeds, want in wanted:
        out = next(iter(session.run(feeds).values()))
        worst = max(worst, difference(_seen(feeds, out), _seen(feeds, want)))
    try:
        result["placement"] = str(session.placement())
    except OnnxpressError as e:
        result["placement"] = e.what
    return {**result, **_verdict("tensorrt-fp16", run=worst)}


def _tell(step: str) -> None:
    print(f"    {step}", file=sys.stderr, flush=True)
