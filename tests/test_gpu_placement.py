"""Graphs for CUDA under the null GPU."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from pathlib import Path

import onnx_ir as ir
import torch
import transformers
from onnxpress import exporter
from onnxpress.optimizers import pipeline
from onnxpress.optimizers.lower.fuse_group_query_attention import shared_caches
from onnxpress.optimizers.pipeline import Change
from onnxpress.optimizers.precision.convert_floats import ConvertFloats
from onnxpress.press.record import target_of

from . import onnx_models

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 192, "vocab_size": 40}
IMAGES = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"image_size": 12, "patch_size": 4}
LLAMA = SIZES | {"num_attention_heads": 4, "hidden_size": 256, "num_key_value_heads": 1}
T5 = {"d_model": 64, "d_kv": 64, "d_ff": 96, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
MODELS = {
    "bert": (transformers.BertModel, transformers.BertConfig(**SIZES)),
    "minilm": (
        transformers.BertModel,
        transformers.BertConfig(**SIZES | {"num_attention_heads": 4}),
    ),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(**IMAGES)),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA)),
    "t5": (transformers.T5EncoderModel, transformers.T5Config(**T5)),
    "translate": (transformers.T5ForConditionalGeneration, transformers.T5Config(**T5)),
}


@functools.cache
def captured(name: str) -> tuple[ir.Model, str]:
    """The base graph of a model with random weights, and its task."""
    build, config = MODELS[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        build(config).save_pretrained(path)
        if name not in ("vit", "t5"):
            (path / "tokenizer.json").write_text(onnx_models.tokenizer(template=False))
        source = exporter.resolve(str(path))
        model = exporter.capture(source).model
    pipeline.run_passes(model, pipeline.raised())
    return model, source.task


def lowered(name: str, target: str, precision: str) -> ir.Model:
    """The graph as `press` makes it."""
    base, task = captured(name)
    aim = target_of(target, task, precision)
    change = Change()
    if precision in ("fp16", "bf16"):
        probe = base.clone()
        pipeline.run_passes(probe, pipeline.lowered(aim))
        change = Change(lowered=[ConvertFloats(precision, half=shared_caches(probe))])
    model = base.clone()
    pipeline.run_passes(model, pipeline.lowered(aim, change))
    return model


def ops(model: ir.Model) -> Counter[str]:
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes)
