"""nn.Module -> base graph, and the check against PyTorch.

source.py        what to export: resolve(SOURCE) -> module, example inputs, task
factory.py       sources in the user's own code
huggingface.py   sources in Hugging Face's form; settings.py reads what their tasks need
adopt.py         sources that are ONNX files already
dims.py          which axes vary, found by asking PyTorch
names.py         inputs and outputs named after forward's parameters and the output's fields
capture.py       torch.export and torch.onnx: module -> ir.Model of ai.onnx ops
parity.py        the graph against PyTorch, at points that it was not traced at

source = resolve("my_model.py:build")
model = capture(source).model
parity = check(pytorch(source), run, inputs)
"""

from .capture import Capture, capture
from .dims import restate
from .parity import Parity, check, refuse
from .reference import Reference, pytorch
from .source import TASKS, Source, resolve

__all__ = [
    "TASKS",
    "Capture",
    "Parity",
    "Reference",
    "Source",
    "capture",
    "check",
    "pytorch",
    "refuse",
    "resolve",
    "restate",
]
