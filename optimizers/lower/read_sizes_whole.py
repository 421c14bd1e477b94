"""Read sizes whole from a tensor, for providers that would compute with them on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .. import edit
from ..clean.contents import Sizes
from ..clean.facts import BROADCAST, END, Facts
from ..clean.sizes import Size
from ..outcome import Outcome, describe
from ..read import is_scalar

ONE, INT64 = Size.of(1), ir.TensorType(ir.DataType.INT64)


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

    Declined, with a note: a size that no tensor before it has, and a Range of other steps.
    """

    def call(self, model: ir.Model) -> Outcome:
        """Visit nodes in graph order: a tensor to read from must be made before."""
        sweep = _Sweep(model)
        for node in list(model.graph):
            sweep.visit(node)
        if sweep.hits:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(model, bool(sweep.hits), hits=sweep.hits, notes=tuple(sweep.notes))


class _Sweep:
    """One walk over the main graph; `seen` are the values made so far whose sizes are known."""

    def __init__(self, model: ir.Model) -> None:
        self.graph, self.facts, self.hits = model.graph, Facts(model), 0
        self.notes: list[str] = []
        self.seen = [v for v in model.graph.inputs if v.shape is not None]
        self.ones: dict[Size, ir.Value] = {}

    def visit(self, node: ir.Node) -> None:
        """Learn what `node` makes, then let it read sizes whole."""
        self.facts.visit(node)
        reason = self._rewrite(node) if node.domain in ("", "ai.onnx") else ""
        if reason is None:
            self.hits += 1
        elif reason:
            self.notes.append(f"{describe(node)}: {reason}")
        self.seen += [v for v in node.outputs if self.facts.shape(v) is not None]

    def _rewrite(self, node: ir.Node) -> str | None:
        """Why not, in words; "" where there is nothing to do."""
        if node.op_type == "Range":
            return self._range(node)
        if node.op_type == "Expand" and _is_computed(node.inputs[1]):
            x, value = self.facts.shape(node.inputs[0]), node.inputs[0]
            return "the shape of its input is not known" if x is None else self._to(node, value, x)
        if node.op_type == "ConstantOfShape" and _is_computed(node.inputs[0]):
            given = node.attributes.get_tensor("value", None)
            number = np.zeros(1, np.float32) if given is None else given.numpy().reshape(1)
            value = edit.constant(self.graph, f"{node.outputs[0].name}_value", number)
            return self._to(node, value, (ONE,))
        if node.op_type in BROADCAST and self.facts.content(node.outputs[0]) is None:
            return self._numbers(node)
        return ""

    def _numbers(self, node: ir.Node) -> str | None:
        """Sizes that `node`, which computes on the device, adds up or compares: sums of ones."""
        found: str | None = ""
        for index, value in enumerate(node.inputs):
            content = self.facts.content(value) if _is_computed(value) else None
            if content is None or value is None or value.dtype != ir.DataType.INT64:
                continue
            if content.numbers is not None or len(content.entries) > 1 or content.rank != 0:
                continue
            line = self._line(content.entries[0])
            if line is None:
                return f"no tensor before it has the size {content.entries[0]}"
            total = ir.node("ReduceSum", [line], attributes={"keepdims": 0})
            total.outputs[0].name, total.outputs[0].type = f"{value.name}_number", INT64
            total.outputs[0].shape = ir.Shape([])
            self.graph.insert_before(node, total)
            node.replace_input_with(index, total.outputs[0])
            found = None
        return found

    def _to(self, node: ir.Node, value: ir.Value | None, sizes: Sizes) -> str | None:
        """Stretch `value`, which is of these sizes, to what `node` gives."""
        target = self.facts.content(node.inputs[-1])
        if target is None or not all(e.is_size for e in target.entries) or value is None:
            return "the sizes that it stretches to are not known"
        rank = max(len(sizes), len(target.entries))
        have, want = _padded(sizes, rank), _padded(target.entries, rank)
        if (found := self._view(have, want)) is not None:
            steps = [found]
        else:
            steps = []
            for axis in (i for i in range(rank) if want[i] not in (have[i], ONE)):
                number = want[axis].number
                if number is not None:
                    shape = [number if i == axis else 1 for i in range(rank)]
                    steps.append((self._constant(node, shape), []))
                    continue
                line = self._line(want[axis])
                if line is None:
                    return f"no tensor before it has the size {want[axis]}"
                others = [i for i in range(rank) if i != axis]
                steps.append(self._sizes(line, [], others, node))
        made: list[ir.Node] = []
        for shape_of, nodes in steps:
            made += [*nodes, ir.node("Expand", [value, shape_of])]
            value = made[-1].outputs[0]
            value.name, value.type = f"{node.outputs[0].name}_{len(made)}", node.outputs[0].type
        edit.replace(node.outputs[0], value, made)
        return None

    def _view(self, have: Sizes, want: Sizes) -> tuple[ir.Value, list[ir.Node]] | None:
        """The sizes of one tensor that stretch `have` to `want`, and the nodes that read them."""
        for value in self.seen:
            sizes = self.facts.shape(value) if self._is_at_hand(value) else None
            if sizes is not None and (places := _places(sizes, have, want)) is not None:
                gone = [axis for axis, place in enumerate(places) if place is None]
                new = [axis for axis in range(len(want)) if axis not in places]
                return self._sizes(value, gone, new)
        return None

    def _sizes(
        self, value: ir.Value, gone: list[int], new: list[int], at: ir.Node | None = None
    ) -> tuple[ir.Value, list[ir.Node]]:
        """Shape of `value` without the axes that are `gone`, and with `new` ones of size 1."""
        nodes: list[ir.Node] = []
        view = value
        for op, axes in (("Squeeze", gone), ("Unsqueeze", new)):
            if axes:
                index = edit.constant(self.graph, f"{value.name}_axes", np.array(axes, np.int64))
                nodes.append(ir.node(op, [view, index]))
                view = nodes[-1].outputs[0]
                view.name, view.type = f"{value.name}_{op.lower()}", value.type
        nodes.append(ir.node("Shape", [view]))
        nodes[-1].outputs[0].name, nodes[-1].outputs[0].type = f"{value.name}_sizes", INT64
        return nodes[-1].outputs[0], nodes

    def _range(self, node: ir.Node) -> str | None:
        """Range(a, n, 1) as a running sum of ones: what it counts then lies on the device."""
        start, limit, step = node.inputs
        first, last = self.facts.content(start), self.facts.content(limit)
        output = node.outputs[0]
        if output.dtype != ir.DataType.INT64 or not is_scalar(step, 1.0):
            return "it does not count in int64 by 1"
        if first is None or last is None or not last.entries[0].is_size:
            return "how far it counts is no size"
        if first.numbers is not None and last.numbers is not None:
            return ""
        line = self._line(last.entries[0])
        if line is None:
            return f"no tensor before it has the size {last.entries[0]}"
        zero = edit.constant(self.graph, f"{output.name}_axis", np.zeros((), np.int64))
        made = [ir.node("CumSum", [line, zero], attributes={"exclusive": 1})]
        if first.entries[0].number != 0:
            place = self._place(first.entries[0])
            if place is None:
                return f"no tensor before it has the size {first.entries[0]}"
            ends = [
                edit.constant(self.graph, f"{output.name}_{word}", np.array([n], np.int64))
                for word, n in (("end", END), ("first", 0))
            ]
            size = _size_of(*place)
            cut = ir.node("Slice", [made[0].outputs[0], size.outputs[0], *ends])
            made += [size, cut]
        for new in made:
            new.outputs[0].name, new.outputs[0].type = f"{output.name}_{new.op_type.lower()}", INT64
        edit.replace(output, made[-1].outputs[0], made)
        return None

    def _line(self, size: Size) -> ir.Value | None:
        """Ones on the device, as many as `size`; those of a sum stand one behind another."""
        if size not in self.ones:
            place = self._place(size)
            if place is None:
                return self._joined(size)
            one = edit.constant(self.graph, "one", np.ones(1, np.int64))
            length = _size_of(*place)
            line = ir.node("Expand", [one, length.outputs[0]])
            name = f"{place[0].name}_{place[1]}"
            for made, word in ((length, "size"), (line, "ones")):
                made.outputs[0].name, made.outputs[0].type = f"{name}_{word}", INT64
            if (after := place[0].producer()) is not None:
                self.graph.insert_after(after, [length, line])
            else:
                self.graph.insert_before(self.graph[0], [length, line])
            self.ones[size] = line.outputs[0]
        return self.ones[size]

    def _joined(self, size: Size) -> ir.Value | None:
        """Ones of a sum of sizes, each of which a tensor has."""
        parts = [Size.of(names[0]) for names, factor in size.terms if factor == len(names) == 1]
        if len(parts) < max(2, len(size.terms)):
            return None
        lines = [line for part in parts if (line := self._line(part)) is not None]
        if len(lines) < len(parts):
            return None
        joined = ir.node("Concat", lines, attributes={"axis": 0})
        joined.outputs[0].name, joined.outputs[0].type = f"{lines[0].name}_joined", INT64
        order = {node: i for i, node in enumerate(self.graph)}
        last = max(order[node] for line in lines if (node := line.producer()) is not None)
        self.graph.insert_after(self.graph[last], joined)
        self.ones[size] = joined.outputs[0]
        return joined.outputs[0]

    def _place(self, size: Size) -> tuple[ir.Value, int] | None:
        """A tensor made so far with an axis of this size, and the axis."""
        return next(
            (
                (value, axis)
                for value in self.seen
                if self._is_at_hand(value)
                for axis, found in enumerate(self.facts.shape(value) or ())
                if found == size
            ),
            None,
        )

    def _is_at_hand(self, value: ir.Value) -> bool:
        """Whether its shape may be read: replaced values have no readers, and no types."""
        return value.graph is self.graph and value.dtype is not None and value.const_value is None

    def _constant(self, node: ir.Node, numbers: Sequence[int]) -> ir.Value:
        name = f"{node.outputs[0].name}_target"
        return edit.constant(self.graph, name, np.array(numbers, np.int64))


def _size_of(value: ir.Value, axis: int) -> ir.Node:
    return ir.node("Shape", [value], attributes={"start": axis, "end": axis + 1})


def _is_computed(target: ir.Value | None) -> bool:
    """Whether a target is made by arithmetic: neither a constant nor what a Shape gives."""
    node = None if target is None else target.producer()
    return node is not None and node.op_type not in ("Shape", "Constant")


def _padded(sizes: Sizes, rank: int) -> Sizes:
    return (ONE,) * (rank - len(sizes)) + tuple(sizes)


def _places(sizes: Sizes, have: Sizes, want: Sizes) -> list[int | None] | None:
    """The axis of `want` that each axis of a tensor fills, in order; None for one of size 1.

    Where `have` has a size already, the tensor may have it too, or 1.
    """
    found: list[int | None] = []
    at = 0
    for size in sizes:
        fitting = (i for i in range(at, len(want)) if size in (want[i], have[i]) and size != ONE)
        place = next(fitting, None)
        if place is None and size != ONE:
            return None
        found.append(place)
        at = at if place is None else place + 1
    left = [i for i in range(len(want)) if i not in found]
    return found if all(want[i] in (ONE, have[i]) for i in left) else None
