"""A provider takes every node, or says which it did not take and why: the order, the refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnxpress import artifact, errors
from onnxpress.cli import main
from onnxpress.runtime import Session, attention_kernels, gpu, opening, plans, providers
from onnxpress.runtime.graph_file import read_graph
from onnxpress.runtime.opening import Model

from . import onnx_models
from .null_gpu import on_null_gpu

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'
# Sizes are computed, then a product that has no kernel for float32 on CUDA follows.
MIXED = f"""{HEAD} g (float[batch, 4] x, float[4] skip) => (float[n, m] y, float[batch, 4] z) {{
  size = Shape(x)
  [name_of_double] twice = Mul(size, size)
  half = Cast <to = 7> (twice)
  y = ConstantOfShape(half)
  [normed] z = com.microsoft.QuickGelu(x)
}}"""
CONV = f"""{HEAD} g (float[1, 3, 8, 8] x, float[4, 3, 3, 3] k) => (float[1, 4, 6, 6] y) {{
  a = Conv(x, k)  y = Relu(a)
}}"""
ALONE = f"""{HEAD} g (float[1, 2, 3, 4] x) => (float[1, 2, 3, 4] y) {{
  [alone] y = MeanVarianceNormalization (x)
}}"""
LOOP = f"""{HEAD} g (float[4] x, bool c) => (float[4] y) {{
  [branch] y = If (c) <
    then_branch = t () => (float[4] a) {{ a = Abs(x) }},
    else_branch = e () => (float[4] b) {{ b = Neg(x) }}
  >
}}"""


@pytest.fixture
def save(tmp_path):
    def save(text: str, name: str = "m.onnx") -> Path:
        ir.save(ir.from_onnx_text(text), tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def add(tmp_path) -> Path:
    return onnx_models.publish(tmp_path / "add", onnx_models.add_model())


# What the file says of its nodes


def test_the_graph_is_read_without_onnx(save):
    graph = read_graph(save(MIXED))
    assert [(n.op, n.shapes_only) for n in graph.nodes] == [
        ("Shape", True), ("Mul", True), ("Cast", True), ("ConstantOfShape", False),
        ("com.microsoft::QuickGelu", False),
    ]  # fmt: skip
    assert graph.nodes[1].name == "name_of_double"
    assert graph.nodes[4].dtypes == ("float32",)
    assert graph.inputs[0] == artifact.TensorSpec("x", "float32", ("batch", 4))
    assert [i.name for i in graph.inputs] == ["x", "skip"]
    assert graph.find("normed", "com.microsoft::QuickGelu") == graph.nodes[4]
    assert graph.find("", "Mul") == graph.nodes[1]
    assert graph.find("other", "Mul") is None


def test_weights_are_no_inputs_and_give_types(tmp_path):
    path = onnx_models.embedder(tmp_path / "e") / artifact.MODEL
    graph = read_graph(path)
    assert [i.name for i in graph.inputs] == ["input_ids", "attention_mask"]
    assert "float32" in next(n for n in graph.nodes if n.op == "Gather").dtypes
    data = path.read_bytes()
    for cut in (1, len(data) // 2):
        (tmp_path / "cut.onnx").write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"."):
            read_graph(tmp_path / "cut.onnx")


# The order of preference


def fake_strict(monkeypatch, refused: dict[str, Exception]) -> list[str]:
    """Sessions that open on the CPU, or fail with what is given by provider."""
    tried, real = [], Model.strict
    monkeypatch.setattr(providers, "check_here", lambda rt, name, **_: None)

    def strict(self, plans, **options):
        name = next(iter(plans))
        tried.append(name)
        if name in refused:
            raise refused[name]
        return real(self, {"cpu": plans[name]})

    monkeypatch.setattr(Model, "strict", strict)
    return tried


def test_the_first_that_takes_every_node(add, monkeypatch):
    lacking = errors.ProviderError("one node lies elsewhere", hint="press it")
    tried = fake_strict(monkeypatch, {"tensorrt": lacking})
    session = Session(add, provider="tensorrt,coreml,cpu", shapes=SHAPES)
    assert tried == ["tensorrt", "coreml"]  # the CPU is not asked any more
    assert session.provider == "coreml"
    assert session.skipped == (opening.Skipped("tensorrt", "one node lies elsewhere", "press it"),)


SHAPES = {"batch": (1, 1, 2), "seq": (1, 1, 2)}


def test_a_provider_that_lacks_sizes_is_skipped(add, monkeypatch):
    tried = fake_strict(monkeypatch, {})
    session = Session(add, provider="tensorrt,coreml,cpu")
    assert tried == ["coreml"]
    (skipped,) = session.skipped
    assert "an engine needs the least" in skipped.why
    assert "--shapes" in skipped.hint
    with pytest.raises(errors.UsageError, match="an engine needs the least"):  # asked alone
        Session(add, provider="tensorrt")
    with pytest.raises(errors.UsageError, match="do not rise"):
        Session(add, provider="tensorrt,coreml", shapes={**SHAPES, "batch": (3, 2, 1)})


def test_tensorrt_with_graphs_runs_by_bindings_alone(add, monkeypatch, tmp_path):
    fake_strict(monkeypatch, {})
    session = Session(
        add, provider="tensorrt", shapes=SHAPES, cuda_graph=True, cache=tmp_path / "none"
    )
    feeds = {i.name: np.ones([1] * (i.rank - 1) + [4], i.dtype) for i in session.inputs}
    for run in (session.run_unchecked, lambda _: session.bind(capture=False)):
        with pytest.raises(errors.UsageError, match="captures every run") as e:
            run(feeds)
        assert "use bind()" in str(e.value.hint)
    plain = Session(add, provider="tensorrt", shapes=SHAPES, cache=tmp_path / "none")
    assert plain.bind(capture=False) is not None


def test_what_shapes_the_graph_reaches_the_plan(add, monkeypatch):
    seen, real = [], plans.plan
    monkeypatch.setattr(
        plans, "plan", lambda *a, **k: seen.append(dict(k["graph"])) or real(*a, **k)
    )
    Session(add)
    Session(add, optimize=False, disabled_optimizers=["B", "A"])
    assert seen == [{}, {"optimize": "False", "disabled_optimizers": "A B"}]


def test_who_made_the_choice_is_in_the_hint(add):
    target = {**artifact.read_manifest(add).target, "provider": "cuda"}
    onnx_models.edit_manifest(add, target=target)
    with pytest.raises(errors.ProviderError) as e:
        Session(add)
    assert str(e.value.hint).startswith("pip uninstall")
    assert "or provider='cpu' (--provider cpu)" in str(e.value.hint)
    with pytest.raises(errors.ProviderError) as e:
        Session(add, provider="cuda")
    assert "--provider cpu" not in str(e.value.hint)


@pytest.mark.parametrize("options", [{"cpu": None}, {"cpu": ["threads"]}, ["cpu"], "cpu"])
def test_options_that_are_none_are_refused(add, options):
    with pytest.raises(errors.UsageError, match="options"):
        Session(add, provider_options=options)


def test_where_none_takes_it_each_says_why(add, monkeypatch):
    refused = {
        "cuda": errors.ProviderError("no kernel for Add", hint="press it"),
        "coreml": errors.ProviderError("this is no Mac"),
    }
    fake_strict(monkeypatch, refused)
    with pytest.raises(errors.ProviderError, match="none of cuda, coreml takes every node") as e:
        Session(add, provider=["cuda", "coreml"])
    assert "\n  cuda: no kernel for Add  (press it)\n  coreml: this is no Mac" in str(e.value)
    with pytest.raises(errors.ProviderError, match=r"^no kernel for Add"):  # one: its own words
        Session(add, provider="cuda")


def test_an_option_that_is_wrong_is_no_reason_to_go_on(add, monkeypatch):
    fake_strict(monkeypatch, {"cuda": errors.UsageError("no option 'devise_id'")})
    with pytest.raises(errors.UsageError, match="devise_id"):
        Session(add, provider="cuda,cpu")


def test_a_damaged_graph_is_not_the_providers_fault(tmp_path, monkeypatch):
    (tmp_path / "m.onnx").write_bytes(b"nonsense")
    with pytest.raises(errors.ArtifactError, match="cannot load the graph"):
        Session(tmp_path / "m.onnx", provider="coreml,cpu")


def test_the_command_line_says_who_took_it(add):
    (add.parent / "x.json").write_text(json.dumps({"x": [[1, 2, 3, 4]], "m": [[1]]}) + "\n")
    args = ["run", str(add), "--input", str(add.parent / "x.json"), "--provider"]
    result = CliRunner().invoke(main, [*args, "coreml,cpu"])
    assert result.exit_code == 0, result.output
    assert "skipped    coreml: the installed" in result.stderr
    assert "provider   cpu: every node" in result.stderr
    assert "provider" not in CliRunner().invoke(main, [*args, "cpu"]).stderr
    assert CliRunner().invoke(main, [*args, "coreml,qnn"]).exit_code == 4


def test_cuda_graphs_are_for_those_that_have_them(add):
    with pytest.raises(errors.UsageError, match="no CUDA graphs on cpu or coreml"):
        Session(add, provider="cpu,coreml", cuda_graph=True)


# Memory


@pytest.mark.parametrize(
    ("said", "asked"),
    [
        ("Failed to allocate memory for requested buffer of size 3221225472", "3,072.0 MiB"),
        ("Available memory of 5 is smaller than requested bytes of 1048576", "1.0 MiB"),
        ("CUDA failure 2: out of memory ; GPU=0", "more memory was asked for than there is"),
    ],
)
def test_out_of_memory_says_what_was_asked_what_is_free_and_the_knobs(
    add, monkeypatch, said, asked
):
    card = gpu.Gpu("H200", 2**37, 2**29, "9.0")
    monkeypatch.setattr(opening, "gpu", lambda: card)
    model = Session(add)._model
    error = model.failed_run(RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {said}"), ["cuda"])
    assert asked in error.what
    assert "512.0 MiB of 131,072.0 MiB are free on H200" in error.what
    for knob in ("batches", "gpu_mem_limit", "arena_extend_strategy", "capacity"):
        assert knob in error.hint
    on_cpu = model.failed_run(RuntimeError(said), ["cpu"])
    assert "H200" not in str(on_cpu)
    assert "gpu_mem_limit" not in on_cpu.hint


def test_a_node_whose_name_says_allocate_has_memory(add):
    said = "Non-zero status code returned while running Gather node. Name:'/reallocate/Gather'"
    told = Session(add)._model.failed_run(RuntimeError(said), ["cpu"])
    assert isinstance(told, errors.InputError)


# What went wrong, and whose it was


def test_a_damaged_graph_is_told_as_such_on_every_provider(add):
    model = Session(add)._model
    for said in ("7 : INVALID_PROTOBUF : Load failed:Protobuf parsing failed.",
                 "10 : INVALID_GRAPH : This is an invalid model."):  # fmt: skip
        told = model.failed_open(RuntimeError(f"[ONNXRuntimeError] : {said}"), ["cuda"])
        assert isinstance(told, errors.ArtifactError)
        assert "copy the artifact again" in told.hint
    told = model.failed_open(RuntimeError("[ONNXRuntimeError] : 1 : FAIL : a crash"), ["cuda"])
    assert isinstance(told, errors.ProviderError)
    assert "--target cuda" in told.hint


@pytest.mark.parametrize("name", ["TensorrtExecutionProvider_TRTKernel_0", "OpenVINO-EP-subgraph"])
def test_the_failure_of_an_engine_is_not_the_inputs(add, name):
    said = RuntimeError(f"Non-zero status code returned while running x node. Name:'{name}' failed")
    model = Session(add)._model
    told = model.failed_run(said, ["tensorrt"])
    assert type(told) is errors.ProviderError
    assert "doctor" in told.hint
    assert isinstance(model.failed_run(said, ["cpu"]), errors.InputError)


# Attention kernels


def test_what_the_provider_prints_is_read():
    text = """SDPA options
\x1b[36mOperator=GroupQueryAttention Node=/l.0 DataType=fp16 SdpaKernel=FLASH_ATTENTION\x1b[0m
\x1b[36mOperator=GroupQueryAttention Node=/l.0 DataType=fp16 SdpaKernel=FLASH_ATTENTION\x1b[0m
Operator=Attention DataType=bf16 FLASH_ATTENTION=0 EFFICIENT_ATTENTION=1
"""
    kernel = attention_kernels.AttentionKernel
    assert attention_kernels.parse(text) == [
        kernel("GroupQueryAttention", "/l.0", "fp16", "FLASH_ATTENTION"),
        kernel("Attention", "", "bf16", "EFFICIENT_ATTENTION"),
    ]
    assert attention_kernels.attention_kernels("anywhere", "cpu") is None


def test_a_run_that_takes_too_long_is_told(add, monkeypatch):
    monkeypatch.setattr(attention_kernels, "TIMEOUT", 0.01)
    with pytest.raises(errors.ProviderError, match=r"took more than 0\.01 seconds"):
        attention_kernels.attention_kernels(add, "cuda")


def test_inspect_placement_of_what_any_provider_may_run(add):
    target = {**artifact.read_manifest(add).target, "provider": "any"}
    onnx_models.edit_manifest(add, target=target)
    result = CliRunner().invoke(main, ["inspect", str(add), "--placement"])
    assert result.exit_code == 0, result.output
    assert "placement  CPUExecutionProvider: 2 nodes" in result.stdout


def test_inspect_placement(add):
    asked = ["inspect", str(add), "--placement"]
    result = CliRunner().invoke(main, asked)
    assert "placement  CPUExecutionProvider: 2 nodes" in result.stdout
    assert "kernels    not reported by this provider" in result.stdout
    told = json.loads(
        CliRunner().invoke(main, ["inspect", str(add), "--placement", "--json"]).stdout
    )
    assert told["nodes"] == {"CPUExecutionProvider": 2}
    assert (told["memcpy"], told["elsewhere"], told["kernels"]) == (0, [], None)
    refused = CliRunner().invoke(main, [*asked, "--provider", "cuda"])
    assert refused.exit_code == 4
    assert CliRunner().invoke(main, ["inspect", str(add), "--provider", "cpu"]).exit_code == 2


# The real CUDA provider, on a GPU that does nothing


ASK = """
import json, sys
from onnxpress import errors, runtime
from onnxpress.runtime import Session

def ask(path, **options):
    try:
        session = Session(path, **options)
        return {"provider": session.provider, "memcpy": session.placement().memcpy,
                "counts": session.placement().counts,
                "skipped": [s.why for s in session.skipped],
                "elsewhere": [str(e) for e in session.elsewhere()]}
    except errors.OnnxpressError as e:
        return {"error": type(e).__name__, "text": str(e)}
"""
CUDA = "CUDAExecutionProvider"


def test_on_a_null_gpu(save, add, tmp_path):
    files = [save(t, f"{n}.onnx") for n, t in enumerate((MIXED, CONV, ALONE, LOOP))]
    said = on_null_gpu(
        ASK
        + """
mixed, conv, alone, loop, add = sys.argv[1:]
free = {"provider_options": {"cuda": {"enable_cudnn": False}}}
print(json.dumps({
    "add": ask(add, provider="cuda"),
    "preferred": ask(add, provider="tensorrt,cuda,cpu"),
    "mixed": ask(mixed, provider="cuda"),
    "mixed allowed": ask(mixed, provider="cuda", allow_fallback=True),
    "mixed preferred": ask(mixed, provider="cuda,cpu"),
    "alone": ask(alone, provider="cuda"),
    "conv": ask(conv, provider="cuda"),
    "conv without": ask(conv, provider="cuda", **free),
    "loop": ask(loop, provider="cuda", cuda_graph=True),
    "captured": ask(add, provider="cuda", cuda_graph=True),
    "option": ask(add, provider="cuda", provider_options={"cuda": {"devise_id": 1}}),
}))""",
        *files,
        add,
        cudnn=False,
    )
    assert said["add"]["counts"] == {CUDA: 2}
    assert said["add"]["memcpy"] == 0
    assert said["preferred"]["provider"] == "cuda"
    assert "no TensorRT 10: libnvinfer.so.10" in said["preferred"]["skipped"][0]
    mixed = said["mixed"]
    assert mixed["error"] == "ProviderError"
    assert "Mul 'name_of_double' (int64), a computation on sizes" in mixed["text"]
    assert "allow_fallback=True" in mixed["text"]
    allowed = said["mixed allowed"]
    assert allowed["provider"] == "cuda"
    assert set(allowed["counts"]) == {CUDA, "CPUExecutionProvider"}
    assert any("name_of_double" in e for e in allowed["elsewhere"])
    assert said["mixed preferred"]["provider"] == "cpu"
    assert "name_of_double" in said["mixed preferred"]["skipped"][0]
    no_kernel = "MeanVarianceNormalization 'alone' (float32), no kernel for it there"
    assert no_kernel in said["alone"]["text"]
    assert "no cuDNN 9" in said["conv"]["text"]
    assert "and Conv needs it" in said["conv"]["text"]
    assert "nvidia-cudnn-cu13" in said["conv"]["text"]
    assert said["conv without"]["counts"] == {CUDA: 2}
    assert "cannot be captured as a CUDA graph" in said["loop"]["text"]
    assert "branch" in said["loop"]["text"]
    assert said["captured"]["counts"] == {CUDA: 2}
    assert said["option"]["error"] == "UsageError"


def test_counting_copies_is_a_choice_on_a_null_gpu(save, add, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nonsense")
    said = on_null_gpu(
        ASK
        + """
import numpy as np
from onnxpress.runtime.opening import Model
mixed, add, broken = sys.argv[1:]
opened, real = [], Model.open
def counted(self, *a, **k):
    opened.append(k.get("save_as"))
    if failure and k.get("save_as"):
        raise RuntimeError(failure)
    return real(self, *a, **k)
Model.open, failure = counted, ""
session = Session(mixed, provider="cuda", allow_fallback=True)
elsewhere, cheap = len(session.elsewhere()), session.placement(copies=False).memcpy
written = [bool(o) for o in opened]
failure = "Unable to serialize model as it contains compiled nodes."
compiled = session.placement().memcpy
failure, session._placement = "CUDA error 2", None
try:
    session.placement()
except errors.OnnxpressError as e:
    full = e.what
failure, session._placement = "", None
by_text = Session(add, provider="cuda", provider_options={"cuda": {"enable_cuda_graph": "True"}})
feeds = {i.name: np.ones([1] * (i.rank - 1) + [4], i.dtype) for i in by_text.inputs}
for _ in range(3):
    by_text.run(feeds)
print(json.dumps([elsewhere, cheap, written, compiled, full, session.placement().memcpy,
                  by_text.cuda_graph, ask(broken, provider="cuda")["error"]]))
""",
        save(MIXED),
        add,
        broken,
    )
    elsewhere, cheap, written, compiled, full, copies, captures, damaged = said
    assert elsewhere > 0
    assert (cheap, written, compiled) == (None, [False], None)
    assert full.startswith("out of memory")
    assert copies == 0
    assert captures
    assert damaged == "ArtifactError"


@pytest.mark.parametrize(
    ("env", "want"),
    [
        ({"NULL_GPU_DRIVER": "12080"}, ["it goes up to CUDA 12.8", "CUDA 13.0 is needed", "580"]),
        ({"NULL_GPU_DEVICES": "0"}, ["no GPU is visible"]),
        ({"NULL_GPU_DEVICES": "0", "CUDA_VISIBLE_DEVICES": ""}, ["CUDA_VISIBLE_DEVICES=''"]),
    ],
)
def test_a_driver_too_old_and_no_gpu(add, env, want):
    said = on_null_gpu(
        ASK + "print(json.dumps(ask(sys.argv[1], provider='cuda')))", str(add), env=env
    )
    assert said["error"] == "ProviderError"
    for text in want:
        assert text in said["text"]
    assert "libcublas" not in said["text"]  # what is there is not named


def test_the_memory_of_a_null_gpu_runs_out(save, tmp_path):
    text = f"{HEAD} g (float[n, 1024] x) => (float[n, 1024] y) {{ a = Abs(x)  y = Exp(a) }}"
    said = on_null_gpu(
        ASK
        + """
import numpy as np
session = Session(sys.argv[1], provider="cuda")
try:
    session.run({"x": np.zeros((2**14, 1024), np.float32)})
except errors.OnnxpressError as e:
    print(json.dumps(str(e)))
""",
        str(save(text)),
        env={"NULL_GPU_MEMORY": str(48 * 2**20)},
    )
    assert "out of memory: 64.0 MiB were asked for" in said
    assert "are free on" in said
    assert "gpu_mem_limit" in said


def test_the_kernels_that_a_null_gpu_chose(save):
    text = f"""{HEAD.replace("21", "23")}
    g (float16[1, 4, 64, 64] q, float16[1, 4, 64, 64] k, float16[1, 4, 64, 64] v)
    => (float16[1, 4, 64, 64] y) {{ [attend] y = Attention (q, k, v) }}"""
    said = on_null_gpu(
        """
import json, sys
from onnxpress.runtime.attention_kernels import attention_kernels
found = attention_kernels(sys.argv[1], "cuda")
print(json.dumps([[k.op, k.dtype, k.kernel] for k in found]))
""",
        save(text),
    )
    assert said == [["Attention", "fp16", "FLASH_ATTENTION"]]
