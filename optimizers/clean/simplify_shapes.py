"""Do the arithmetic of shapes as far as names of dimensions prove it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit
from ..outcome import SCOPE, Outcome, describe
from .contents import INTEGERS, Content, Sizes
from .facts import Facts
from .sizes import Size

OLDEST = 15  # the first opset with Shape<start, end>


class SimplifyShapes(ir.passes.InPlacePass):
    """Do the arithmetic of shapes as far as names of dimensions prove it.

    ```
    s = Shape(x)  b = Gather(s, 0)  n = Gather(s, 1)  h = Unsqueeze(b, 0)  w = Unsqueeze(n, 0)
    t = Concat<axis=0>(h, w, [4], [16])
    y = Reshape(x, t)                               with x [batch, seq, 64]
    ->
    y = Reshape(x, [0, 0, 4, 16])
    ```

    1. Integers that turn out to be numbers become constants, and so does a Cast of them to float:
       the scale 1/sqrt(d) that torch computes from a shape folds from there.
    2. The target of a Reshape becomes a constant: a number, 0 where the size is that of the input
       at the same place, and -1 for at most one other. That of an Expand becomes 1 wherever the
       input has the size already. An Expand that stretches nothing goes.
    3. Two lists of sizes that are equal by name become one, computed where the first one was; one
       size is read by Shape<start, end> from the first tensor that has it, mostly an input.

    -1 is written for a size only where it is neither a number nor that of the input at the same
    place. Beside a size that is 0 at run time, ONNX Runtime refuses it: y = Reshape(x, [0, -1, 8])
    of an empty batch or an empty past fails with an error, where the computed target ran.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit nodes in graph order: what a node makes is known before its readers are asked."""
        if (opset := model.opset_imports.get("", 0)) < OLDEST:
            note = f"the opset is {opset}, and shapes are simplified from opset {OLDEST}"
            return Outcome(model, False, notes=(note,))
        sweep = _Sweep(model)
        for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
            sweep.visit(node)
        if sweep.hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(sweep.hits), hits=sweep.hits, notes=tuple(sweep.notes))


class _Sweep:
    """One walk over a model.

    Attributes:
        hits: Rewrites that were made.
        notes: Reshapes whose target stays computed, and why.
    """

    def __init__(self, model: ir.Model) -> None:
        self.facts, self.hits = Facts(model), 0
        self.notes: list[str] = []
        self._first: dict[tuple[object, ...], ir.Value] = {}
        self._constants: dict[tuple[object, ...], ir.Value] = {}

    def visit(self, node: ir.Node) -> None:
        """Learn what `node` makes, then say it in fewer nodes."""
        facts = self.facts
        facts.visit(node)
        if node.domain not in ("", "ai.onnx"):
            return
        output = node.outputs[0]
        if not (output.uses() or output.is_graph_output()):
            return
        if node.op_type == "Reshape":
            self._target(node, self._reshape(node))
        elif node.op_type == "Expand":
            self._expand(node)
        content = facts.content(output)
        if content is not None and output.dtype in INTEGERS:
            self._integers(node, content)
        elif node.op_type == "Cast" and output.dtype is not None:
            self._cast(node, output.dtype)

    # ---- targets -----------------------------------------------------------------------------

    def _target(self, node: ir.Node, found: list[int] | str | None) -> None:
        if isinstance(found, str):
            self.notes.append(f"{describe(node)}: {found}")
        elif found is not None:
            node.replace_input_with(1, self._constant(node, np.array(found, np.int64)))
            node.attributes.pop("allowzero", None)
            self.hits += 1

    def _reshape(self, node: ir.Node) -> list[int] | str | None:
        """The target as numbers; why that cannot be; None where it is one already."""
        x, target = self.facts.shape(node.inputs[0]), self.facts.content(node.inputs[1])
        if target is not None and target.numbers is not None and _is_constant(node.inputs[1]):
            return None
        if x is None or target is None:
            return "the shape of its input is not known" if x is None else "its target is not known"
        return reshape_target(x, target.entries, bool(node.attributes.get_int("allowzero", 0)))

    def _expand(self, node: ir.Node) -> None:
        """Drop an Expand that stretches nothing; else write 1 where the input has the size."""
        x, target = self.facts.shape(node.inputs[0]), self.facts.content(node.inputs[1])
        if x is None or target is None or not all(e.is_size for e in target.entries):
            return  # what it stretches to may be anything
        n, one = len(target.entries), Size.of(1)
        have = ((one,) * (n - len(x)) + x)[-n:] if n else ()
        left = [one if e == s else e for e, s in zip(target.entries, have, strict=True)]
        if n <= len(x) and all(size == one for size in left):
            source, output = node.inputs[0], node.outputs[0]
            assert source is not None
            if not output.is_graph_output():
                self._replace(output, source)
            return
        numbers = [number for size in left if (number := size.number) is not None]
        if len(numbers) == n and not _is_constant(node.inputs[1]):
            self._target(node, numbers)

    # ---- integers ----------------------------------------------------------------------------

    def _integers(self, node: ir.Node, content: Content) -> None:
        output, graph = node.outputs[0], node.graph
        assert output.dtype is not None
        if output.is_graph_output() or node.op_type == "Constant":
            return
        if (numbers := content.numbers) is not None:
            array = np.array(numbers, output.dtype.numpy())
            array = array.reshape(()) if content.rank == 0 else array
            self._replace(output, self._constant(node, array))
            return
        key = (id(graph), content, output.dtype)
        if key in self._first:
            self._replace(output, self._first[key])
            return
        if output.dtype == ir.DataType.INT64 and len(content.entries) == 1:
            output = self._read_at_source(node, content) or output
        self._first[key] = output

    def _read_at_source(self, node: ir.Node, content: Content) -> ir.Value | None:
        """The one size in `content`, as Shape<start, end> of the first tensor that has it."""
        name, output, graph = content.entries[0].name, node.outputs[0], node.graph
        source, axis = self.facts.source.get(name or "", (None, 0))
        if source is None or source.graph is not graph or _reads(node, source):
            return None
        assert graph is not None
        key = (id(graph), Content(content.entries, 1), output.dtype)
        nodes = []
        if (one := self._first.get(key)) is None:
            shape = ir.node("Shape", [source], attributes={"start": axis, "end": axis + 1})
            one = _typed(shape.outputs[0], output, f"{output.name}_size", 1)
            self._first[key], nodes = one, [shape]
        if content.rank == 0:
            squeeze = ir.node("Squeeze", [one])
            one, nodes = (
                _typed(squeeze.outputs[0], output, f"{output.name}_number", 0),
                [
                    *nodes,
                    squeeze,
                ],
            )
        for new in nodes:
            new.metadata_props.update({k: v for k, v in node.metadata_props.items() if k == SCOPE})
            self.facts.visit(new)
        graph.insert_before(node, nodes)
        self._replace(output, one)
        return one

    def _cast(self, node: ir.Node, dtype: ir.DataType) -> None:
        """A Cast of known integers to float: the root of torch's scale."""
        content, output = self.facts.content(node.inputs[0]), node.outputs[0]
        numbers = None if content is None else content.numbers
        if numbers is None or content is None or output.is_graph_output():
            return
        if dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
            return
        array = np.array(numbers).astype(dtype.numpy())
        array = array.reshape(()) if content.rank == 0 else array
        self._replace(output, self._constant(node, array))

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        old.replace_all_uses_with(new)
        self.hits += 1

    def _constant(self, node: ir.Node, array: np.ndarray) -> ir.Value:
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        key = (id(graph), array.dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = edit.constant(graph, f"{node.outputs[0].name}_known", array)
        return self._constants[key]


def reshape_target(x: Sizes, target: Sizes, allowzero: bool = False) -> list[int] | str:
    """The target of a Reshape of a tensor of sizes `x`, as numbers; or why that cannot be.

    The result means what `target` means with or without `allowzero`, and is for allowzero=0.
    """
    found: list[int] = []
    holes = []
    for axis, size in enumerate(target):
        number, same = size.number, axis < len(x) and size == x[axis]
        if number is not None and number > 0:
            found.append(number)
        elif number == 0 and not allowzero:
            found.append(0)
        elif number == -1:
            holes.append(size)
            found.append(-1)
        elif same and size.is_size:
            found.append(0)
        elif not size.is_size or number is not None:
            return f"size {axis} of its target is not known to be a size"
        else:
            holes.append(size)
            found.append(-1)
    if len(holes) > 1:
        return f"{' and '.join(map(str, holes))} are neither numbers nor sizes of its input"
    return found


def _reads(node: ir.Node, source: ir.Value) -> bool:
    """Whether `node` is Shape(source) or takes a number from one."""
    if node.op_type in ("Gather", "Squeeze") and not node.outputs[0].shape:
        shape = node.inputs[0].producer() if node.inputs[0] is not None else None
    else:
        shape = node
    return shape is not None and shape.op_type == "Shape" and shape.inputs[0] is source


def _typed(value: ir.Value, like: ir.Value, name: str, rank: int) -> ir.Value:
    value.name, value.type, value.shape = name, like.type, ir.Shape([1] * rank)
    return value


def _is_constant(value: ir.Value | None) -> bool:
    return value is not None and ir.convenience.get_const_tensor(value) is not None
