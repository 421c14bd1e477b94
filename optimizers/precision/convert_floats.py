"""Compute in fp16 or bf16: types follow from node to node, and Casts stand where they must."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

import onnx_ir as ir
import onnx_ir.passes.common as common

from ..clean.infer_shapes import InferShapes
from ..outcome import Outcome
from .float_plan import Plan, filled, is_source, takes_any
from .float_ranges import FLOAT, Unfit, constants, ends_in_softmax, half_of, unfit
from .float_rules import MASK_ATTRIBUTE


class ConvertFloats(ir.passes.InPlacePass):
    """Compute in fp16 or bf16 what is computed in float32.

    ```
    g (float[batch, 8] x) => (float[batch, 8] y) <float[8, 8] w = ...> {
        a = MatMul(x, w)  y = Softmax(a)
    }
    ->
    g (float[batch, 8] x) => (float[batch, 8] y) <float16[8, 8] w = ...> {
        x_fp16 = Cast<to=10>(x)  a = MatMul(x_fp16, w)
        y_fp16 = Softmax(a)      y = Cast<to=1>(y_fp16)
    }
    ```

    Weights become weights of the type, one tensor at a time; those on disk when they are written.
    float64 and all integers are left alone. A Cast stands where a value of one type has readers
    of the other, one for all of them; what an exporter casts to float32 is cast to where it is
    read, and nothing that only moves numbers is converted between two nodes that stay.

    What stays in float32, each with a note: what `keep` names; ops that have no such type in
    onnx's schema, or are in the tables of float_rules.py; positions and angles (what goes into
    Sin, Cos, Range, or a Cast to integers); readers of a constant that the type cannot hold, and
    of an epsilon that would be 0, up to the division. Masks are cut instead (float_ranges.py).
    Attention gets `softmax_precision` float32; norms accumulate in it anyway.

    A graph with functions, without float32, or with a value of unknown type is refused. Of a mask
    that is an input of float32, the lowest float becomes -inf in fp16.

    Args:
        precision: fp16 or bf16.
        keep: Nodes that stay in float32: by name, or by the module that they come from (or that
            is inside of it).
        keep_io: Whether inputs and outputs stay float32, with one Cast each. Where False, the
            signature changes, and it is the caller who has to know.
        half: Names of inputs and outputs that do not stay even so: a cache that is appended to in
            place has to be of the type that its kernel computes in.

    Raises:
        UsageError: There is no such precision.
    """

    def __init__(
        self,
        precision: str,
        *,
        keep: Collection[str] = (),
        keep_io: bool = True,
        half: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.half = half_of(precision)
        self.keep = frozenset(keep)
        self.keep_io, self.half_io = keep_io, frozenset(half)
        self.changes_signature = not keep_io or bool(half)  # the pipeline reads it

    def call(self, model: ir.Model) -> Outcome:
        """Decide for each node, then for each value, then rewire."""
        if model.functions:
            names = sorted(f.name for f in model.functions.values())
            return _refuse(model, f"it has functions, to be inlined first: {', '.join(names)}")
        inferred = any(map(_is_untyped, _values(model))) and InferShapes()(model).modified
        if (reason := _unready(model)) is not None:
            return Outcome(model, inferred, notes=_refuse(model, reason).notes)
        bad = unfit(model, self.half)
        plan = Plan(model, self.half, self.keep, bad)
        writer = _Writer(model, self, plan, bad)
        hits = writer.write()
        if writer.changed:
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
        return Outcome(
            model,
            inferred or writer.changed,
            hits=hits,
            notes=(*plan.notes(), *writer.notes),
        )


def _refuse(model: ir.Model, reason: str) -> Outcome:
    return Outcome(model, False, notes=(f"left in float32: {reason}",))


def _unready(model: ir.Model) -> str | None:
    floats = False
    for value in _values(model):
        floats = floats or value.dtype == FLOAT
        if _is_untyped(value):
            return f"the type of {value.name!r} is not known"
    return None if floats else "it has no float32"


def _is_untyped(value: ir.Value) -> bool:
    return value.type is None and bool(value.uses() or value.is_graph_output())


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


Wanted = tuple[ir.DataType, bool]
"""What a reader wants a value to be: its type, and whether it is to be cut as a mask."""


class _Writer:
    """Gives each value its type and each reader the value that it wants."""

    def __init__(
        self, model: ir.Model, convert: ConvertFloats, plan: Plan, bad: list[Unfit]
    ) -> None:
        self.model, self.plan, self.half = model, plan, convert.half
        self.keep_io, self.half_io = convert.keep_io, convert.half_io
        self.constants = dict(constants(model))
        self.masks = {(b.value, *b.edge) for b in bad if b.role == "mask"}
        self.made: dict[tuple[ir.Value, Wanted], ir.Value] = {}
        self.halves = {
            value
            for node in plan.nodes
            if (found := plan.converts(node)) is not None
            for value, follows in zip(node.outputs, found.outputs, strict=True)
            if follows
        }
        self.notes: list[str] = []
        self.changed = False

    def write(self) -> int:
        """Rewire the graph; how many nodes compute in the type now."""
        inputs = (v for v in self.model.graph.inputs if v.dtype == FLOAT)
        self.halves |= {v for v in inputs if not self.keep_io or v.name in self.half_io}
        edges = list(self._edges())
        self._convert_constants(edges)
        self._write_outputs()
        for node, index, value, wanted in edges:
            given = self._get(value, wanted)
            if given is not value:
                node.replace_input_with(index, given)
                self.changed = True
        converted = [node for node in self.plan.nodes if self.plan.converts(node) is not None]
        for node in converted:
            self._set_attributes(node)
        for value in self.halves:
            value.type = ir.TensorType(self.half.dtype)
            if value.const_value is not None:  # the default of an input
                value.const_value = self._narrowed(value.const_value, mask=False)
        self._drop_casts()
        self.changed = self.changed or bool(self.halves) or bool(converted)
        return len(converted)

    def _edges(self) -> Iterator[tuple[ir.Node, int, ir.Value, Wanted]]:
        for node in self.plan.nodes:
            found = self.plan.converts(node)
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype != FLOAT:
                    continue
                half = found is not None and found.inputs[index]
                if takes_any(node):
                    half = value in self.halves  # it takes what there is
                mask = (value, node, index) in self.masks
                yield node, index, value, (self.half.dtype if half else FLOAT, mask)

    def _convert_constants(self, edges: list[tuple[ir.Node, int, ir.Value, Wanted]]) -> None:
        """Weights that all readers want alike are converted where they are, names and all."""
        wants: dict[ir.Value, set[Wanted]] = defaultdict(set)
        for _, _, value, wanted in edges:
            if value in self.constants:
                wants[value].add(wanted)
        for value, alike in wants.items():
            if any(mask for _, mask in alike):
                self.notes.append(
                    f"the mask {value.name!r} is cut at {self.half.mask:.6g}: {self.half.name} "
                    "holds no lower number that may be added to a score"
                )
            if len(alike) > 1 or value.producer() is not None or value.is_graph_output():
                continue
            dtype, mask = next(iter(alike))
            if dtype != FLOAT or mask:
                value.const_value = self._tensor(self.constants[value], dtype, mask=mask)
                value.type = ir.TensorType(dtype)
                self.changed = True
            self.made[value, (dtype, mask)] = value

    def _write_outputs(self) -> None:
        for graph in self.model.graphs():
            main = graph is self.model.graph
            for index, value in enumerate(graph.outputs):
                half = main and (not self.keep_io or value.name in self.half_io)
                wanted = self.half.dtype if half else FLOAT
                have = self.half.dtype if value in self.halves else value.dtype
                if value.dtype != FLOAT or have == wanted or value.is_graph_input():
                    continue
                if value.is_initializer():
                    continue  # there is nothing to compute: it stays what it is
                made = self._get(value, (wanted, False), graph if not main else None)
                graph.outputs[index] = made
                self.changed = True
                if main:  # the name belongs to the output
                    made.name, value.name = value.name, f"{value.name}_{self._suffix(have)}"

    def _get(self, value: ir.Value, wanted: Wanted, graph: ir.Graph | None = None) -> ir.Value:
        """The value as a reader wants it: itself, a constant, or what a Cast gives."""
        dtype, mask = wanted
        if (value, wanted) in self.made:
            return self.made[value, wanted]
        if value in self.constants:
            if wanted == (FLOAT, False):
                return value
            made = self._new_constant(value, dtype, mask=mask)
        elif dtype == (self.half.dtype if value in self.halves else FLOAT):
            return value
        else:
            made = self._cast(value, dtype, graph)
        self.made[value, wanted] = made
        return made

    def _new_constant(self, value: ir.Value, dtype: ir.DataType, *, mask: bool) -> ir.Value:
        node = value.producer()
        graph = value.graph if node is None else node.graph
        assert isinstance(graph, ir.Graph)
        name = f"{value.name}_{self._suffix(dtype)}" + "_mask" * mask
        while name in graph.initializers:
            name += "_"
        tensor = self._tensor(self.constants[value], dtype, mask=mask)
        made = ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=value.shape)
        tensor.name = name
        graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType, into: ir.Graph | None) -> ir.Value:
        """`value` in another type; what an exporter cast to float32 is cast from its source."""
        node, source = value.producer(), value
        if node is not None and is_source(node) and node.inputs[0] is not None:
            source = node.inputs[0]
            if dtype == (self.half.dtype if source in self.halves else source.dtype):
                return source
        elif dtype != FLOAT and value.is_graph_input() and ends_in_softmax(value):
            self.notes.append(
                f"the input {value.name!r} is a mask of float32: what is below "
                f"{-self.half.highest:.6g} becomes -inf in {self.half.name}"
            )
        cast = ir.node("Cast", [source], attributes={"to": int(dtype)})
        made = cast.outputs[0]
        made.name, made.shape = f"{value.name}_{self._suffix(dtype)}", value.shape
        made.type = ir.TensorType(dtype)
        if into is not None:  # the output of a body, whose value may be one of the outer graph
            into.append(cast)
        elif node is not None:
            assert node.graph is not None
            node.graph.insert_after(node, cast)
        else:
            graph = value.graph
            assert graph is not None
            graph.insert_before(graph[0], cast)
        return made

    def _suffix(self, dtype: ir.DataType | None) -> str:
        return "fp32" if dtype == FLOAT else self.half.name

    def _tensor(
        self, tensor: ir.TensorProtocol, dtype: ir.DataType, *, mask: bool
    ) -> ir.TensorProtocol:
        if dtype == FLOAT:
            return ir.tensor(self.half.cut(tensor.numpy(), mask=mask), name=tensor.name)
        return self._narrowed(tensor, mask=mask)

    def _narrowed(self, tensor: ir.TensorProtocol, *, mask: bool) -> ir.TensorProtocol:
        """Converted now where it is in memory, which frees it; when it is written if on disk."""

        def narrow() -> ir.TensorProtocol:
            return ir.tensor(self.half.narrow(tensor.numpy(), mask=mask), dtype=self.half.dtype)

        if not isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):
            made = narrow()
            made.name = tensor.name
            return made
        shape = ir.Shape(tensor.shape.numpy())
        return ir.LazyTensor(narrow, dtype=self.half.dtype, shape=shape, name=tensor.name)

    def _set_attributes(self, node: ir.Node) -> None:
        if node.op_type == "ConstantOfShape":
            number = self.half.narrow(filled(node), mask=ends_in_softmax(node.outputs[0]))
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(number))
        if node.op_type == "Attention" and node.domain == "":
            node.attributes.setdefault(
                "softmax_precision", ir.AttrInt64("softmax_precision", int(FLOAT))
            )
        lowest = node.attributes.get_float(MASK_ATTRIBUTE, 0.0)
        if lowest < self.half.mask:
            node.attributes[MASK_ATTRIBUTE] = ir.AttrFloat32(MASK_ATTRIBUTE, self.half.mask)

    def _drop_casts(self) -> None:
        """What an exporter cast to this very type is of it by now."""
        for node in self.plan.nodes:
            if node.op_type != "Cast" or node.domain != "" or node.outputs[0].is_graph_output():
                continue
            source, made = node.inputs[0], node.outputs[0]
            if source is not None and source.dtype == made.dtype == self.half.dtype:
                made.replace_all_uses_with(source)
                self.changed = True
