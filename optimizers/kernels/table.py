"""The kernel registry of one execution provider, and whether it has a kernel for a node."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal

import onnx_ir as ir

from ...errors import UsageError
from .schema import Signature, bound, dtype_name, op_name, signature

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
FLOATS = frozenset({"float32", "float64", *PRECISIONS.values()})
TABLES = {"cpu": "the CPU provider", "cuda": "CUDA", "tensorrt": "TensorRT"}


class Kernels:
    """What one provider computes.

    Args:
        name: The provider's short name.
        content: The table. `ops` lists the kernels of each op: `since`, the first and the last
            version of the op that a kernel is for (no last one: the first alone), and the `types`
            that each of its type variables may have. `host` lists the inputs and outputs that lie
            in host memory; `decomposed` the ops, and the types of their first input, that ONNX
            Runtime replaces by their bodies, all of which the provider computes.

    Attributes:
        name: The provider's short name.
        label: What messages call it.
        source: The package and the version that the table describes.
        sizes_on_host: Whether some kernels read or write host memory, so that ONNX Runtime moves
            what computes with sizes to the CPU.
    """

    def __init__(self, name: str, content: Mapping[str, Any]) -> None:
        self.name, self.label = name, TABLES[name]
        self.source: str = content["source"]
        self._ops: Mapping[str, Any] = content["ops"]
        self._host: Mapping[str, Any] = content.get("host", {})
        self._decomposed: Mapping[str, Any] = content.get("decomposed", {})
        self._signatures: Mapping[str, Any] = content.get("signatures", {})
        self.sizes_on_host = bool(self._host)

    def refusal(self, node: ir.Node, opset: int) -> str | None:
        """Why there is no kernel for a node, in words that end with what there is; or None.

        A value without a type passes for any type; InferShapes leaves none in a graph of known ops.

        Args:
            node: A node of a graph.
            opset: The ai.onnx opset of that graph.
        """
        op = op_name(node)
        # ONNX Runtime makes initializers of Constants, and has no kernel of bodies that it unfolds.
        first = dtype_name(node.inputs[0]) if node.inputs else None
        if op == "Constant" or first in self._decomposed.get(op, ()):
            return None
        if op not in self._ops:
            return "no kernel"
        known = signature(node, opset, self._signatures)
        if known is None:
            return f"no kernel for opset {opset}, which does not know it"
        rows = [row["types"] for row in self._ops[op] if _is_for(row["since"], known.since)]
        if not rows:
            spans = dict.fromkeys(tuple(row["since"]) for row in self._ops[op])
            there = ", ".join(f"{first} to {last}" if last else f"{first}" for first, last in spans)
            return f"no kernel for version {known.since} of it (there is {there})"
        seen = self._types(node, known)
        if any(all(seen.get(var, t[0]) in t for var, t in row.items()) for row in rows):
            return None
        for var, dtype in seen.items():
            taken = sorted({t for row in rows for t in row.get(var, [dtype])})
            if dtype not in taken:
                return f"no kernel for {dtype} ({var}: {', '.join(taken)})"
        mixture = ", ".join(f"{var}: {dtype}" for var, dtype in seen.items())
        return f"no kernel for this mixture of types ({mixture})"

    def has(self, op: str, precision: Literal["fp32", "fp16", "bf16"]) -> bool:
        """Whether an op has a kernel that computes in a precision, in its last version or another.

        Args:
            op: `Add`, or `com.microsoft::BiasGelu`.
            precision: It counts for the first input that may be of a floating type.
        """
        for row in self._ops.get(op, ()):
            floats = [t for t in self._in_order(op, row["types"]) if FLOATS & set(t)]
            if floats and PRECISIONS[precision] in floats[0]:
                return True
        return False

    def takes(self, node: ir.Node, opset: int, dtype: str, instead: str) -> bool:
        """Whether there were a kernel for a node, if `dtype` stood wherever `instead` stands."""
        known = signature(node, opset, self._signatures)
        if known is None:
            return False
        seen = {v: dtype if t == instead else t for v, t in self._types(node, known).items()}
        return any(
            all(seen.get(var, t[0]) in t for var, t in row["types"].items())
            for row in self._ops.get(op_name(node), ())
            if _is_for(row["since"], known.since)
        )

    def host_inputs(self, node: ir.Node) -> frozenset[int]:
        """The inputs that the kernel reads from host memory, by their index."""
        return frozenset(self._host.get(op_name(node), ((), ()))[0])

    def host_outputs(self, node: ir.Node) -> frozenset[int]:
        """The outputs that the kernel leaves in host memory, by their index."""
        return frozenset(self._host.get(op_name(node), ((), ()))[1])

    def _types(self, node: ir.Node, known: Signature) -> dict[str, str]:
        """The type that a node gives each name; inputs go first."""
        types: dict[str, str] = {}
        for name, value, _ in bound(node, known):
            if (dtype := dtype_name(value)) is not None:
                types.setdefault(name, dtype)
        constrained = {var for row in self._ops.get(op_name(node), ()) for var in row["types"]}
        return {name: dtype for name, dtype in types.items() if name in constrained}

    def _in_order(self, op: str, types: Mapping[str, list[str]]) -> list[list[str]]:
        """The types of a kernel in the order of the inputs that have them."""
        if op in self._signatures:
            names = [name.removesuffix("*") for name in self._signatures[op]["inputs"]]
            return [types[name] for name in dict.fromkeys(names) if name in types]
        # T, T1, T2: the names that ai.onnx gives go by the order of inputs.
        return [types[name] for name in sorted(types)]


def _is_for(since: list[int | None], version: int) -> bool:
    """ONNX Runtime's rule: a kernel without a last version is for its first one alone."""
    first, last = since
    assert first is not None
    return first == version or (last is not None and first < version <= last)


@cache
def kernels(name: str) -> Kernels:
    """The table of a provider, by its short name.

    Raises:
        UsageError: There is no table of that name; the hint lists those that there are.
    """
    from .importers import Importers

    if name not in TABLES:
        raise UsageError(f"there is no table of the kernels of {name}", hint=", ".join(TABLES))
    text = (resources.files(__package__) / f"{name}.json").read_text(encoding="utf-8")
    content = json.loads(text)
    return (Importers if "importers" in content else Kernels)(name, content)
