"""The null GPU itself: that placement, copies, capture, options and faults there are those of the
real CUDA provider. What the other tests on it show is worth as much as what is held here.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx
import pytest

from . import null_gpu as harness
from .null_gpu import gpu_site, on_null_gpu
from .null_gpu.build import build

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
HEAD = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
GRAPHS = {
    "half": """g (float16[2, 4] x, float16[4, 4] w) => (float16[2, 4] z)
        { y = Add(x, x)  z = MatMul(y, w) }""",
    # No fp32 kernel of it on CUDA: ONNX Runtime gives it to the CPU without a word.
    "gqa": """g (float[1, 2, 64] q, float[1, 2, 64] k, float[1, 2, 64] v, int32[1] s, int32[1] t)
        => (float[1, 2, 64] y, float[1, 1, 2, 64] pk, float[1, 1, 2, 64] pv)
        { [attends] y, pk, pv =
          com.microsoft.GroupQueryAttention<num_heads=1, kv_num_heads=1>(q, k, v, , , s, t) }""",
    "strings": "g (string[2] x) => (string[2] y) { [upper] y = StringNormalizer(x) }",
    # CUDA, CPU, CUDA: a copy to the host and one back.
    "middle": """g (float[2, 4] x) => (float[2, 4] y)
        { a = Abs(x)  [middle] b = MeanVarianceNormalization<axes=[1]>(a)  y = Exp(b) }""",
    "conv": """g (float16[1, 3, 32, 32] x, float16[8, 3, 16, 16] w) => (float16[1, 8, 2, 2] y)
        { y = Conv<strides=[16, 16]>(x, w) }""",
}
# A directory of graphs is the first argument; `open_` gives ONNX Runtime's own session.
BEGIN = f"""
import ctypes, json, os, sys
import numpy as np
import onnxruntime as rt
rt.set_default_logger_severity(4)

def path(name):
    return os.path.join(sys.argv[1], name + ".onnx")

def open_(name, options={{}}, provider="{CUDA}"):
    settings = rt.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return rt.InferenceSession(
        path(name), settings, providers=[(provider, options)], enable_fallback=0
    )

def placed(session):
    return {{n.op_type: part.ep_name for part in session.get_provider_graph_assignment_info()
            for n in part.get_nodes()}}

def error(call):
    try:
        call()
    except Exception as e:
        return str(e)
"""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    for name, text in GRAPHS.items():
        onnx.save(onnx.parser.parse_model(f"{HEAD} {text}"), folder / f"{name}.onnx")
    return folder


def test_a_session_runs_binds_and_captures(graphs, tmp_path):
    trace = tmp_path / "kernels"
    said = on_null_gpu(
        BEGIN
        + """
half = open_("half")
on_device = lambda *shape: rt.OrtValue.ortvalue_from_numpy(np.ones(shape, np.float16), "cuda", 0)
x, w, z = on_device(2, 4), on_device(4, 4), on_device(2, 4)

def bound(session):
    binding = session.io_binding()
    for name, value in {"x": x, "w": w}.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_ortvalue_output("z", z)
    return binding

feeds = {"x": np.ones((2, 4), np.float16), "w": np.ones((4, 4), np.float16)}
shape = half.run(None, feeds)[0].shape
half.run_with_iobinding(bound(half))
captured = open_("half", {"enable_cuda_graph": "1"})
binding = bound(captured)
for _ in range(5):
    captured.run_with_iobinding(binding)
conv = open_("conv").run(None, {"x": np.ones((1, 3, 32, 32), np.float16),
                                "w": np.ones((8, 3, 16, 16), np.float16)})[0].shape
cudart, stream, pointer = ctypes.CDLL("libcudart.so.13"), ctypes.c_void_p(), ctypes.c_void_p()
cudart.cudaStreamCreate(ctypes.byref(stream))
cudart.cudaStreamBeginCapture(stream, 0)
under_capture = [cudart.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(8)),
                 cudart.cudaStreamSynchronize(stream), cudart.cudaDeviceSynchronize()]
graph = ctypes.c_void_p()
cudart.cudaStreamEndCapture(stream, ctypes.byref(graph))
after_capture = cudart.cudaStreamSynchronize(stream)
print(json.dumps({
    "half": placed(half), "shape": shape, "conv": conv,
    "half": placed(half), "shape": shape, "conv": conv, "refused": under_capture,
    "after": after_capture, "device": x.device_name(), "kept": float(x.numpy().sum()),
}))""",
        graphs,
        env={"NULL_GPU_TRACE": str(trace)},
    )
    assert said["half"] == {"Add": CUDA, "MatMul": CUDA}
    assert said["shape"] == [2, 4]
    assert said["conv"] == [1, 8, 2, 2]
    assert said["device"] == "cuda"
    assert said["kept"] == 8.0
    assert said["after"] == 0
    assert said["refused"] == [900] * 3  # cudaErrorStreamCaptureUnsupported
    launched = trace.read_text().splitlines()
    # Five runs of the captured session: some before the capture, and then the graph alone.
    assert 3 <= launched.count("cudaGraphLaunch") <= 5
    assert any("OP_Add" in name for name in launched)


def test_what_does_not_run_on_a_gpu_is_refused_by_the_runtime(graphs):
    said = on_null_gpu(
        BEGIN
        + """
from onnxpress import errors
from onnxpress.runtime import Session

def refusal(name):
    try:
        return str(Session(path(name), provider="cuda").placement())
    except errors.OnnxpressError as e:
        return str(e)

middle = Session(path("middle"), provider=["cuda", "cpu"], allow_fallback=True).placement()
print(json.dumps({
    "gqa placed": placed(open_("gqa")), "half": refusal("half"), "gqa": refusal("gqa"),
    "strings": refusal("strings"), "middle": [middle.counts, middle.memcpy],
}))""",
        graphs,
    )
    assert said["gqa placed"] == {"GroupQueryAttention": CPU}
    assert said["half"] == f"2 on {CUDA}; memcpy: 0"
    for words in ("GroupQueryAttention", "attends", "float32"):
        assert words in said["gqa"]
    for words in ("StringNormalizer", "upper"):
        assert words in said["strings"]
    assert said["middle"] == [{CUDA: 2, CPU: 1}, 2]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"NULL_GPU_DRIVER": "12040"}, "CUDA driver version is insufficient for CUDA runtime"),
        ({"NULL_GPU_DEVICES": "0"}, "no CUDA-capable device is detected"),
        ({"NULL_GPU_MEMORY": "4096"}, "Failed to allocate memory for requested buffer"),
    ],
)
def test_faults_are_said_as_on_a_gpu(graphs, env, words):
    said = on_null_gpu(
        BEGIN
        + """
feeds = {"x": np.ones((1, 3, 32, 32), np.float16), "w": np.ones((8, 3, 16, 16), np.float16)}
print(json.dumps(error(lambda: open_("conv").run(None, feeds))))""",
        graphs,
        env=env,
    )
    assert words in (said or "nothing was refused")


def test_a_machine_without_cudnn(graphs):
    said = on_null_gpu(
        BEGIN
        + """
feeds = {"x": np.ones((1, 3, 32, 32), np.float16), "w": np.ones((8, 3, 16, 16), np.float16)}
print(json.dumps(error(lambda: open_("conv").run(None, feeds))))""",
        graphs,
        cudnn=False,
    )
    assert "dlopen failed for libcudnn" in (said or "nothing was refused")


def test_options_and_kernels_are_the_wheel_s(graphs):
    said = on_null_gpu(
        BEGIN
        + """
from onnxruntime.capi import _pybind_state as binding
kernels = [k for k in binding.get_all_opkernel_def() if k.provider == "CUDAExecutionProvider"]
trt = "TensorrtExecutionProvider"
print(json.dumps({
    "options": [error(lambda: open_("half", {"no_such": "1"})),
                error(lambda: open_("half", {"device_id": "7"})),
                error(lambda: open_("half", {"no_such": "1"}, trt))],
    "gqa": [k.type_constraints["T"] for k in kernels if k.op_name == "GroupQueryAttention"],
    "kernels": len(kernels),
}))""",
        graphs,
        tensorrt=True,
    )
    unknown, device, trt = said["options"]
    assert 'Unknown provider option: "no_such"' in unknown
    assert "Invalid device ID: 7, must be between 0 (inclusive) and 1 (exclusive)" in device
    assert "no_such" in trt
    assert said["kernels"] > 1000
    assert said["gqa"]
    assert all("tensor(float)" not in types for types in said["gqa"])


def test_a_child_that_fails_shows_why():
    with pytest.raises(AssertionError, match="RuntimeError: said by the child"):
        on_null_gpu("raise RuntimeError('said by the child')")


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("ONNXPRESS_GPU_SITE", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=r"onnxruntime-gpu .*`make \.venv/\.gpu`"):
        on_null_gpu("")
    monkeypatch.setattr(harness, "gpu_site", lambda: tmp_path)
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(pytest.skip.Exception, match="gcc"):
        on_null_gpu("")


def test_it_is_built_once_and_on_top_of_what_is_set(monkeypatch, tmp_path):
    site = gpu_site()
    monkeypatch.setenv("LD_LIBRARY_PATH", "/elsewhere")
    first = build(site, tmp_path)
    folders = first["LD_LIBRARY_PATH"].split(os.pathsep)
    assert folders[-1] == "/elsewhere"
    made = Path(folders[0], "libcudart.so.13").stat().st_mtime_ns
    assert build(site, tmp_path, cudnn=False)["LD_LIBRARY_PATH"] != first["LD_LIBRARY_PATH"]
    assert Path(folders[0], "libcudart.so.13").stat().st_mtime_ns == made
    assert len(list(tmp_path.iterdir())) == 1  # nothing half made is left
