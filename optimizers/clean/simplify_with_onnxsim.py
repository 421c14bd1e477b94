"""Let onnxsim simplify the graph, at arm's length: in a process of its own, within limits."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx_ir as ir

from ..counts import count_ops
from ..outcome import Outcome

STAYS = 1 << 16  # bytes; smaller constants go through onnxsim, which may fold them
LARGEST = 1 << 30  # bytes of constants that stay; protobuf ends at twice that

CHILD = """
import sys
source, result, memory = sys.argv[1], sys.argv[2], int(sys.argv[3])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
except ImportError:
    pass  # Windows has no such limit
import onnx, onnxsim
model, _ = onnxsim.simplify(source, tensor_size_threshold="1MB", certify=False)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, result)
"""


class SimplifyWithOnnxsim(ir.passes.InPlacePass):
    """Let onnxsim simplify the graph, and take the result only where it is a better one.

    ```
    n = Shape(x)  one = Gather(n, 0)  s = ConstantOfShape(two)  y = Add(x, s)   with x [2, 8]
    ->
    y = Add(x, s)                                               with s an initializer
    ```

    onnxsim runs in a process of its own, so that a crash, a hang or a lack of memory costs the
    pass and not the model. Large weights stay here: to onnxsim they are inputs, which it may move
    and must not read, and by their names they are put back. The result is left, with a note,
    where onnx's checker rejects it, where it has more nodes, or where the signature is another.

    Args:
        timeout_s: Seconds that onnxsim may take.
        memory_bytes: Address space that its process may take, where the system can limit it.
    """

    def __init__(self, timeout_s: float = 120, memory_bytes: int = 8 << 30) -> None:
        super().__init__()
        self.timeout_s, self.memory_bytes = timeout_s, memory_bytes

    def call(self, model: ir.Model) -> Outcome:
        """Write the graph, run onnxsim, judge what it wrote, and take it over."""
        if importlib.util.find_spec("onnxsim") is None:
            return _left(model, "it is not installed: pip install onnxsim")
        twin, weights = _without_weights(model)
        if (size := _constant_bytes(twin)) > LARGEST:
            return _left(model, f"{size:,} bytes of constants cannot be taken out of the graph")
        with tempfile.TemporaryDirectory(prefix="onnxpress-onnxsim-") as folder:
            source, result = Path(folder, "before.onnx"), Path(folder, "after.onnx")
            ir.external_data.load_to_model(twin)
            ir.save(twin, source)
            command = [sys.executable, "-P", "-c", CHILD]
            command += [str(source), str(result), str(self.memory_bytes)]
            try:
                done = subprocess.run(
                    command,
                    cwd=folder,
                    timeout=self.timeout_s,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return _left(model, f"it took longer than {self.timeout_s:g} s")
            if done.returncode:
                return _left(model, _reason(done))
            try:
                simple = ir.load(result)
            except Exception as e:  # protobuf and onnx_ir raise many kinds for a damaged file
                return _left(model, f"what it wrote cannot be read: {e}")
        if not _put_back(simple, weights):
            return _left(model, "it lost weights")
        before, after = count_ops(model), count_ops(simple)
        if sum(after.values()) > sum(before.values()):
            return _left(
                model, f"its graph has {sum(after.values())} nodes, ours {sum(before.values())}"
            )
        if (now := _signature(simple)) != (was := _signature(model)):
            return _left(model, f"it changed the signature from {was} to {now}")
        if before == after:
            return Outcome(model, False)
        for value, ours in zip(simple.graph.outputs, model.graph.outputs, strict=True):
            value.shape = ours.shape or value.shape  # names of dimensions
        model.graph = simple.graph
        model.functions.clear()
        model.functions.update(simple.functions)
        return Outcome(model, True, hits=1)


def _left(model: ir.Model, reason: str) -> Outcome:
    return Outcome(model, False, notes=(f"onnxsim is left out: {reason}",))


def _without_weights(model: ir.Model) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A copy of the graph in which large initializers are inputs, and these initializers."""
    twin, weights = model.clone(), {}
    for name, value in list(twin.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= STAYS:
            continue
        weights[name] = model.graph.initializers[name]
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        del twin.graph.initializers[name]
        value.const_value = None
        if not value.is_graph_input():
            twin.graph.inputs.append(value)
    return twin, weights


def _constant_bytes(model: ir.Model) -> int:
    graphs = [model.graph, *model.graph.subgraphs()]
    kept = [v.const_value for graph in graphs for v in graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        kept += [
            a.as_tensor() for a in node.attributes.values() if a.type == ir.AttributeType.TENSOR
        ]
    return sum(tensor.nbytes for tensor in kept if tensor is not None)


def _put_back(simple: ir.Model, weights: dict[str, ir.Value]) -> bool:
    """Make initializers of the inputs that stand for weights; False where one is missing."""
    inputs = {value.name: value for value in simple.graph.inputs}
    if not inputs.keys() >= weights.keys():
        return False
    for name, ours in weights.items():
        value = inputs[name]
        value.const_value = ours.const_value
        if not ours.is_graph_input():
            simple.graph.inputs.remove(value)
        simple.graph.register_initializer(value)
    return True


def _signature(model: ir.Model) -> list[str]:
    # A size may be found for an output; a name, a type or a rank is not onnxsim's to change.
    given = [f"{v.name}: {v.dtype}{v.shape}" for v in model.graph.inputs]
    return [*given, *(f"{v.name}: {v.dtype}, rank {_rank(v)}" for v in model.graph.outputs)]


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _reason(done: subprocess.CompletedProcess[bytes]) -> str:
    if done.returncode < 0:
        return f"it was ended by signal {-done.returncode}"
    # The line that a traceback ends in, without the context that stands around it.
    raised = re.findall(r"^[\w.]+(?:: .*)?$", done.stderr.decode(errors="replace"), re.MULTILINE)
    return f"it failed: {raised[-1][:200]}" if raised else f"it failed ({done.returncode})"
