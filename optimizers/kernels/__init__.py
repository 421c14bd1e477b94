"""Which kernels an execution provider has, as data: read from JSON that a benchmark wrote.

    cuda.json, cpu.json   kernel registries, by `python benchmarks/kernel_tables.py cuda`
    tensorrt.json         what the ONNX parser of TensorRT imports, by its table of operators
    table.py              one registry: is there a kernel for this node?
    importers.py          the same question to TensorRT
    schema.py             which type variable each input and output of a node has

Each file says which release it describes; another release may have other kernels.
"""

from .importers import Importers
from .table import PRECISIONS, TABLES, Kernels, kernels

__all__ = ["PRECISIONS", "TABLES", "Importers", "Kernels", "kernels"]
