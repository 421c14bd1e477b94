"""Tables of kernels: what they say of a node, and whether ONNX Runtime says the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx_ir as ir
import onnxpress
import onnxruntime as ort
import pytest
from onnxpress.errors import UsageError
from onnxpress.optimizers import TARGETS, optimize
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.kernels import TABLES, Importers, Kernels, kernels
from onnxpress.optimizers.placeable import SIZES_ON_CPU, unplaced

from .null_gpu import on_null_gpu

TABLE_FILES = Path(onnxpress.__file__).parent / "optimizers" / "kernels"
CUDA, TENSORRT = TARGETS["cuda"], TARGETS["tensorrt"]
GROUPED = """com.microsoft.GroupQueryAttention<num_heads = 4, kv_num_heads = 2>
    (q, k, v, pk, pv, lengths, total)"""
OPEN = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'


def graph(text: str, opset: int = 23) -> ir.Model:
    model = ir.from_onnx_text(f"{OPEN.replace('23', str(opset))}\ng {text}")
    InferShapes()(model)
    for i, node in enumerate(model.graph.all_nodes()):
        node.name = node.name or f"{node.op_type}_{i}"
    return model


def grouped(dtype: str) -> ir.Model:
    return graph(f"""({dtype}[b,s,32] q, {dtype}[b,s,16] k, {dtype}[b,s,16] v,
        {dtype}[b,2,c,8] pk, {dtype}[b,2,c,8] pv, int32[b] lengths, int32[1] total)
        => ({dtype}[b,s,32] y, {dtype}[b,2,c,8] nk, {dtype}[b,2,c,8] nv) {{
            y, nk, nv = {GROUPED}
        }}""")


def layer(dtype: str) -> ir.Model:
    """MatMul, Add, LayerNormalization, and Attention of four dimensions."""
    return graph(f"""({dtype}[b,4,s,8] x, {dtype}[8,8] w, {dtype}[8] g, bool[b,1,s,s] m)
        => ({dtype}[b,4,s,8] y) {{
            a = MatMul(x, w)  c = Add(a, x)  n = LayerNormalization(c, g)
            y = Attention(n, n, n, m)
        }}""")


def refusals(model: ir.Model, name: str = "cuda") -> list[str | None]:
    opset = model.opset_imports[""]
    return [kernels(name).refusal(node, opset) for node in model.graph]


# Planted tables ----------------------------------------------------------------------------------

PLANTED = {
    "source": "planted 1.0",
    "host": {"Reshape": [[1], []], "Shape": [[], [0]]},
    "decomposed": {"Mish": ["float32"]},
    "signatures": {"com.microsoft::Own": {"since": 1, "inputs": ["T", "M*"], "outputs": ["T"]}},
    "ops": {
        "Add": [
            {"since": [7, 13], "types": {"T": ["float64"]}},
            {"since": [14, None], "types": {"T": ["float32"]}},
        ],
        "Cast": [{"since": [19, 22], "types": {"T1": ["float32"], "T2": ["float16"]}}],
        "Reshape": [{"since": [21, 23], "types": {"T": ["float32"], "shape": ["int64"]}}],
        "Relu": [{"since": [13, None], "types": {"T": ["float32"]}}],
        "Where": [
            {"since": [16, None], "types": {"T": ["float32"]}},
            {"since": [16, None], "types": {"B": ["bool"], "T": ["float16"]}},
        ],
        "com.microsoft::Own": [
            {"since": [1, None], "types": {"T": ["float16"], "M": ["int8"]}},
            {"since": [1, None], "types": {"T": ["float32"], "M": ["int32"]}},
        ],
    },
}


@pytest.mark.parametrize(
    ("text", "opset", "said"),
    [
        ("(float[n] x) => (float[n] y) { y = Add(x, x) }", 23, None),
        # The kernel of version 14 has no end: it is for the op of 14 alone, which opset 13 lacks.
        (
            "(float[n] x) => (float[n] y) { y = Add(x, x) }",
            13,
            "no kernel for float32 (T: float64)",
        ),
        (
            "(float16[n] x) => (float16[n] y) { y = Add(x, x) }",
            23,
            "no kernel for float16 (T: float32)",
        ),
        ("(float[n] x) => (float16[n] y) { y = Cast<to = 10>(x) }", 21, None),
        (
            "(float[n] x) => (float16[n] y) { y = Cast<to = 10>(x) }",
            23,
            "no kernel for version 23 of it (there is 19 to 22)",
        ),
        (
            "(float[n] x) => (double[n] y) { y = Cast<to = 11>(x) }",
            21,
            "no kernel for float64 (T2: float16)",
        ),
        ("(float[n] x, int64[2] s) => (float[a,b] y) { y = Reshape(x, s) }", 23, None),
        ("(float[n] x) => (float[n] y) { y = Neg(x) }", 23, "no kernel"),
        (
            "(float[n] x) => (float[n] y) { y = Relu(x) }",
            23,
            "no kernel for version 14 of it (there is 13)",
        ),
        ("(float[n] x) => (float[n] y) { y = Mish(x) }", 23, None),
        ("(double[n] x) => (double[n] y) { y = Mish(x) }", 23, "no kernel"),
        (
            "(float16[n] x, int8[n] a, int8[n] b) => (float16[n] y) "
            "{ y = com.microsoft.Own(x, a, b) }",
            23,
            None,
        ),
        (
            "(float16[n] x, int32[n] a) => (float16[n] y) { y = com.microsoft.Own(x, a) }",
            23,
            "no kernel for this mixture of types (T: float16, M: int32)",
        ),
        ("(float[n] x) => (float[n] y) { y = com.microsoft.Foreign(x) }", 23, "no kernel"),
    ],
)
def test_a_table_is_read_as_onnxruntime_reads_its_registry(text, opset, said):
    model = graph(text, opset)
    assert Kernels("cuda", PLANTED).refusal(next(iter(model.graph)), opset) == said


def test_what_has_a_precision():
    table = Kernels("cuda", PLANTED)
    assert table.has("Add", "fp32")
    assert not table.has("Add", "fp16")
    assert table.has("com.microsoft::Own", "fp16")
    assert not table.has("Neg", "fp32")
    assert table.sizes_on_host
    assert not Kernels("cpu", {"source": "", "ops": {}}).sizes_on_host


# The checked-in tables ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_each_table_says_what_it_describes(name):
    table = kernels(name)
    assert table.source
    assert any(character.isdigit() for character in table.source)
    assert table.has("MatMul", "fp32")
    assert isinstance(table, Importers) == (name == "tensorrt")


def test_a_table_that_there_is_not():
    with pytest.raises(UsageError, match="no table of the kernels of qnn") as told:
        kernels("qnn")
    assert "cuda" in str(told.value)


def test_the_cpu_table_is_the_registry_of_this_wheel():
    from onnxruntime.capi import _pybind_state as binding

    content = json.loads((TABLE_FILES / "cpu.json").read_text())
    if content["source"] != f"onnxruntime {ort.__version__}":
        pytest.skip(f"cpu.json describes {content['source']}, this is {ort.__version__}")
    ours = {(op, *row["since"]) for op, rows in content["ops"].items() for row in rows}
    theirs = set()
    for kernel in binding.get_all_opkernel_def():
        first, last = kernel.version_range
        op = f"{kernel.domain}::{kernel.op_name}" if kernel.domain else kernel.op_name
        if kernel.provider == "CPUExecutionProvider" and "nchwc" not in op:
            theirs.add((op, first, None if last == 2**31 - 1 else last))
    assert ours <= theirs
    # ONNX Runtime writes these two for itself, after it has placed a graph.
    assert {op for op, _, _ in theirs - ours} == {"MemcpyFromHost", "MemcpyToHost"}


def test_grouped_query_attention_on_cuda_is_for_halves_only():
    assert refusals(grouped("float16")) == refusals(grouped("bfloat16")) == [None]
    (lost,) = unplaced(grouped("float"), CUDA)
    assert str(lost) == (
        "GroupQueryAttention 'GroupQueryAttention_0': CUDA has no kernel for float32 "
        "(T: bfloat16, float16); press with --precision fp16 or bf16"
    )
    assert lost.dtypes == ("float32", "int32")
    assert refusals(grouped("float"), "cpu") == [None]
    op = "com.microsoft::GroupQueryAttention"
    assert [kernels("cuda").has(op, p) for p in ("fp32", "fp16", "bf16")] == [False, True, True]
    assert [kernels("cpu").has(op, p) for p in ("fp32", "fp16", "bf16")] == [True, True, False]


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_an_encoder_layer_is_taken(name, dtype):
    assert unplaced(layer(dtype), TARGETS[name]) == []


def test_a_provider_without_a_table_has_nothing_to_say():
    assert unplaced(grouped("float"), dataclasses.replace(CUDA, name="qnn")) == []


@pytest.mark.parametrize(
    ("text", "why", "fix"),
    [
        ("(string[n] x) => (string[n] y) { y = StringNormalizer(x) }", "no kernel", "tokenizer"),
        ("(double[n,n] x) => (double[n,n] y) { y = Gelu(x) }", None, None),
        (
            "(double[1,1,n,n] x) => (double[1,1,n,n] y) { y = Attention(x, x, x) }",
            "float64",
            "make the model float32",
        ),
        (
            "(float[n] x) => (uint8[n] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }",
            "no kernel",
            "int8 for a target",
        ),
        (
            "(uint8[n,n] x, uint8[n,n] w) => (int32[n,n] y) { y = MatMulInteger(x, w) }",
            "uint8 (T1: int8)",
            "integer kernels",
        ),
        (
            "(bfloat16[n] x, bfloat16 s, int8 z) => (int8[n] y) { y = QuantizeLinear(x, s, z) }",
            "bfloat16",
            "fp32 or fp16",
        ),
    ],
)
def test_cuda_says_what_to_do(text, why, fix):
    lost = unplaced(graph(text), CUDA)
    if why is None:
        assert lost == []
    else:
        assert [why in one.why and fix in one.fix for one in lost] == [True], lost


@pytest.mark.parametrize(
    ("text", "why", "fix"),
    [
        (
            "(float[n,8] x, float[8] b) => (float[n,8] y) { y = com.microsoft.BiasGelu(x, b) }",
            "ops of com.microsoft",
            "ops of another provider",
        ),
        (
            "(float[b,4,s,8] x, float[b,4,t,8] p) => (float[b,4,s,8] y) "
            "{ y, k, v = Attention(x, x, x, , p, p) }",
            "past_key",
            "the cache is outside",
        ),
        (
            "(float[b,4,s,8] x) => (float[b,4,s,8] y, float[b,4,s,8] k) "
            "{ y, k, v = Attention(x, x, x) }",
            "1 output alone, and this has 3",
            "the cache is outside",
        ),
        (
            "(float[b,4,s,8] x) => (float[b,4,s,8] y) { y = Attention<softcap = 5.0>(x, x, x) }",
            "softcap = 0.0, not 5.0",
            "one output",
        ),
        (
            "(float[n] x, float s, uint8 z) => (uint8[n] y) { y = QuantizeLinear(x, s, z) }",
            "writes uint8",
            "symmetric int8",
        ),
        (
            "(int8[n] x, float s, int8 z) => (float[n] y) { y = DequantizeLinear(x, s, z) }",
            "x_zero_point to be zero",
            "symmetric int8",
        ),
        (
            "(float[n] x) => (uint8[n] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }",
            "no importer",
            "symmetric int8",
        ),
        (
            "(float[n,m] x, int64[1] a) => (float[n] y) { y = ReduceSum<keepdims = 0>(x, a) }",
            "axes constant",
            "allow fallback",
        ),
        (
            "(int16[n] x) => (int16[n] y) { y = Identity(x) }",
            "no tensors of int16",
            "allow fallback",
        ),
        ("(string[n] x) => (string[n] y) { y = Identity(x) }", "no tensors of string", "tokenizer"),
        (
            "(float[n] x, int64[k] s) => (float[] y) { t = Reshape(x, s)  y = Relu(t) }",
            "shape is unknown",
            "types and shapes",
        ),
    ],
)
def test_tensorrt_says_what_to_do(text, why, fix):
    lost = unplaced(graph(text), TENSORRT)
    assert lost
    assert all(why in one.why and fix in one.fix for one in lost), lost


def test_tensorrt_takes_attention_of_three_dimensions():
    text = """(float[b,s,32] x) => (float[b,s,32] y) {
        y = Attention<q_num_heads = 4, kv_num_heads = 4>(x, x, x) }"""
    assert unplaced(graph(text), TENSORRT) == []
    (lost,) = unplaced(graph("""(float[b,s,8] x, float[8] w) => (float[b,s,8] y, float[b,s,1] m) {
        y, m = LayerNormalization(x, w) }"""), TENSORRT)  # fmt: skip
    assert lost.why == "TensorRT has no importer that writes Mean"


def test_tensorrt_takes_symmetric_quantization_and_no_newer_opset():
    text = """(float[n,8] x) => (float[n,8] y) <float s = {0.5}, int8 z = {0}> {
        q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, s, z) }"""
    assert unplaced(graph(text), TENSORRT) == unplaced(graph(text, 19), TENSORRT) == []
    (lost,) = unplaced(graph("(float[n] x) => (float[n] y) { y = Relu(x) }", 25), TENSORRT)
    assert lost.why == "TensorRT has importers for opset 9 to 24, not for 25"


# What is moved to the CPU ------------------------------------------------------------------------

MOVED = """(float[b,s,8] x, float[n] g) => (float[b,r] y, float[3] h, float[n] f) <
    int64[1] rest = {-1}, int64 zero = {0}, float[3] scale = {1.0, 2.0, 3.0}> {
        all = Shape(x)
        b = Gather(all, zero)
        first = Reshape(b, rest)
        t = Concat<axis = 0>(first, rest)
        y = Reshape(x, t)
        d = Size(g)
        e = Cast<to = 1>(d)
        h = Mul(scale, e)
        c = Cast<to = 10>(d)
        i = Mul(c, c)
        j = Cast<to = 1>(i)
        k = Mul(g, j)
        l = ReduceProd<keepdims = 0>(all)
        m = Add(l, l)
        o = Cast<to = 1>(m)
        f = Mul(k, o)
    }"""
BRANCH = """(float[b,s] x, bool c) => (float[] y) {
        y = If (c) <
            then_branch = t () => (float[] yt) {
                n = Shape(x)  m = Add(n, n)  yt = Tile(x, m)
            },
            else_branch = e () => (float[] ye) { ye = Det(x) }
        >
    }"""


def test_sizes_are_computed_on_the_cpu():
    lost = unplaced(graph(MOVED), CUDA)
    assert {one.node: one.why for one in lost if one.why != SIZES_ON_CPU} == {
        "ReduceProd_12": "CUDA has no kernel for int64 (T: float16, float32, float64, int32)"
    }
    # Not Mul_9, Cast_10 and Mul_11: what reads half precision is never moved.
    moved = ["Concat_3", "Cast_6", "Mul_7", "Cast_8", "ReduceProd_12", "Add_13", "Cast_14"]
    assert [one.node for one in lost] == ["Gather_1", "Reshape_2", *moved]
    assert (
        unplaced(
            graph(
                MOVED.replace("all = Shape(x)", "all = Identity(size)").replace(
                    "float[n] g)", "float[n] g, int64[3] size)", 1
                )
            ),
            CUDA,
        )[0].node
        == "Cast_6"
    )


def test_branches_are_looked_into():
    lost = unplaced(graph(BRANCH), CUDA)
    assert [(one.op, one.why) for one in lost] == [
        ("Add", f"{SIZES_ON_CPU} (in then_branch of If 'If_0')"),
        ("Det", "CUDA has no kernel (in else_branch of If 'If_0')"),
    ]


ASK = """
    import json, sys
    import onnxruntime as ort

    found = []
    for path in sys.argv[1:]:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        session = ort.InferenceSession(path, options, providers=providers)
        found.append([n.name for a in session.get_provider_graph_assignment_info()
                      if a.ep_name == providers[1] for n in a.get_nodes()])
    print(json.dumps(found))
"""


def test_the_cuda_provider_says_the_same(tmp_path):
    models = {
        "grouped float": grouped("float"),
        "grouped half": grouped("float16"),
        "layer": layer("float16"),
        "moved": graph(MOVED),
        "lowered": graph(MOVED),
        "integers": graph(
            "(uint8[n,n] x, uint8[n,n] w) => (int32[n,n] y) { y = MatMulInteger(x, w) }"
        ),
        "a body": graph("(bfloat16[n] x) => (bfloat16[n] y) { y = Mish(x) }"),
    }
    optimize(models["lowered"], CUDA)
    for i, model in enumerate(models.values()):
        ir.save(model, tmp_path / f"{i}.onnx")
    said = on_null_gpu(ASK, *(tmp_path / f"{i}.onnx" for i in range(len(models))))
    predicted = [[one.node for one in unplaced(model, CUDA)] for model in models.values()]
    assert [sorted(names) for names in said] == [sorted(names) for names in predicted]
    assert [bool(names) for names in predicted][:4] == [True, False, False, True]
