"""Graphs for TensorRT, which picks importers by op type: plain ai.onnx, typed to the last value.

The same models as in test_gpu_placement.py. No TensorRT is asked: the table of its importers is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import pytest
from onnxpress import exporter
from onnxpress.optimizers import TARGETS, pipeline
from onnxpress.optimizers.pipeline import Change
from onnxpress.optimizers.placeable import unplaced
from onnxpress.optimizers.precision.learn_int8 import Int8, learn
from onnxpress.optimizers.precision.quantize_static import Scheme
from onnxpress.optimizers.precision.split_gemm import SplitGemm
from onnxpress.press.common import graph_signature
from onnxpress.press.record import target_of
from onnxpress.runtime.measure import random_feeds

from . import int8_models
from .test_gpu_placement import LAYERS, captured, lowered, ops

NAMES = ("bert", "vit", "llama", "translate", "encoder-tiny")
HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
CASES = list(itertools.product(NAMES, ("fp32", *HALVES, "int8")))
ATTENTIONS = {"translate": 3 * LAYERS}  # of all others, one a layer


@functools.cache
def base(name: str) -> tuple[ir.Model, str]:
    if name != "encoder-tiny":
        return captured(name)
    source = exporter.resolve(name)
    model = exporter.capture(source).model
    pipeline.run_passes(model, pipeline.raised())
    return model, source.task


def on_cpu(model: ir.Model, feeds: Iterable[int8_models.Feeds]) -> Iterator[int8_models.Feeds]:
    """Runs a base graph, as calibration does."""
    shown = model.clone()
    cpu = replace(TARGETS["cpu"], skips_empty_masks=False)
    pipeline.run_passes(shown, pipeline.lower(cpu))
    yield from int8_models.run(shown, feeds)


@functools.cache
def made(name: str, precision: str) -> ir.Model:
    """The graph as `press --target tensorrt` writes it."""
    model, task = base(name)
    if precision != "int8":
        return lowered(model, task, "tensorrt", precision)
    model = model.clone()
    SplitGemm()(model)
    common.NameFixPass()(model)
    inputs, _ = graph_signature(model)
    symbols = {d for i in inputs for d in i.shape if isinstance(d, str) and d.isidentifier()}
    high = {i.name: 2 for i in inputs}
    data = [random_feeds(inputs, dict.fromkeys(symbols, n), high=high) for n in (3, 5)]
    learned = learn(model, Int8(Scheme("int8")), on_cpu, lambda: data)
    aim = target_of("tensorrt", task, "int8")
    pipeline.run_passes(model, pipeline.lowered(aim, Change(base=learned.passes())))
    return model


def values(model: ir.Model) -> Iterator[ir.Value]:
    yield from (*model.graph.inputs, *model.graph.initializers.values())
    for node in model.graph:
        yield from node.outputs


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_it_is_plain_onnx_and_typed(name, precision):
    model = made(name, precision)
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    assert {n.domain for n in nodes} <= {"", "ai.onnx"}
    assert set(model.opset_imports) == {""}
    assert model.opset_imports[""] <= 23
    assert not model.functions
    assert not ops(model).keys() & {"If", "Loop", "Scan"}
    for value in values(model):
        assert value.dtype is not None, value
        assert value.shape is not None, value
    assert unplaced(model, TARGETS["tensorrt"]) == []
    common.CheckerPass(full_check=True)(model)


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_attention_is_one_op_with_one_output(name, precision):
    found = [n for n in made(name, precision).graph if n.op_type == "Attention"]
    assert len(found) == ATTENTIONS.get(name, LAYERS)
    for node in found:
        assert len(node.outputs) == 1, node
        assert node.inputs[0].dtype == HALVES.get(precision, ir.DataType.FLOAT)
        # The cache is outside of it.
        assert not any(node.inputs[4:])


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_layers_are_of_the_type_in_the_graph(name, precision):
    """TensorRT is strongly typed: what says float32 stays float32."""
    layers = [n for n in made(name, precision).graph if n.op_type in ("MatMul", "Gemm", "Conv")]
    assert layers
    assert {n.outputs[0].dtype for n in layers} == {HALVES[precision]}


@pytest.mark.parametrize("name", NAMES)
def test_int8_is_symmetric(name):
    model = made(name, "int8")
    nodes = [n for n in model.graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert sum(n.op_type == "QuantizeLinear" for n in nodes) >= LAYERS
    for node in nodes:
        _, scale, *zero = node.inputs
        assert scale.const_value is not None, "a scale that is computed"
        assert (scale.const_value.numpy() > 0).all()
        integers = (node.outputs if node.op_type == "QuantizeLinear" else node.inputs)[0]
        assert integers.dtype == ir.DataType.INT8
        assert not any(np.any(z.const_value.numpy()) for z in zero)
    weights = [n.inputs[0] for n in nodes if n.op_type == "DequantizeLinear"]
    assert any(w.const_value is not None and w.dtype == ir.DataType.INT8 for w in weights)


def test_the_table_says_what_is_in_the_way():
    """The graph for CUDA is none for TensorRT, and each op of com.microsoft is named."""
    lost = unplaced(lowered(*captured("bert"), "cuda", "fp16"), TARGETS["tensorrt"])
    assert {one.op for one in lost} == {
        "com.microsoft::Attention",
        "com.microsoft::BiasGelu",
        "com.microsoft::SkipLayerNormalization",
    }
    assert all("press it for tensorrt" in one.fix for one in lost)
