"""What `press` makes for CUDA lies on CUDA, whole: the real provider says so, on the null GPU.

Models of the shapes that the project answers for, with random weights: captured once, lowered for
each precision, and all of them shown to one process.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxpress
import pytest
import torch
import transformers
from onnxpress import errors, exporter
from onnxpress.optimizers import TARGETS, pipeline
from onnxpress.optimizers.lower.fuse_group_query_attention import shared_caches
from onnxpress.optimizers.pipeline import Change
from onnxpress.optimizers.placeable import unplaced
from onnxpress.optimizers.precision.convert_floats import ConvertFloats
from onnxpress.optimizers.precision.quantize_dynamic import QuantizeDynamic
from onnxpress.press.record import target_of

from . import onnx_models
from .null_gpu import on_null_gpu

LAYERS = 2
SIZES = {"hidden_size": 128, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 192, "vocab_size": 40}
IMAGES = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"image_size": 12, "patch_size": 4}
LLAMA = SIZES | {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1}
T5 = {"d_model": 64, "d_kv": 64, "d_ff": 96, "num_layers": LAYERS, "num_heads": 2}
T5 |= {"vocab_size": 40, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
MODELS = {
    "bert": (transformers.BertModel, transformers.BertConfig(**SIZES)),
    "minilm": (
        transformers.BertModel,
        transformers.BertConfig(**SIZES | {"num_attention_heads": 4}),
    ),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig(**IMAGES)),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA)),
    "translate": (transformers.T5ForConditionalGeneration, transformers.T5Config(**T5)),
}
PRECISIONS = ("fp32", "fp16", "bf16")
CASES = list(itertools.product(MODELS, PRECISIONS))
CUDA = "CUDAExecutionProvider"


# Graphs -------------------------------------------------------------------------------------------


@functools.cache
def captured(name: str) -> tuple[ir.Model, str]:
    """The base graph of a model with random weights, and its task."""
    build, config = MODELS[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        build(config).save_pretrained(path)
        if name != "vit":
            (path / "tokenizer.json").write_text(onnx_models.tokenizer(template=False))
        return base_of(path)


def base_of(path: Path) -> tuple[ir.Model, str]:
    source = exporter.resolve(str(path))
    model = exporter.capture(source).model
    pipeline.run_passes(model, pipeline.raised())
    return model, source.task


def lowered(base: ir.Model, task: str, target: str, precision: str) -> ir.Model:
    """The graph as `press` writes it, where nothing overflows."""
    aim = target_of(target, task, precision)

    def make(*change: ir.passes.PassBase) -> ir.Model:
        model = base.clone()
        pipeline.run_passes(model, pipeline.lowered(aim, Change(lowered=change)))
        return model

    model = make()
    if precision != "fp32":
        caches = shared_caches(model)
        model = make(ConvertFloats(precision, half=caches))
        if lacking := {u.node for u in unplaced(model, aim)}:
            model = make(ConvertFloats(precision, half=caches, keep=lacking))
    return model


def ops(model: ir.Model) -> Counter[str]:
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes)


# The child ----------------------------------------------------------------------------------------

ASK = """
import json, os, sys, tempfile
from collections import Counter
from onnxpress import errors
from onnxpress.runtime import Session
from onnxpress.runtime.attention_kernels import parse
from onnxpress.runtime.measure import random_feeds

def heard(run):
    # what the provider prints of its kernels
    with tempfile.TemporaryFile() as file:
        before = os.dup(1)
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        try:
            run()
        finally:
            os.dup2(before, 1)
            os.close(before)
        file.seek(0)
        return dict(Counter(k.kernel for k in parse(file.read().decode())))

def launches():
    return open(os.environ["NULL_GPU_TRACE"]).read().count("cudaGraphLaunch")

def feed(session):
    names = {d for i in session.inputs for d in i.shape if isinstance(d, str)}
    sizes = {n: 2 if n == "batch" else 8 for n in names if n.isidentifier()}
    binding = session.bind()
    halves = [i for i in session.inputs if "bfloat16" in i.dtype]
    others = [i for i in session.inputs if i not in halves]
    feeds = random_feeds(others, sizes, high={i.name: 2 for i in others})
    for name, number in (("seqlens_k", 7), ("total_sequence_length", 8)):
        if name in feeds:
            feeds[name][:] = number
    for name, value in feeds.items():
        binding.input(name, value)
    for i in halves:
        shape = [sizes.get(d, d) for d in i.shape]
        binding.input(i.name, session.buffer(shape, "bfloat16"))
    return binding

def ask(path):
    session = Session(path, provider="cuda")
    placed = session.placement()
    found = {"counts": placed.counts, "memcpy": placed.memcpy,
             "ops": dict(Counter(n.op for n in placed.nodes)),
             "kernels": heard(feed(session).run)}
    binding = feed(Session(path, provider="cuda", cuda_graph=True))
    before = launches()
    heard(lambda: [binding.run() for _ in range(3)])
    return found | {"launches": launches() - before}

def refusal(path, **options):
    try:
        Session(path, provider="cuda", **options)
    except errors.OnnxpressError as e:
        return [type(e).__name__, str(e)]
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, Any]:
    """Of each model and precision, what the provider made of it."""
    folder = tmp_path_factory.mktemp("placement")
    graphs = {f"{n}.{p}": lowered(*captured(n), "cuda", p) for n, p in CASES}
    return told(graphs, folder)


def told(graphs: dict[str, ir.Model], folder: Path) -> dict[str, Any]:
    for name, model in graphs.items():
        ir.save(model, folder / f"{name}.onnx")
    found = asked(folder, [folder / f"{name}.onnx" for name in graphs])
    return {n: one | {"graph": ops(graphs[n])} for n, one in zip(graphs, found, strict=True)}


def asked(folder: Path, paths: list[Path]) -> list[dict[str, Any]]:
    return on_null_gpu(
        ASK + "print(json.dumps([ask(path) for path in sys.argv[1:]]))",
        *paths,
        env={
            "NULL_GPU_TRACE": str(folder / "trace"),
            "ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO": "1",
        },
    )


def whole(one: dict[str, Any]) -> None:
    """On CUDA to the last node, without copies, captured by the first run and replayed."""
    assert list(one["counts"]) == [CUDA]
    assert one["memcpy"] == 0
    assert one["launches"] >= 2


# What is placed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_every_node_is_on_cuda_and_is_captured(said, name, precision):
    whole(said[f"{name}.{precision}"])


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_the_kernel_table_says_the_same(name, precision):
    assert not unplaced(lowered(*captured(name), "cuda", precision), TARGETS["cuda"])


ATTENTION, GROUPED = "com.microsoft::Attention", "com.microsoft::GroupQueryAttention"
SKIP, GELU = "com.microsoft::SkipLayerNormalization", "com.microsoft::BiasGelu"
ENCODER = {SKIP: 2 * LAYERS + 1, GELU: LAYERS}
PLANNED = {  # of com.microsoft, all that there is; and Attention of ai.onnx
    "bert": {ATTENTION: LAYERS, **ENCODER},
    "minilm": {ATTENTION: LAYERS, **ENCODER},
    "vit": {ATTENTION: LAYERS, **ENCODER},
    "llama": {GROUPED: LAYERS},
    "translate": {"Attention": 3 * LAYERS},
}


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_what_is_fused_and_that_onnxruntime_fuses_no_more(said, name, precision):
    """What it finds to fuse is what we missed; what it takes out are views that do nothing."""
    one = said[f"{name}.{precision}"]
    graph, session = one["graph"], Counter(one["ops"])
    planned = PLANNED[name]
    if (name, precision) == ("llama", "fp32"):  # no kernel for grouped queries in float32
        planned = {"Attention": LAYERS}
    assert {o: n for o, n in graph.items() if "::" in o or o == "Attention"} == planned
    assert not session - graph, "ONNX Runtime fused"
    assert set(graph - session) <= {"Expand"}


KERNELS = {  # of the halves; in float32 there is no flash attention
    "bert": "CUDNN_FLASH_ATTENTION",
    "minilm": "CUDNN_FLASH_ATTENTION",
    "llama": "CUDNN_FLASH_ATTENTION",
    "vit": "CUDNN_FLASH_ATTENTION",  # transformers gives it a mask that is true throughout
    "translate": "EFFICIENT_ATTENTION",  # T5's bias is a mask of floats
}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_attention_kernel(said, name, precision):
    layers = PLANNED[name].values() if "::" not in "".join(PLANNED[name]) else [LAYERS]
    assert said[f"{name}.{precision}"]["kernels"] == {KERNELS[name]: next(iter(layers))}


def test_a_pressed_encoder(tmp_path):
    """The whole road: the gate judges it, and the session finds it as the tests above do."""
    build, config = MODELS["bert"]
    torch.manual_seed(0)
    build(config).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(onnx_models.tokenizer(template=False))
    manifest = onnxpress.press(
        str(tmp_path / "m"), tmp_path / "out", target="cuda", precision="fp16", measure=False
    )
    assert manifest.target["provider"] == "cuda"
    assert {o: manifest.ops[o] for o in PLANNED["bert"]} == PLANNED["bert"]
    (one,) = asked(tmp_path, [tmp_path / "out"])
    whole(one)
    assert one["kernels"] == {KERNELS["bert"]: LAYERS}


@pytest.mark.slow
def test_minilm_with_its_weights(minilm_source, tmp_path):
    base, task = base_of(minilm_source)
    assert task == "embed"
    graphs = {p: lowered(base, task, "cuda", p) for p in ("fp16", "bf16")}
    for one in told(graphs, tmp_path).values():
        whole(one)
        assert one["graph"][ATTENTION] == 6
        assert one["kernels"] == {"CUDNN_FLASH_ATTENTION": 6}


# What is refused ----------------------------------------------------------------------------------

GROUPED_F32 = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
g (float[b,s,32] q, float[b,s,16] k, float[b,s,16] v, float[b,2,c,8] pk, float[b,2,c,8] pv,
   int32[b] lengths, int32[1] total)
=> (float[b,s,32] y, float[b,2,c,8] nk, float[b,2,c,8] nv) {
    [grouped] y, nk, nv = com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>
        (q, k, v, pk, pv, lengths, total)
}"""


INTEGERS = """<ir_version: 10, opset_import: ["" : 23]>
g (float[n, 8] x) => (float[n, 8] y)
<float s = {0.5}, uint8 z = {128}, uint8[8, 1] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
    q = QuantizeLinear(x, s, z)
    [integers] p = QLinearMatMul(q, s, z, w, s, z, s, z)
    d = DequantizeLinear(p, s, z)
    y = Add(x, d)
}"""


def for_cpu(*change: ir.passes.PassBase) -> ir.Model:
    """BERT as it is lowered for the CPU: with branches where no token is padding."""
    base, task = captured("bert")
    model = base.clone()
    aim = target_of("cpu", task, "fp32")
    pipeline.run_passes(model, pipeline.lowered(aim, Change(base=change)))
    return model


def test_graphs_for_others_are_refused_by_name(tmp_path):
    graphs = {
        "grouped": ir.from_onnx_text(GROUPED_F32),
        "branches": for_cpu(),
        "dynamic": for_cpu(QuantizeDynamic()),
        "static": ir.from_onnx_text(INTEGERS),
    }
    for name, model in graphs.items():
        ir.save(model, tmp_path / f"{name}.onnx")
    found = on_null_gpu(
        ASK
        + """
folder, *names = sys.argv[1:]
files = [f"{folder}/{name}.onnx" for name in names]
print(json.dumps([[refusal(f), refusal(f, cuda_graph=True)] for f in files]))""",
        tmp_path,
        *graphs,
    )
    for both in found:
        assert [kind for kind, _ in both] == ["ProviderError"] * 2
        assert "press the model" in both[0][1]
        assert "cannot be captured as a CUDA graph" in both[1][1]
    plain, captures = (dict(zip(graphs, (b[i][1] for b in found), strict=True)) for i in (0, 1))
    assert "GroupQueryAttention 'grouped' (float32, int32), no kernel for it" in plain["grouped"]
    assert "QLinearMatMul 'integers' (float32, uint8), no kernel for it there" in plain["static"]
    assert (
        "DynamicQuantizeLinear 'node_DynamicQuantizeLinear_0' (float32, uint8)" in plain["dynamic"]
    )
    assert "com.microsoft::MatMulIntegerToFloat" in plain["dynamic"]
    assert "a computation on sizes" in plain["branches"]
    assert "2 nodes of control flow decide on the host what runs: If '" in captures["branches"]


def test_int8_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(errors.UsageError, match="the target cuda has no int8") as e:
        onnxpress.press(str(tmp_path), tmp_path / "out", target="cuda", precision="int8")
    assert "only add work around float MatMuls" in str(e.value)
