"""Bindings and buffers: whose memory is used, what is copied, and what is refused."""

from __future__ import annotations

import gc
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnxpress.errors import InputError, OnnxpressError, ProviderError, UsageError
from onnxpress.runtime import PlacedNode, Placement, Session
from onnxpress.runtime import session as session_module
from onnxpress.runtime.graph_capture import check_capturable
from onnxpress.runtime.memory import Memory, residence

from . import onnx_models
from .null_gpu import on_null_gpu

X = np.arange(8, dtype=np.float32).reshape(2, 4)
M = np.ones((2, 3), np.int64)


def save(path: Path, text: str, opset: int = 23) -> Path:
    domains = f'"" : {opset}, "com.microsoft" : 1'
    ir.save(ir.from_onnx_text(f"<ir_version: 10, opset_import: [{domains}]> {text}"), path)
    return path


@pytest.fixture(scope="module")
def add(tmp_path_factory) -> Session:
    """x float32 [batch, 4], m int64 [batch, seq]; y = x + x, z = m + m."""
    return Session(onnx_models.publish(tmp_path_factory.mktemp("b") / "a", onnx_models.add_model()))


@pytest.fixture(scope="module")
def same(tmp_path_factory) -> Any:
    """A session of a graph that copies its input, for each dtype."""
    folder, sessions = tmp_path_factory.mktemp("same"), {}

    def same(dtype: str) -> Session:
        if dtype not in sessions:
            text = f"g ({dtype}[n] x) => ({dtype}[n] y) {{ y = Identity(x) }}"
            sessions[dtype] = Session(save(folder / f"{dtype}.onnx", text))
        return sessions[dtype]

    return same


def bind(session: Session, **inputs: Any) -> Any:
    binding = session.bind()
    for name, value in inputs.items():
        binding.input(name, value)
    return binding


# Whose memory


def test_a_torch_tensor_is_used_where_it_lies(add):
    x = torch.from_numpy(X.copy())
    binding = bind(add, x=x, m=M)
    assert binding.bound("x").pointer == x.data_ptr()
    first = binding.run()
    np.testing.assert_array_equal(first["y"].numpy(), 2 * X)
    x += 1  # the next run sees it, and the result of the first run stays
    np.testing.assert_array_equal(binding.run()["y"].numpy(), 2 * (X + 1))
    np.testing.assert_array_equal(first["y"].numpy(), 2 * X)


def test_an_output_is_written_into_the_tensor_given(add):
    y, z = torch.zeros(2, 4), np.zeros((2, 3), np.int64)
    binding = bind(add, x=X, m=M)
    binding.output("y", y)
    binding.output("z", z)
    out = binding.run()
    assert (out["y"].pointer, out["z"].pointer) == (y.data_ptr(), z.ctypes.data)
    np.testing.assert_array_equal(y.numpy(), 2 * X)
    np.testing.assert_array_equal(z, 2 * M)
    binding.output("y", None)
    assert binding.run()["y"].pointer != y.data_ptr()


def test_numpy_in_and_out_agree_with_run(add):
    out = bind(add, x=X, m=M).run()
    want = add.run({"x": X, "m": M})
    assert list(out) == list(want)
    for name, value in want.items():
        np.testing.assert_array_equal(out[name].numpy(), value)
        assert (out[name].device, out[name].dtype) == ("cpu", str(value.dtype))
    only = add.bind(["z"])
    only.input("x", X)
    only.input("m", M)
    assert list(only.run()) == ["z"]


def test_arrays_that_are_not_contiguous_are_inputs(add):
    wide = np.arange(16, dtype=np.float32).reshape(4, 4)
    for x in (wide.T[::2], wide[::-2], torch.from_numpy(wide).T[::2]):
        got = bind(add, x=x, m=M).run()["y"].numpy()
        np.testing.assert_array_equal(got, 2 * np.asarray(x))


def test_a_read_only_array_is_copied_and_the_copy_outlives_all_else(add):
    fixed = X.copy()
    fixed.setflags(write=False)
    binding = bind(add, x=fixed, m=M)
    assert binding.bound("x").pointer != fixed.ctypes.data  # numpy would not let us hold it
    np.testing.assert_array_equal(binding.run()["y"].numpy(), 2 * X)
    view, tensor = binding.bound("x").view(), torch.from_dlpack(binding.bound("x"))
    view[0, 0] = 42
    np.testing.assert_array_equal(fixed, X)
    del binding, fixed
    gc.collect()
    junk = [np.zeros((2, 4), np.float32) for _ in range(50)]
    assert (view[0, 0], view[1, 3], tensor[0, 0], tensor[1, 3]) == (42, 7, 42, 7)
    assert len(junk) == 50


@pytest.mark.parametrize("kind", ["shifted", "field"])
def test_arrays_that_are_not_aligned_are_copied_as_inputs_and_refused_as_outputs(add, kind):
    if kind == "shifted":
        x = np.zeros(17, np.uint8)[1:].view(np.float32).reshape(1, 4)
    else:  # whose elements lie 5 bytes apart
        x = np.zeros((1, 4), [("a", "i1"), ("b", "f4")])["b"]
    x[:] = X[:1]
    binding = bind(add, x=x, m=M[:1])
    assert binding.bound("x").pointer != x.ctypes.data
    np.testing.assert_array_equal(binding.run()["y"].numpy(), 2 * X[:1])
    x += 1
    binding.bound("x").copy_from(x)
    np.testing.assert_array_equal(binding.run()["y"].numpy(), 2 * (X[:1] + 1))
    refused(InputError, lambda: binding.output("y", x), "the output 'y'", "not aligned")


def test_masks_pad_on_the_right_as_in_run(tmp_path):
    session = Session(
        onnx_models.publish(
            tmp_path / "a", onnx_models.add_model(), runtime={"padding": {"m": "right"}}
        )
    )
    right, left = np.array([[1, 1, 1], [1, 0, 0]]), np.array([[1, 1, 1], [0, 1, 1]])
    said = ("row 1 of the input 'm' has a token behind its padding", "padding_side='right'")
    refused(InputError, lambda: session.run({"x": X, "m": left}), *said)
    refused(InputError, bind(session, x=X, m=left).run, *said)
    refused(InputError, lambda: bind(session, x=X, m=left.T.copy().T), *said)  # which is copied
    buffer = session.buffer((2, 3), "int64")  # its values are nothing yet
    binding = bind(session, x=X, m=buffer)
    buffer.copy_from(right)
    np.testing.assert_array_equal(binding.run()["z"].numpy(), 2 * right)
    buffer.copy_from(left)
    refused(InputError, binding.run, *said)


def test_what_is_bound_stays_alive(add):
    binding = add.bind()
    binding.input("x", torch.full((200, 4), 3.0))
    binding.input("m", np.full((200, 2), 7))
    binding.output("y", np.zeros((200, 4), np.float32))
    gc.collect()
    junk = [np.zeros((200, 4), np.float32) for _ in range(50)]
    assert (binding.run()["y"].numpy() == 6).all()
    assert all((j == 0).all() for j in junk)


def test_a_result_is_shared_and_outlives_its_buffer(add):
    buffer = bind(add, x=X, m=M).run()["y"]
    tensor, array, pointer = torch.from_dlpack(buffer), np.from_dlpack(buffer), buffer.pointer
    assert tensor.data_ptr() == array.ctypes.data == pointer
    view = buffer.view()
    view[0, 0] = 42
    assert tensor[0, 0] == 42
    assert buffer.numpy().ctypes.data != pointer
    del buffer, view, array
    gc.collect()
    junk = [np.zeros((2, 4), np.float32) for _ in range(50)]
    assert tensor[0, 0] == 42
    assert tensor[1, 3] == 14
    assert len(junk) == 50


def test_sizes_may_change_between_runs_and_be_zero(add):
    binding = add.bind()
    for n in (2, 5, 0, 1):
        binding.input("x", np.ones((n, 4), np.float32))
        binding.input("m", np.ones((n, 0), np.int64))
        out = binding.run()
        assert (out["y"].shape, out["z"].shape) == ((n, 4), (n, 0))
        assert (out["y"].numpy() == 2).all()


def test_one_buffer_as_past_and_present_grows_in_place(tmp_path):
    """GroupQueryAttention appends to the cache that it is given, where both are one memory."""
    text = """g (float[1,1,8] q, float[1,1,8] k, float[1,1,8] v, float[1,1,C,8] past_k,
        float[1,1,C,8] past_v, int32[1] ends, int32[1] total)
      => (float[1,1,8] y, float[1,1,C,8] present_k, float[1,1,C,8] present_v) {
        y, present_k, present_v = com.microsoft.GroupQueryAttention <num_heads: int = 1,
            kv_num_heads: int = 1> (q, k, v, past_k, past_v, ends, total) }"""
    session = Session(save(tmp_path / "gqa.onnx", text))
    keys, values = (session.buffer([1, 1, 4, 8], "float32") for _ in range(2))
    keys.view()[:] = values.view()[:] = 0
    binding = session.bind()
    for kind, buffer in (("k", keys), ("v", values)):
        binding.input(f"past_{kind}", buffer)
        binding.output(f"present_{kind}", buffer)
    pointer = keys.pointer
    for step in range(3):
        for name in "qkv":
            binding.input(name, np.full((1, 1, 8), step + 1, np.float32))
        binding.input("ends", np.array([step], np.int32))
        binding.input("total", np.array([step + 1], np.int32))
        out = binding.run()
        assert out["present_k"].pointer == pointer
    np.testing.assert_array_equal(keys.view()[0, 0, :, 0], [1, 2, 3, 0])
    # The last query is nearest to the last key, so that its value weighs most.
    assert 2.9 < out["y"].numpy()[0, 0, 0] <= 3


# Types


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "bool", "int8", "uint8", "int32", "int64"]
)
def test_types_in_and_out_without_a_copy(same, dtype):
    session = same({"float32": "float", "float64": "double"}.get(dtype, dtype))
    x = torch.arange(5).to(getattr(torch, dtype))
    y = torch.zeros_like(x)
    binding = bind(session, x=x)
    binding.output("y", y)
    out = binding.run()["y"]
    assert (binding.bound("x").pointer, out.pointer) == (x.data_ptr(), y.data_ptr())
    assert torch.equal(y, x)
    back = torch.from_dlpack(out)
    assert (back.dtype, back.data_ptr()) == (x.dtype, y.data_ptr())
    assert out.numpy().dtype == np.dtype(dtype)


def test_bfloat16_goes_through_torch_and_is_float32_in_numpy(same):
    session = same("bfloat16")
    x = torch.tensor([1.5, -2.25, 3e38, 0.0]).to(torch.bfloat16)
    binding = bind(session, x=x)
    out = binding.run()["y"]
    assert out.dtype == "bfloat16"
    assert torch.equal(torch.from_dlpack(out), x)
    np.testing.assert_array_equal(out.numpy(), x.float().numpy())
    buffer = session.buffer([4], "bfloat16")
    buffer.copy_from(x)
    binding.input("x", buffer)
    binding.input("x", torch.stack([x, x], 1)[:, 0])  # not contiguous: copied
    assert torch.equal(torch.from_dlpack(binding.run()["y"]), x)
    with pytest.raises(InputError, match="takes bfloat16, and got float32"):
        binding.input("x", x.float())
    with pytest.raises(UsageError, match="numpy has no bfloat16"):
        out.view()


def test_a_buffer_is_written_in_place(add):
    buffer = add.buffer((2, 4), np.float32)
    pointer = buffer.pointer
    for value in (X, torch.from_numpy(X), np.asfortranarray(X), X[::-1]):
        buffer.copy_from(value)
        np.testing.assert_array_equal(buffer.numpy(), np.asarray(value))
    other = add.buffer((2, 4), "float32")
    other.copy_from(buffer)
    np.testing.assert_array_equal(other.numpy(), X[::-1])
    assert buffer.pointer == pointer
    assert repr(buffer) == f"Buffer(float32[2, 4] on cpu, at {pointer:#x})"
    assert add.buffer((), "int64").shape == ()


# Refusals


def refused(error: type[OnnxpressError], call: Any, *said: str) -> None:
    with pytest.raises(error) as caught:
        call()
    for words in said:
        assert words in str(caught.value)


class Elsewhere:
    """A tensor on a device that no session here has."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 3)

    def __dlpack__(self, stream: int | None = None) -> Any:
        raise AssertionError("asked for its capsule")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("xx", X, ["no input 'xx'", "did you mean 'x'?"]),
        ("x", X.astype(np.float64), ["'x' takes float32, and got float64"]),
        ("x", torch.from_numpy(X).half(), ["takes float32, and got float16"]),
        ("x", X[0], ["'x' has 2 dimensions, and got 1"]),
        ("x", X[:, :3], ["'x' has shape [2, 3]", "must be 4"]),
        ("x", X.tolist(), ["a numpy array, a Buffer or a tensor with __dlpack__, not list"]),
        ("x", X.astype(">f4"), ["dtype >f4", "byte order"]),
        ("x", np.array([["a"] * 4]), ["cannot be bound"]),
        ("x", torch.ones(2, 4, dtype=torch.complex64), ["type code 5 in 64 bits"]),
        ("x", torch.ones(2, 4, requires_grad=True), ["DLPack cannot hand over", "detach"]),
        ("x", Elsewhere(), ["tensor on cuda:3", "the session runs on cpu"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_inputs(add, name, value, said):
    refused(InputError, lambda: add.bind().input(name, value), *said)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("w", X, ["no output 'w'"]),
        ("y", X.astype(np.float64), ["is float32, and was given memory of float64"]),
        ("y", X[:, :3].copy(), ["has the shape ['batch', 4]", "[2, 3]"]),
        ("y", np.zeros((4, 8), np.float32)[:, ::2], ["not contiguous", "ascontiguousarray"]),
        ("y", torch.zeros(4, 2).T, ["not contiguous", "tensor.contiguous()"]),
        ("y", np.frombuffer(bytes(32), np.float32).reshape(2, 4), ["read-only"]),
    ],
)
def test_bad_outputs(add, name, value, said):
    refused(InputError, lambda: add.bind().output(name, value), *said)


def test_what_only_a_run_can_see_is_refused_before_it(add):
    binding = add.bind()
    refused(InputError, binding.run, "'x' is missing", "1 more")
    binding.input("x", X)
    binding.input("m", M[:1])
    refused(InputError, binding.run, "dimension 0 is 1 and must be 2", "as in the input 'x'")
    binding.input("m", M)
    binding.output("y", np.zeros((3, 4), np.float32))
    refused(InputError, binding.run, "the output 'y' has the shape [2, 4]", "[3, 4]")
    binding.output("y", None)
    np.testing.assert_array_equal(binding.run()["y"].numpy(), 2 * X)
    refused(InputError, lambda: binding.bound("y"), "nothing is bound to 'y'")


def test_bad_buffers_and_bindings(add, tmp_path):
    refused(UsageError, lambda: add.buffer([2], "str"), "no buffers of dtype 'str")
    refused(UsageError, lambda: add.buffer([-1], "int64"), "0 or more, not [-1]")
    refused(UsageError, lambda: add.buffer([1], "int64", "pinned"), "on cpu has no buffers on 'pi")
    refused(OnnxpressError, lambda: add.buffer([2**45], "int64"), "no memory for 268435456.0 MiB")
    refused(UsageError, lambda: add.bind([]), "needs an output")
    refused(InputError, lambda: add.bind(["q"]), "no output 'q'")
    buffer = add.buffer((2, 4), "float32")
    refused(InputError, lambda: buffer.copy_from(X[:1]), "the shape [2, 4], and was given [1, 4]")
    refused(InputError, lambda: buffer.copy_from(M), "dtype float32, and was given int64")
    with pytest.raises(BufferError):
        buffer.__dlpack__(copy=True)
    with pytest.raises(BufferError):
        buffer.__dlpack__(dl_device=(2, 0))
    text = "g (string[n] x) => (string[n] y) { y = Identity(x) }"
    words = Session(save(tmp_path / "s.onnx", text))
    refused(InputError, words.bind, "'x' is object, which cannot be bound")


def test_the_error_of_a_run_is_told_and_the_binding_goes_on(tmp_path):
    text = "g (float[4] x, int64[n] i) => (float[n] y) { y = Gather(x, i) }"
    binding = bind(Session(save(tmp_path / "g.onnx", text)), x=X[0], i=np.array([9]))
    refused(InputError, binding.run, "refused these inputs")
    binding.input("i", np.array([1]))
    assert binding.run()["y"].numpy() == X[0, 1]


# Threads


def test_two_threads_with_a_binding_each(add):
    wrong: list[Any] = []

    def work(k: float) -> None:
        binding, x = add.bind(), torch.empty(64, 4)
        binding.input("x", x)
        binding.input("m", np.ones((64, 1), np.int64))
        for i in range(200):
            x.fill_(k + i)
            if not (binding.run()["y"].numpy() == 2 * (k + i)).all():
                wrong.append((k, i))

    threads = [threading.Thread(target=work, args=(k,)) for k in (0.0, 1000.0)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_one_binding_refuses_two_threads_at_once(add):
    binding = bind(add, x=X, m=M)
    binding._running.acquire()  # as a run in another thread does
    refused(UsageError, binding.run, "another thread is running this binding")
    binding._running.release()
    binding.run()


def test_two_threads_that_bind_first_share_one_count_of_graphs(tmp_path, monkeypatch):
    run = Session(save(tmp_path / "r.onnx", "g (float[n] x) => (float[n] y) { y = Relu(x) }"))
    made = threading.Barrier(2, timeout=10)

    def slowly(*args: Any) -> Any:
        made.wait()
        return residence(*args)

    monkeypatch.setattr(session_module, "residence", slowly)
    # As from Python 3.12 on.
    monkeypatch.setattr(Session.__dict__["_residence"], "lock", nullcontext(), raising=False)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(run._residence)) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 2
    assert found[0] is found[1] is run._residence


class SlowCopies:
    """A CUDA runtime whose waits end when they are let go."""

    def __init__(self) -> None:
        self.waiting, self.go, self.waits = threading.Event(), threading.Event(), 0

    def copy(self, target: int, source: int, nbytes: int, stream: int | None) -> None:
        pass

    def finish(self, stream: int | None) -> None:
        self.waits += 1
        self.waiting.set()
        assert self.go.wait(10)


def test_a_copy_started_during_another_threads_wait_is_waited_for(add):
    memory, cuda = Memory(add._rt, {}), SlowCopies()
    memory.__dict__["cuda"] = cuda
    memory.put(1, 2, 4)
    other = threading.Thread(target=memory.settle)
    other.start()
    assert cuda.waiting.wait(10)
    memory.put(1, 2, 4)  # which that wait may have come too early for
    cuda.go.set()
    other.join()
    memory.settle()
    assert cuda.waits == 2
    memory.settle()  # nothing is left to wait for
    assert cuda.waits == 2
    there = threading.Thread(target=memory.put, args=(1, 2, 4))  # bound there, and run here
    there.start()
    there.join()
    memory.settle()
    assert cuda.waits == 3


@pytest.mark.parametrize("value", ["1", "True", "true", "0", "False"])
@pytest.mark.parametrize(
    ("provider", "option", "limit"),
    [
        ("CUDAExecutionProvider", "enable_cuda_graph", 16),
        ("TensorrtExecutionProvider", "trt_cuda_graph_enable", 1),
    ],
)
def test_graphs_are_on_in_every_spelling_of_onnx_runtime(add, provider, option, limit, value):
    names = ("get_inputs", "get_outputs", "get_input_memory_infos", "get_output_memory_infos")
    opened = SimpleNamespace(
        get_providers=lambda: [provider],
        get_provider_options=lambda: {provider: {option: value}},
        **dict.fromkeys(names, list),
    )
    graphs = residence(add._rt, opened).graphs
    assert (graphs.limit if graphs else 0) == (limit if value in ("1", "True", "true") else 0)


# On a GPU, which is the null one: addresses, devices, copies and refusals are real, results not


GPU = """
import ctypes, json, os, sys, threading
import numpy as np
import torch
from onnxpress.errors import OnnxpressError
from onnxpress.runtime import Session, dlpack
from onnxpress.runtime.cudart import Cudart

folder, seen = sys.argv[1], {}
X = np.arange(4, dtype=np.float32)

def session(name, **options):
    return Session(f"{folder}/{name}.onnx", provider="cuda", **options)

def said(call):
    try:
        call()
    except OnnxpressError as e:
        return f"{type(e).__name__}: {e}"

class Tensor:
    '''A tensor of another library on the GPU, which notes the streams that it is asked for.'''
    def __init__(self, buffer, device=(2, 0)):
        self.buffer, self.device, self.streams = buffer, device, []
    def __dlpack_device__(self):
        return self.device
    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        return self.buffer.value.__dlpack__()
"""


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> Path:
    """Graphs for the GPU. A copy (Identity) is no kernel: even its values are real there."""
    folder = tmp_path_factory.mktemp("graphs")
    save(folder / "copy.onnx", "g (float[n] x) => (float[n] y) { y = Identity(x) }")
    save(folder / "relu.onnx", "g (float[n] x) => (float[n] y) { z = Relu(x) y = Abs(z) }")
    save(
        folder / "two.onnx",
        "g (float[n] x, int64[1] s) => (float[N] y, float[P] z) { "
        "y = Reshape(x, s) r = Relu(x) z = Reshape(r, s) }",
    )
    save(
        folder / "shape.onnx",
        "g (float[n] x, int64[1] s) => (float[m] y, int64[1] t) { y = Reshape(x, s) t = Shape(x) }",
    )
    for dtype in ("bool", "bfloat16"):
        text = f"g ({dtype}[n] x) => ({dtype}[n] y) {{ y = Identity(x) }}"
        save(folder / f"{dtype}.onnx", text)
    return folder


def test_on_a_gpu_only_what_lies_on_the_host_is_copied(graphs):
    seen = on_null_gpu(
        GPU
        + """
run = session("copy")
binding = run.bind()
mine = run.buffer([4], "float32")
foreign = Tensor(run.buffer([4], "float32"))
foreign.buffer.copy_from(X)
binding.input("x", foreign)
seen["in place"] = binding.bound("x").pointer == foreign.buffer.pointer
binding.output("y", mine)
out = binding.run()["y"]
seen["out"] = [out.pointer == mine.pointer, out.device, out.__dlpack_device__()]
seen["values"] = mine.numpy().tolist()
foreign.buffer.copy_from(X + 1)  # the next run reads what is there by then: no copy was taken
binding.run()
seen["later"] = mine.numpy().tolist()
seen["streams"] = foreign.streams  # 1: the legacy default stream

pinned = run.buffer([4], "float32", "pinned")
pinned.view()[:] = 7
places, copied = set(), []
for value in (X, X[::-1], torch.from_numpy(X), pinned, Tensor(pinned, (3, 0))):
    binding.input("x", value)
    places.add(binding.bound("x").pointer)
    binding.run()
    copied.append(mine.numpy().tolist())
seen["host"] = [len(places), copied, binding.bound("x").device, pinned.device]
binding.output("y", None)
first, second = binding.run()["y"], binding.run()["y"]
seen["new"] = [first.pointer != second.pointer, first.numpy().tolist()]

def waits(value):
    '''What a run waits for: [the whole device, the copies that were started].'''
    calls.clear()
    binding = run.bind()
    binding.input("x", value)
    real = binding._io.synchronize_inputs
    binding._io.synchronize_inputs = lambda: (calls.append("device"), real())
    start = len(calls)
    binding.run()
    return [calls[start:].count("device"), calls[start:].count("cudaStreamSynchronize")]

calls, call = [], Cudart.call
Cudart.call = lambda self, name, *args: (calls.append(name), call(self, name, *args))
own = run.buffer([4], "float32")
seen["waits"] = [waits(own), waits(X), waits(foreign)]
handed = own.__dlpack__()  # from here on someone else may write into it
seen["waits"].append(waits(own))
Cudart.call = call

flag = session("bool").bind()
flag.input("x", np.array([True, False]))
back = flag.run()["y"]
host = session("bool").buffer([2], "bool", "pinned")
host.copy_from(np.array([False, True]))
seen["bool"] = [back.dtype, back.numpy().tolist(), host.dtype, torch.from_dlpack(host).tolist()]
brain = session("bfloat16").bind()
brain.input("x", torch.tensor([1.5, -2.0]).bfloat16())
seen["bfloat16"] = brain.run()["y"].numpy().tolist()

shape = session("shape").bind()
shape.input("x", X)
shape.input("s", np.array([4]))
out = shape.run()
seen["on host"] = [shape.bound("s").device, out["t"].device, out["y"].device]
seen["said"] = [
    said(lambda: shape.input("s", Tensor(run.buffer([1], "int64")))),
    said(lambda: binding.output("y", X.copy())),
    said(lambda: binding.input("x", Tensor(mine, (2, 1)))),
    said(lambda: run.buffer([4], "float32", "cuda:1")),
    said(lambda: run.buffer([2**40], "float32")),
    said(mine.view),
]

steps = (ctypes.c_int64 * 2)(1, 2)
class Turned(Tensor):
    def __dlpack__(self, *, stream=None):
        capsule = super().__dlpack__(stream=stream)
        tensor = dlpack._tensor(capsule)
        tensor.strides = steps
        return capsule

square = Turned(run.buffer([2, 2], "float32"))
seen["turned"] = [
    said(lambda: run.buffer([2, 2], "float32", where).copy_from(square))
    for where in ("cuda:0", "cpu", "pinned")
]
print(json.dumps(seen))
""",
        graphs,
    )
    assert seen["in place"]
    assert seen["out"] == [True, "cuda:0", [2, 0]]
    assert seen["values"] == [0, 1, 2, 3]
    assert seen["later"] == [1, 2, 3, 4]
    assert set(seen["streams"]) == {1}
    values = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 1, 2, 3], [7] * 4, [7] * 4]
    assert seen["host"] == [1, values, "cuda:0", "pinned"]
    assert seen["new"] == [True, [7] * 4]
    assert seen["waits"] == [[0, 0], [0, 1], [1, 0], [1, 0]]
    assert seen["bool"] == ["bool", [True, False], "bool", [False, True]]
    assert seen["bfloat16"] == [1.5, -2]
    assert seen["on host"] == ["cpu", "cpu", "cuda:0"]
    wanted = [
        "InputError: the input 's' is read by the host",
        "InputError: the output 'y' is written on cuda:0, and was given memory on cpu",
        "InputError: the input 'x' was given a tensor on cuda:1, and the session runs on cuda:0",
        "UsageError: a session on cuda:0 has no buffers on 'cuda:1'",
        "OnnxpressError: there is no memory for 4194304.0 MiB on cuda:0, which has ",
        "UsageError: a buffer on cuda:0 is not in the host's memory",
    ]
    assert [text[: len(w)] for text, w in zip(seen["said"], wanted, strict=True)] == wanted
    for text in seen["turned"]:
        assert "a tensor on cuda:0 that is not contiguous, of the strides [1, 2]" in text
        assert "tensor.contiguous()" in text


def test_on_a_second_gpu_the_device_of_the_thread_stays_as_it_was(graphs):
    seen = on_null_gpu(
        GPU
        + """
run = session("copy", provider_options={"cuda": {"device_id": 1}})
buffer, library, calls = run.buffer([4], "float32"), run._residence.memory.cuda._library, []
def current():
    index = ctypes.c_int(-1)
    library.cudaGetDevice(ctypes.byref(index))
    return index.value

class Spy:  # the library, which notes on which device each call is made
    def __getattr__(self, name):
        if name not in ("cudaGetDevice", "cudaSetDevice"):
            calls.append((name, current()))
        return getattr(library, name)

def work():
    before = current()
    buffer.copy_from(X)
    run._residence.memory.cuda.order(None, 1)
    run.buffer([4], "float32", "pinned")
    values.append([before, buffer.numpy().tolist(), current()])

run._residence.memory.cuda._library, values = Spy(), []
library.cudaSetDevice(0)
work()
thread = threading.Thread(target=work)  # which has chosen no device yet
thread.start()
thread.join()
seen = {"values": values, "calls": sorted({n for n, _ in calls}), "on": [d for _, d in calls]}
print(json.dumps(seen))
""",
        graphs,
        env={"NULL_GPU_DEVICES": "2"},
    )
    assert seen["values"] == [[0, [0, 1, 2, 3], 0]] * 2
    assert {"cudaEventRecord", "cudaHostAlloc", "cudaMemcpyAsync"} < set(seen["calls"])
    assert set(seen["on"]) == {1}


def test_on_the_callers_stream_a_run_only_enqueues(graphs):
    seen = on_null_gpu(
        GPU
        + """
calls, real = [], Cudart.call
def call(self, name, *args):
    calls.append([name, *(a.value for a in args if hasattr(a, "value"))])
    real(self, name, *args)
Cudart.call = call
run = session("copy", provider_options={"cuda": {"user_compute_stream": 0x5550}})
foreign = Tensor(run.buffer([4], "float32"))
binding = run.bind()
binding.input("x", foreign)
out = binding.run()["y"]
binding.run()
seen["asked"] = foreign.streams
seen["waits"] = [c for c in calls if "Synchronize" in c[0]]
for stream in (0x5550, -1, 0x7770, None):
    calls.clear()
    out.__dlpack__(stream=stream)
    seen[str(stream)] = [c[0] for c in calls] + [c[1] for c in calls if "WaitEvent" in c[0]]
calls.clear()
binding.input("x", X)
seen["copy"] = [c[-1] for c in calls if c[0] == "cudaMemcpyAsync"]
calls.clear()
out.numpy()
seen["numpy"] = [c[0] for c in calls]
print(json.dumps(seen))
""",
        graphs,
    )
    # Bound once, then before each run: the producer orders its work before ours, on the device.
    assert seen["asked"] == [0x5550] * 3
    assert seen["waits"] == []
    assert seen["21840"] == seen["-1"] == []
    event = ["cudaEventCreateWithFlags", "cudaEventRecord", "cudaStreamWaitEvent"]
    assert seen["30576"] == [*event, "cudaEventDestroy", 0x7770]
    assert seen["None"] == [*event, "cudaEventDestroy", 1]
    assert seen["copy"] == [0x5550]
    assert seen["numpy"] == ["cudaMemcpyAsync", "cudaStreamSynchronize"]


def test_cuda_graphs_are_captured_by_shape_and_their_addresses_guarded(graphs, tmp_path):
    trace = tmp_path / "trace"
    seen = on_null_gpu(
        GPU
        + """
def launched():
    with open(os.environ["NULL_GPU_TRACE"], "r+") as file:
        names = file.read().split()
        file.truncate(0)
    return [len([n for n in names if n != "cudaGraphLaunch"]), names.count("cudaGraphLaunch")]

run = session("relu", cuda_graph=True)
binding = run.bind()
binding.input("x", X)
launched()
out = binding.run()["y"]
seen["first"] = launched()
seen["second"] = [binding.run()["y"] is out, launched()]
binding.input("x", X + 1)  # from the host: the same address
seen["written"] = [binding.run()["y"] is out, launched(), binding.bound("x").numpy().tolist()]
binding.input("x", X[:2])
other = binding.run()["y"]
seen["other shape"] = [other.shape, launched()]
binding.input("x", X)
seen["back"] = [binding.run()["y"] is out, launched()]

binding.input("x", run.buffer([4], "float32"))
seen["moved input"] = said(binding.run)
binding.input("x", X)
for _ in range(2):
    binding.output("y", run.buffer([4], "float32"))
    seen["moved output"] = said(binding.run)
binding.output("y", None)
binding.run()
launched()
seen["plain"] = [run.run({"x": X})["y"].shape, launched()]

def elsewhere():
    seen["thread"] = said(binding.run)
thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()

def many():
    more = run.bind()
    for n in range(1, 99):
        more.input("x", np.ones(n, np.float32))
        more.run()
seen["many"] = said(many)

shape = session("shape", cuda_graph=True).bind(["y"])
shape.input("x", X)
results = []
for size in ([4], [-1], [4]):  # read by the host once, at the capture: a graph for each value
    shape.input("s", np.array(size))
    results.append(shape.run()["y"])
seen["frozen"] = [results[1] is results[0], results[2] is results[0]]

two = session("two", cuda_graph=True).bind()  # no input tells the sizes of its outputs
for size in (4, 2, 4):
    two.input("x", X[:size])
    two.input("s", np.array([size]))
    out = two.run()
    seen.setdefault("two", []).append([out["y"].shape, out["z"].shape])

relu = session("relu", cuda_graph=True).bind()
relu.input("x", X)
out = relu.run()["y"]
waits, real = [], relu._io.synchronize_inputs
relu._io.synchronize_inputs = lambda: (waits.append(1), real())
relu.run()
seen["waits"] = [len(waits)]
handed = out.__dlpack__()  # someone else may be reading what the next run overwrites
relu.run()
seen["waits"].append(len(waits))
print(json.dumps(seen))
""",
        graphs,
        env={"NULL_GPU_TRACE": str(trace)},
    )
    assert seen["first"] == [6, 1]  # two kernels: run, run, captured; then the first replay
    assert seen["second"] == [True, [0, 1]]
    assert seen["written"] == [True, [0, 1], [1, 2, 3, 4]]
    assert seen["other shape"] == [[2], [6, 1]]
    assert seen["back"] == [True, [0, 1]]
    for words in (
        "UsageError: the input 'x' is bound at 0x",
        "bucket 1: x [4]",
        "binding.bound('x').copy_from(array)",
    ):
        assert words in seen["moved input"]
    assert "the output 'y' is bound at 0x" in seen["moved output"]
    assert seen["plain"] == [[4], [2, 0]]
    assert "captured in another thread" in seen["thread"]
    assert "has captured 16 CUDA graphs" in seen["many"]
    assert seen["frozen"] == [False, True]
    assert seen["two"] == [[[4], [4]], [[2], [2]], [[4], [4]]]
    assert seen["waits"] == [0, 1]


def test_what_cannot_be_captured_is_named():
    def placed(*nodes: tuple[str, str], memcpy: int = 0) -> Placement:
        return Placement(tuple(PlacedNode("n", op, provider) for op, provider in nodes), memcpy)

    ours, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    check_capturable(placed(("Add", ours)), ours, "m.onnx")
    for placement, words in (
        (placed(("If", ours), ("Add", ours)), "1 nodes of control flow decide on the host"),
        (placed(("Add", ours), ("NonZero", cpu)), f"1 nodes do not run on {ours}: NonZero 'n'"),
        (placed(("Add", ours), memcpy=2), "2 copies between host and device"),
    ):
        refused(ProviderError, lambda p=placement: check_capturable(p, ours, "m.onnx"), words)
