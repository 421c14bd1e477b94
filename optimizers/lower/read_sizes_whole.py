"""Read sizes whole from a tensor, for providers that would compute with them on the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit
from ..clean.contents import ONE, Sizes
from ..clean.facts import BROADCAST, END, Facts
from ..clean.infer_shapes import InferShapes
from ..clean.sizes import OPAQUE, Size
from ..outcome import Outcome, describe, too_old
from ..read import is_scalar

INT64 = ir.TensorType(ir.DataType.INT64)


class ReadSizesWhole(ir.passes.InPlacePass):
    """Read sizes whole from a tensor, for providers that would compute with them on the host.

    ```
    n = Shape<start=1, end=2>(x)  t = Concat(1, 1, n, 1)  y = Expand(mask, t)
    m = Squeeze(n)                r = Range(0, m, 1)                      with x [batch, seq]
    ->
    v = Unsqueeze(x, [1, 3])      t = Shape(v)            y = Expand(mask, t)
    n = Shape<start=1, end=2>(x)  o = Expand(1, n)        r = CumSum<exclusive=1>(o, 0)
    ```

    Sizes lie in the memory of the host. ONNX Runtime places what computes with them (Concat,
    Gather, Squeeze, Add of Shape's outputs) on the CPU, though the GPU has kernels for them, and a
    node there ends a CUDA graph:
    https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
    Shape itself stays on the GPU, and Unsqueeze copies nothing there. Where no single tensor has
    all sizes of a target, the value is stretched one axis after the other. Range(a, n, 1) is cut
    from Range(0, n, 1). A size that is a number to what computes on the device is a sum of ones.

    Declined, with a note: a size that no tensor before it has, and a Range of other steps. What
    computes inside of branches and bodies is left alone.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit nodes in graph order: a tensor to read from must be made before."""
        if (refused := too_old(model, 15, "Shape gives single sizes")) is not None:
            return refused
        untyped = any(v.type is None and v.uses() for node in model.graph for v in node.outputs)
        inferred = untyped and InferShapes()(model).modified
        sweep = _Sweep(model)
        for node in list(model.graph):
            sweep.visit(node)
        if sweep.hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, inferred or bool(sweep.hits), sweep.hits, tuple(sweep.notes))


class _Sweep:
    """One walk over the main graph.

    Attributes:
        seen: The values made so far whose sizes are known, inputs first.
        lines: The ones made so far, by how many they are.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph, self.facts = model.graph, Facts(model)
        self.hits, self.notes = 0, list[str]()
        self.seen: list[ir.Value] = []
        self.lines: dict[Size, ir.Value] = {}
        self._see(model.graph.inputs)

    def visit(self, node: ir.Node) -> None:
        """Learn what `node` makes, then let it read sizes whole."""
        self.facts.visit(node)
        reason = self._rewrite(node) if node.domain in ("", "ai.onnx") else ""
        if reason is None:
            self.hits += 1
        elif reason:
            self.notes.append(f"{describe(node)}: {reason}")
        self._see(v for v in node.outputs if v.uses() or v.is_graph_output())  # not replaced

    def _see(self, values: Iterable[ir.Value]) -> None:
        for v in values:  # no weights, no text, no sequences, and no sizes themselves
            tensor = isinstance(v.type, ir.TensorType) and v.dtype != ir.DataType.STRING
            named = tensor and v.const_value is None and self.facts.shape(v) is not None
            if named and self.facts.content(v) is None:
                self.seen.append(v)

    def _rewrite(self, node: ir.Node) -> str | None:
        """Why not, in words; "" where there is nothing to do."""
        if node.op_type == "Range" and any(map(_is_computed, node.inputs)):
            return self._range(node)
        if node.op_type == "Expand" and _is_computed(node.inputs[1]):
            x = self.facts.shape(node.inputs[0])
            return "the shape of its input is not known" if x is None else self._stretch(node, x)
        if node.op_type == "ConstantOfShape" and _is_computed(node.inputs[0]):
            return self._stretch(node, (ONE,))
        if node.op_type in (*BROADCAST, "Cast") and self.facts.content(node.outputs[0]) is None:
            return self._numbers(node)
        return ""

    # ---- what a node makes ---------------------------------------------------------------------

    def _numbers(self, node: ir.Node) -> str | None:
        """Sizes that `node`, which computes on the device, adds up or compares: sums of ones."""
        found: dict[int, tuple[Size, int]] = {}
        for index, value in enumerate(node.inputs):
            content = self.facts.content(value)
            if content is None or content.numbers is not None or len(content.entries) != 1:
                continue
            size = content.entries[0]
            if any(name[0] == OPAQUE for names, _ in size.terms for name in names):
                continue  # a number that was computed of data
            if self._parts(size) is None:
                return f"no tensor before it has the size {size}"
            found[index] = size, content.rank
        for index, (size, rank) in found.items():
            value = node.inputs[index]
            assert value is not None
            line = self._line(size, node)
            made = [ir.node("ReduceSum", [line], attributes={"keepdims": rank})]
            if value.dtype != ir.DataType.INT64:
                made.append(ir.node("Cast", made[-1].outputs, attributes={"to": value.dtype}))
            for new in made:
                _name(new, f"{value.name}_{new.op_type.lower()}", INT64)
            made[-1].outputs[0].type = value.type
            self.graph.insert_before(node, made)
            node.replace_input_with(index, made[-1].outputs[0])
        return None if found else ""

    def _range(self, node: ir.Node) -> str | None:
        """Range(a, n, 1) as a running sum of ones: what it counts then lies on the device."""
        first, last = (self.facts.content(v) for v in node.inputs[:2])
        output = node.outputs[0]
        if output.dtype != ir.DataType.INT64 or not is_scalar(node.inputs[2], 1.0):
            return "it does not count in int64 by 1"
        if first is None or last is None or len(first.entries) != 1 or len(last.entries) != 1:
            return "how far it counts is not known"
        start, limit = first.entries[0], last.entries[0]
        for size in (limit, start):
            if not size.is_size:
                return "how far it counts is no size" if size is limit else "it starts at no size"
            if self._parts(size) is None:
                return f"no tensor before it has the size {size}"
        zero = self._constant(node, 0)
        made = [ir.node("CumSum", [self._line(limit, node), zero], attributes={"exclusive": 1})]
        if start.number != 0:
            skipped = ir.node("Shape", [self._line(start, node)])
            ends, axes = self._constant(node, [END]), self._constant(node, [0])
            cut = ir.node("Slice", [made[0].outputs[0], skipped.outputs[0], ends, axes])
            made += [skipped, cut]
        for new in made:
            _name(new, f"{output.name}_{new.op_type.lower()}", INT64)
        self._replace(output, made)
        return None

    def _stretch(self, node: ir.Node, have: Sizes) -> str | None:
        """Stretch a value of these sizes to what `node`, an Expand or ConstantOfShape, gives."""
        target = self.facts.content(node.inputs[-1])
        if target is None or not target.entries or not all(e.is_size for e in target.entries):
            return "the sizes that it stretches to are not known"
        rank = max(len(have), len(target.entries))
        have, want = ((ONE,) * (rank - len(s)) + s for s in (have, target.entries))
        steps: list[tuple[ir.Value, list[ir.Node]]] = []
        if (view := self._view(have, want)) is not None:
            steps = [view]
        else:
            longer = [i for i in range(rank) if want[i] not in (have[i], ONE)]
            lacking = [i for i in longer if self._parts(want[i]) is None]
            if lacking:
                return f"no tensor before it has the size {want[lacking[0]]}"
            numbers = [want[i].number if i in longer else 1 for i in range(rank)]
            if not longer or any(n not in (None, 1) for n in numbers):
                steps.append((self._constant(node, [1 if n is None else n for n in numbers]), []))
            for axis in (i for i in range(rank) if numbers[i] is None):
                line = self._line(want[axis], node)
                steps.append(self._sizes(line, [], [i for i in range(rank) if i != axis]))
        value = node.inputs[0]
        if node.op_type == "ConstantOfShape":
            given = node.attributes.get_tensor("value", None)
            number = np.zeros(1, np.float32) if given is None else given.numpy().reshape(1)
            value = edit.constant(self.graph, f"{node.outputs[0].name}_value", number)
        made: list[ir.Node] = []
        for sizes, nodes in steps:
            made += [*nodes, ir.node("Expand", [value, sizes])]
            value = made[-1].outputs[0]
            _name(made[-1], f"{node.outputs[0].name}_{len(made)}", node.outputs[0].type)
        self._replace(node.outputs[0], made)
        return None

    def _replace(self, old: ir.Value, made: list[ir.Node]) -> None:
        edit.replace(old, made[-1].outputs[0], made)
        for node in made:
            self.facts.visit(node)
        self._see(made[-1].outputs)

    # ---- where sizes are read ------------------------------------------------------------------

    def _view(self, have: Sizes, want: Sizes) -> tuple[ir.Value, list[ir.Node]] | None:
        """The sizes of one tensor that stretch `have` to `want`, and the nodes that read them."""
        for value in self.seen:
            places = _places(self.facts.shape(value) or (), have, want)
            if places is not None:
                gone = [axis for axis, place in enumerate(places) if place is None]
                new = [axis for axis in range(len(want)) if axis not in places]
                return self._sizes(value, gone, new)
        return None

    def _sizes(
        self, value: ir.Value, gone: list[int], new: list[int]
    ) -> tuple[ir.Value, list[ir.Node]]:
        """Shape of `value` without the axes that are `gone`, and with `new` ones of size 1."""
        nodes: list[ir.Node] = []
        view = value
        for op, axes in (("Squeeze", gone), ("Unsqueeze", new)):
            if axes:
                index = edit.constant(self.graph, f"{value.name}_axes", np.array(axes, np.int64))
                nodes.append(ir.node(op, [view, index]))
                view = _name(nodes[-1], f"{value.name}_{op.lower()}", value.type)
        nodes.append(ir.node("Shape", [view]))
        return _name(nodes[-1], f"{value.name}_sizes", INT64), nodes

    def _parts(self, size: Size) -> list[Size] | None:
        """The sizes that add up to `size`: numbers, and what a tensor made so far has."""
        if size.number is None and self._place(size) is not None:
            return [size]
        parts = [Size((term,)) for term in size.terms]
        if all(self._place(p) if p.number is None else p.number > 0 for p in parts):
            return parts
        return None

    def _line(self, size: Size, at: ir.Node) -> ir.Value:
        """Ones on the device, as many as `size`, made before `at` or earlier."""
        if size in self.lines:
            return self.lines[size]
        place = self._place(size)
        if size.number is not None:
            line = edit.constant(self.graph, "ones", np.ones(size.number, np.int64))
        elif place is not None:
            value, axis = place
            one = edit.constant(self.graph, "one", np.ones(1, np.int64))
            length = ir.node("Shape", [value], attributes={"start": axis, "end": axis + 1})
            made = [length, ir.node("Expand", [one, length.outputs[0]])]
            _name(length, f"{value.name}_{axis}_size", INT64)
            line = _name(made[-1], f"{value.name}_{axis}_ones", INT64)
            self.graph.insert_before(at, made)
        else:
            lines = [self._line(part, at) for part in self._parts(size) or ()]
            joined = ir.node("Concat", lines, attributes={"axis": 0})
            line = _name(joined, f"{lines[0].name}_joined", INT64)
            self.graph.insert_before(at, joined)
        self.lines[size] = line
        return line

    def _place(self, size: Size) -> tuple[ir.Value, int] | None:
        """A tensor made so far with an axis of this size, and the axis."""
        for value in self.seen:
            sizes = self.facts.shape(value) or ()
            if size in sizes:
                return value, sizes.index(size)
        return None

    def _constant(self, node: ir.Node, numbers: int | Sequence[int]) -> ir.Value:
        name = f"{node.outputs[0].name}_numbers"
        return edit.constant(self.graph, name, np.array(numbers, np.int64))


def _name(node: ir.Node, name: str, type_: ir.TypeProtocol | None) -> ir.Value:
    """The output of `node`, with a name and a type."""
    output = node.outputs[0]
    output.name, output.type = name, type_
    return output


def _is_computed(target: ir.Value | None) -> bool:
    """Whether a target is made by arithmetic: neither a constant nor what a Shape gives."""
    node = None if target is None else target.producer()
    return node is not None and node.op_type not in ("Shape", "Constant")


def _places(sizes: Sizes, have: Sizes, want: Sizes) -> list[int | None] | None:
    """The axis of `want` that each axis of a tensor fills, in order; None for one of size 1.

    Where `want` says 1, the tensor may have what `have` has; and where they say the same, 1.
    """
    found: list[int | None] = []
    at = 0
    for size in sizes:
        fills = (i for i in range(at, len(want)) if size == (have if want[i] == ONE else want)[i])
        place = next(fills, None) if size != ONE else None
        if place is None and size != ONE:
            return None
        found.append(place)
        at = at if place is None else place + 1
    left = [i for i in range(len(want)) if i not in found]
    return found if all(want[i] in (ONE, have[i]) for i in left) else None
