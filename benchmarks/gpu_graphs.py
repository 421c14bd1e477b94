"""Graphs for a machine with a GPU, made on one without: no weights in them, but where each is from.

    python benchmarks/gpu_proof.py graphs -o DIR

A model of 7 billion parameters cannot be carried, and need not be: its weights are random. So each
graph comes as `model.onnx`, whose weights are references into a file that is not there, and as
`recipe.json`, which says for each of them of which parameters of the PyTorch module it is made
(transposed, side by side, ...). gpu_weights.py draws the parameters there and writes the file; the
same parameters go to PyTorch.

What a weight is made of is found by its values: every parameter is random, so each weight that the
passes leave is compared with them. Models too large for that have a twin, the same module with
smaller sizes: the twin's values tell what each weight is made of, by name, and the real graph is
captured with weights that take no memory. The shapes of all must agree, or nothing is written.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxpress.exporter import capture
from onnxpress.exporter.source import Source
from onnxpress.exporter.wrappers import Pixels, Text
from onnxpress.models import decoder, encoder
from onnxpress.optimizers import TARGETS
from onnxpress.optimizers.lower.fuse_group_query_attention import shared_caches
from onnxpress.optimizers.pipeline import Change, lowered, raised, run_passes
from onnxpress.optimizers.precision.convert_floats import ConvertFloats
from onnxpress.press.record import kv_of, target_of
from torch import nn

DATA, ALIGNMENT = "model.onnx.data", 4096
HELD = 20_000  # elements; larger parameters take no memory where there is a twin

LLAMA_SMALL = decoder.DecoderConfig(
    vocab_size=4096, dim=512, n_layer=4, n_head=8, n_kv_head=2, head_dim=64, ffn_dim=1408,
    max_positions=2048,
)  # fmt: skip
LLAMA_1B = decoder.DecoderConfig(  # Llama 3.2, without its stretched positions
    vocab_size=128256, dim=2048, n_layer=16, n_head=32, n_kv_head=8, head_dim=64, ffn_dim=8192,
    max_positions=4096, rope_theta=500000.0, tie_embeddings=True,
)  # fmt: skip
BERT_LARGE = encoder.EncoderConfig(vocab_size=30522, dim=1024, n_layer=24, n_head=16, ffn_dim=4096)
_NAMES = ("of", "plus", "through")  # of a part: names of parameters
_KEY_BIAS = re.compile(r"\.k(ey|_proj)\.bias$")  # it moves all scores of a row alike: no effect
EVERY = ("cpu-fp32", "cuda-fp32", "cuda-fp16", "cuda-bf16", "tensorrt-fp16")


@dataclass(frozen=True)
class Plan:
    """One model: its kind, its configuration, the graphs wanted, and its twin."""

    kind: str
    config: Any
    variants: tuple[str, ...] = EVERY
    twin: Any = None


def plans(*, tiny: bool = False) -> dict[str, Plan]:
    """The models by name; `tiny` has one of each kind of step, at sizes for a rehearsal."""
    if tiny:
        bert = replace(encoder.SIZES["tiny"], n_layer=1)
        llama = replace(decoder.SIZES["tiny"], n_layer=1, max_positions=128)
        return {
            "minilm": Plan("encoder", bert, EVERY[:3]),
            "llama-small": Plan("decoder", llama),
            "llama-1b": Plan("decoder", replace(llama, dim=128, ffn_dim=192, tie_embeddings=True),
                             ("cuda-fp16",), twin=replace(llama, tie_embeddings=True)),
        }  # fmt: skip
    seven = decoder.SIZES["7b"]
    return {
        "minilm": Plan("encoder", encoder.SIZES["minilm"]),
        "bert-base": Plan("encoder", encoder.SIZES["base"]),
        "bert-large": Plan(
            "encoder", BERT_LARGE, ("cuda-fp16",),
            replace(BERT_LARGE, dim=256, ffn_dim=512, vocab_size=1000),
        ),
        "vit": Plan("vit", {}),
        "t5": Plan("t5", {"feed_forward_proj": "gated-gelu"}),
        "llama-small": Plan("decoder", LLAMA_SMALL),
        "llama-1b": Plan(
            "decoder", LLAMA_1B, ("cuda-fp16",),
            replace(LLAMA_1B, dim=256, head_dim=8, ffn_dim=512, vocab_size=1000),
        ),
        "llama-7b": Plan(
            "decoder", seven, ("cuda-fp16",),
            replace(seven, dim=256, head_dim=8, ffn_dim=688, vocab_size=1000),
        ),
    }  # fmt: skip


# Modules ------------------------------------------------------------------------------------------


def source(kind: str, config: Any, *, held: bool) -> Source:
    """The module with random parameters and what it is traced with; `held`: all in memory."""
    text = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    dims: dict[str, tuple[str | None, ...]] = dict.fromkeys(text, ("batch", "sequence"))
    kv = None
    with torch.device("cpu" if held else "meta"):
        if kind == "encoder":
            module, task = encoder.Encoder(config), "embed"
        elif kind == "decoder":
            module, task = decoder.Decoder(config), "generate"
        elif kind == "vit":
            from transformers import ViTConfig, ViTModel

            options = {"attn_implementation": "sdpa", **config}
            module, task = (
                Pixels(ViTModel(ViTConfig(**options), add_pooling_layer=False)),
                "tensors",
            )
        else:
            from transformers import T5Config, T5EncoderModel

            module, task = Text(T5EncoderModel(T5Config(**config)), "embed"), "embed"
    if kind == "encoder":
        example = encoder.example(config)
    elif kind == "decoder":
        example = decoder.example(config)
        dims["attention_mask"] = ("batch", "past_sequence + sequence")
        for i in range(config.n_layer):
            for part in ("key", "value"):
                dims[f"past_key_values.{i}.{part}"] = ("batch", None, "past_sequence", None)
        kv = {
            "layers": config.n_layer, "kv_heads": config.n_kv_head, "head_dim": config.head_dim,
            "dtype": "float32", "past": "past_key_values.{layer}.{part}",
            "present": "present.{layer}.{part}",
        }  # fmt: skip
    elif kind == "vit":
        size = module.model.config.image_size
        example = {"pixel_values": torch.randn(2, 3, size, size)}
        dims["pixel_values"] = ("batch", None, None, None)
    else:
        example = encoder.example(encoder.SIZES["tiny"])
        del example["token_type_ids"]
    randomize(module, held=held)
    return Source(kind, "model", task, module.eval(), kwargs=example, dims=dims, kv=kv)


def randomize(module: nn.Module, *, held: bool) -> None:
    """Give every parameter values of its own; large ones that are not held repeat one number."""
    generator = torch.Generator().manual_seed(0)
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for part in module.modules():
        for name, old in list(part._parameters.items()):
            if old is None:
                continue
            if old not in made:
                whole = held or old.numel() <= HELD
                shape = old.shape if whole else ()
                value = torch.randn(shape, generator=generator) * 0.05
                made[old] = nn.Parameter(value.expand(old.shape), requires_grad=False)
            part._parameters[name] = made[old]


# What each weight is made of ----------------------------------------------------------------------


def trace(model: ir.Model, parameters: dict[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """The weights that are made of parameters: the parts of each, side by side on its last axis.

    A part is {"of": name, "transposed": bool, "row": int or None}, {"zeros": "the rest"}, or a sum
    {"of": bias, "plus": bias, "through": matrix}: a bias that went through a projection.

    Raises:
        SystemExit: A large weight is made of them in none of these ways.
    """
    ways = list(_ways(parameters))
    found = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype.is_integer() or tensor.size < 2:
            continue
        parts = _parts(tensor.numpy(), ways, parameters)
        if parts is not None:
            found[str(value.name)] = parts
    return found


def _ways(parameters: dict[str, np.ndarray]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    for name, array in parameters.items():
        yield {"of": name, "transposed": False, "row": None}, array
        if array.ndim == 2:
            yield {"of": name, "transposed": True, "row": None}, array.T
            if len(array) <= 8:  # types of tokens
                for row in range(len(array)):
                    yield {"of": name, "transposed": False, "row": row}, array[row]
        elif array.ndim > 2:
            yield {"of": name, "transposed": False, "row": None}, array.reshape(-1, array.shape[-1])


def _parts(
    wanted: np.ndarray, ways: list[tuple[dict[str, Any], np.ndarray]], parameters: Any
) -> list[dict[str, Any]] | None:
    exact = wanted.dtype
    at, parts = 0, []
    while at < wanted.shape[-1]:
        for way, array in ways:
            end = at + array.shape[-1]
            if array.shape[:-1] != wanted.shape[:-1] or end > wanted.shape[-1]:
                continue
            # One line first: most differ there.
            line = (0,) * (array.ndim - 1)
            if np.array_equal(array[line].astype(exact), wanted[line][at:end]) and np.array_equal(
                array.astype(exact), wanted[..., at:end]
            ):
                parts.append(way)
                at = end
                break
        else:
            part = _through(wanted, parameters) if at == 0 else None
            if part is None and parts and not wanted[..., at:].any():
                part = {"zeros": "the rest"}
            if part is None and at < wanted.shape[-1] and not parts:
                return None
            if part is None:
                raise SystemExit(
                    f"a weight begins with {parts}, and goes on with what nobody knows"
                )
            parts.append(part)
            at = wanted.shape[-1]
    return parts


def _through(wanted: np.ndarray, parameters: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """out.bias + out.weight @ value.bias: attention's weights add up to 1."""
    if wanted.ndim != 1:
        return None
    for name, bias in parameters.items():
        if bias.shape != wanted.shape or not name.endswith(".bias"):
            continue
        matrix = parameters.get(name.removesuffix("bias") + "weight")
        if matrix is None or matrix.ndim != 2:
            continue
        # Of this attention's biases: the prefix up to the projection is theirs too.
        prefix = name.rsplit(".", 2)[0].removesuffix(".output")
        for other, plus in parameters.items():
            if plus.ndim == 1 and len(plus) == matrix.shape[1] and other.startswith(prefix):
                made = bias + matrix @ plus
                if np.allclose(made, wanted.astype(np.float32), rtol=4e-3, atol=1e-4):
                    return {"of": name, "plus": other, "through": name[:-4] + "weight"}
    return None


# Graphs -------------------------------------------------------------------------------------------


def base_graph(given: Source) -> ir.Model:
    """The base graph; weights of one number, repeated, are not computed until they are read."""
    model = capture(given).model
    for value in model.graph.initializers.values():
        old = value.const_value
        assert old is not None
        if old.size > HELD and 0 in (array := old.numpy()).strides:
            value.const_value = ir.LazyTensor(
                partial(_repeated, array), dtype=old.dtype, shape=ir.Shape(array.shape),
                name=str(value.name),
            )  # fmt: skip
    run_passes(model, raised())
    return model


def _repeated(array: np.ndarray) -> ir.Tensor:
    return ir.Tensor(array)


def variant(base: ir.Model, name: str, task: str, *, convert: bool) -> ir.Model:
    """The graph of one target and precision, as `press` lowers it.

    Args:
        base: The base graph.
        name: "cuda-fp16", ...
        task: The task, which says where padding is.
        convert: False leaves the types at float32, which is how the CPU can rehearse it.
    """
    target_name, precision = name.split("-")
    target = target_of(target_name, task, precision)
    passes: list[ir.passes.PassBase] = []
    if precision != "fp32" and convert:
        probe = base.clone()
        run_passes(probe, lowered(replace(target, skips_empty_masks=False)))
        passes = [ConvertFloats(precision, half=shared_caches(probe))]
    model = base.clone()
    run_passes(model, lowered(target, Change(lowered=passes)))
    return model


def build(
    out: Path, *, tiny: bool = False, convert: bool = True, only: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Write every graph to OUT/model/variant; a row about each."""
    rows = []
    for name, plan in plans(tiny=tiny).items():
        if only and name not in only:
            continue
        small = real = source(plan.kind, plan.twin or plan.config, held=True)
        known = base = base_graph(small)
        if plan.twin:
            real = source(plan.kind, plan.config, held=False)
            base = base_graph(real)
        for which in plan.variants:
            rows.append(_write(out / name / which, plan, which, small, known, real, base, convert))
            print(json.dumps({"model": name, "graph": which, **rows[-1]}), flush=True)
        torch._dynamo.reset()
    return rows


def _write(
    folder: Path,
    plan: Plan,
    which: str,
    small: Source,
    known: ir.Model,
    real: Source,
    base: ir.Model,
    convert: bool,
) -> dict[str, Any]:
    assert small.module is not None
    assert real.module is not None
    values = {n: p.detach().numpy() for n, p in small.module.named_parameters()}
    shapes = {n: list(p.shape) for n, p in real.module.named_parameters()}
    parts = trace(variant(known, which, small.task, convert=convert), values)
    model = variant(base, which, real.task, convert=convert)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    weights, at = [], 0
    for value in model.graph.initializers.values():
        old = value.const_value
        assert old is not None
        made = parts.pop(str(value.name), None)
        if made is None:
            if isinstance(old, ir.ExternalTensor | ir.LazyTensor):
                raise SystemExit(f"{folder}: {value.name} is made of nothing that the twin has")
            continue
        shape = list(old.shape.numpy())
        if predicted(made, shapes, shape) not in (shape, [math.prod(shape[:-1]), shape[-1]]):
            raise SystemExit(
                f"{folder}: {value.name} is {shape}, {predicted(made, shapes)} by parts"
            )
        weights.append({"name": value.name, "dtype": old.dtype.name.lower(), "shape": shape,
                        "offset": at, "parts": made})  # fmt: skip
        value.const_value = ir.ExternalTensor(
            DATA, at, old.nbytes, old.dtype, shape=old.shape, name=str(value.name),
            base_dir=str(folder),
        )  # fmt: skip
        at += -(-old.nbytes // ALIGNMENT) * ALIGNMENT
    if parts:
        raise SystemExit(
            f"{folder}: the twin has weights that the graph has not: {list(parts)[:5]}"
        )
    model.ir_version = 10
    ir.save(model, folder / "model.onnx")
    config = plan.config if isinstance(plan.config, dict) else asdict(plan.config)
    target = TARGETS[which.split("-")[0]]
    recipe = {
        "kind": plan.kind, "config": config, "kv": kv_of(real.kv, model), "bytes": at,
        "parameters": shapes,
        "disabled_optimizers": list(target.disabled_optimizers), "weights": weights,
    }  # fmt: skip
    (folder / "recipe.json").write_text(json.dumps(recipe, separators=(",", ":")))
    return {
        "nodes": sum(1 for _ in model.graph.all_nodes()),
        "graph_kb": sum(p.stat().st_size for p in folder.iterdir()) // 1024,
        "weights_mb": at >> 20,
        "parameters_m": round(sum(map(math.prod, shapes.values())) / 1e6, 1),
        "constants": [v.name for v in model.graph.initializers.values() if _is_large(v)],
    }


def _is_large(value: ir.Value) -> bool:
    """Whether a weight stays in the graph that is worth a look: a table of angles, no size."""
    tensor = value.const_value
    return not isinstance(tensor, ir.ExternalTensor) and tensor is not None and tensor.size > 16


def predicted(
    parts: list[dict[str, Any]], shapes: dict[str, list[int]], wanted: list[int]
) -> list[int]:
    """The shape that the parts make side by side."""
    width, rest = 0, []
    for part in parts:
        if "zeros" in part:
            return wanted
        shape = shapes[part["of"]]
        shape = shape[1:] if part.get("row") is not None else shape
        shape = shape[::-1] if part.get("transposed") else shape
        width, rest = width + shape[-1], shape[:-1]
    return [*rest, width]
