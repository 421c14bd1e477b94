"""Take a graph that somebody exported years ago to the opset that lifted ops are written in.

Most ops of a newer opset only take more types, so that a node is right as it stands. What
follows is the whole list of those whose meaning or form changed between opset 7 and 23, found by
comparing the schemas of onnx 1.23, version by version, and held against ONNX Runtime.

Neither converter at hand will do (onnx 1.23.2, onnxscript 0.7.2): both are silent about what they
get wrong, such as Hardmax before 13, Resize of 10, and GroupNormalization of 18 to 20.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from ..dims import dim
from ..outcome import Outcome, describe
from ..read import constant, rank
from .infer_shapes import InferShapes

OLDEST = 7  # before it, binary ops broadcast by attributes
NEWEST = 26  # what ONNX Runtime 1.31 and 1.32 read
IR_VERSION = 11  # the first that knows opset 23, and one that ONNX Runtime takes

Edit = Callable[[], None]
Judge = Callable[[ir.Node, int], Edit | str]
_Body = ir.Model | ir.Function


class ConvertOpset(ir.passes.InPlacePass):
    """Take a graph of opset 7 to 22 to opset 23: all of it, or none.

    ```
    <opset_import: ["" : 12]>
    a = Unsqueeze<axes=[1]>(x)  y = Softmax<axis=1>(a)         with a [2, 1, 8]
    ->
    <opset_import: ["" : 23]>
    axes = Constant<value=[1]>()  a = Unsqueeze(x, axes)
    shape = Shape(a)  rows = Flatten<axis=1>(a)
    p = Softmax<axis=-1>(rows)  y = Reshape(p, shape)
    ```

    Nodes keep their names, outputs and metadata; weights are not touched. Subgraphs and local
    functions are converted with the graph, nodes of other domains stay. Every node is judged
    before the first one is changed: where one cannot be said in opset 23, the graph stays at its
    opset, and the notes name the node and the reason.
    """

    def __init__(self, to: int = 23) -> None:
        super().__init__()
        if to != 23:
            raise ValueError(f"this pass knows the way to opset 23, not to {to}")
        self.to = to

    def call(self, model: ir.Model) -> Outcome:
        """Judge all nodes, then change them."""
        opsets = _opsets(model)
        if len(opsets) != 1:
            note = f"left alone: the model imports opsets {opsets} of ai.onnx"
            return Outcome(model, False, notes=(note,) if opsets else ())
        opset = opsets[0]
        renamed = model.opset_imports.pop("ai.onnx", None) is not None  # as nodes have it: ""
        model.opset_imports[""] = opset
        if not OLDEST <= opset < self.to:
            note = f"left at opset {opset}: conversion begins at opset {OLDEST}"
            if opset > NEWEST:
                note = f"left at opset {opset}, which is newer than onnxruntime 1.31 reads"
            notes = () if self.to <= opset <= NEWEST else (note,)
            return Outcome(model, renamed, hits=int(renamed), notes=notes)

        bodies: list[_Body] = [model, *model.functions.values()]
        inferred = any(
            node.op_type in SHAPED and opset < CHANGES[node.op_type][0]
            for node in ir.traversal.RecursiveGraphIterator(model.graph)
        )  # some judges ask for a rank or a type
        inferred = inferred and InferShapes()(model).modified
        edits, said = [], []
        for body in bodies:
            own = _opsets(body) or [opset]
            if len(own) > 1 or not OLDEST <= own[0] <= self.to:
                said.append(f"function {body.graph.name!r} imports opsets {own} of ai.onnx")
                continue
            for node in _nodes(body):
                edit = _judge(node, own[0], self.to)
                if isinstance(edit, str):
                    said.append(f"{describe(node)}: {edit}")
                elif edit is not None:
                    edits.append(edit)
        if said:
            left = f"left at opset {opset}: {len(said)} parts cannot be said in opset {self.to}"
            return Outcome(model, renamed or inferred, notes=(left, *said))

        for edit in edits:
            edit()
        for body in bodies:
            for node in _nodes(body):
                node.version = self.to if node.version is not None else None
            if _opsets(body):
                body.opset_imports.pop("ai.onnx", None)
                body.opset_imports[""] = self.to
        if not IR_VERSION <= (model.ir_version or 0) <= IR_VERSION + 2:
            model.ir_version = IR_VERSION
        if edits:
            common.NameFixPass()(model)
        return Outcome(model, True, hits=len(edits) or 1)


def _opsets(body: _Body) -> list[int]:
    imports = body.opset_imports
    return sorted({imports[domain] for domain in ("", "ai.onnx") if domain in imports})


def _nodes(body: _Body) -> list[ir.Node]:
    return [n for n in ir.traversal.RecursiveGraphIterator(body.graph) if n.domain == ""]


def _judge(node: ir.Node, opset: int, to: int) -> Edit | str | None:
    """What makes `node` of `opset` one of opset `to`: nothing, an edit, or why there is none."""
    if node.op_type == "SimplifiedLayerNormalization":
        return None  # ONNX Runtime's own, in this domain and of one version for all opsets
    if not onnx.defs.has(node.op_type, ""):
        return "ai.onnx has no such op"
    since, judge = CHANGES.get(node.op_type, (0, None))
    if judge is not None and opset < since:
        if any(a.is_ref() for a in node.attributes.values()):
            return "an attribute is an argument of the function"
        return judge(node, opset)
    # The list above is whole as far as we know; the schemas catch what it lacks.
    try:
        old, new = (onnx.defs.get_schema(node.op_type, at, "") for at in (opset, to))
    except onnx.defs.SchemaError:
        return f"opset {opset} has no such op"
    if old.since_version == new.since_version:
        return None
    if new.deprecated:
        return f"deprecated in opset {new.since_version}"
    if unknown := sorted(set(node.attributes) - set(new.attributes)):
        return f"attribute {unknown[0]!r} is gone in opset {new.since_version}"
    if not new.min_input <= len(node.inputs) <= new.max_input:
        return f"{len(node.inputs)} inputs, opset {new.since_version} wants {new.min_input} or more"
    for name, attribute in new.attributes.items():
        if attribute.required and name not in node.attributes:
            return f"opset {new.since_version} wants the attribute {name!r}"
    return None


# How an edit writes ---------------------------------------------------------------------------


def _before(
    node: ir.Node, op: str, inputs: Sequence[ir.Value | None], **attributes: int
) -> ir.Value:
    """The output of a new node that stands before `node` and is named after it."""
    new = ir.node(op, list(inputs), attributes=attributes)
    return _insert(node, new, op.lower())


def _insert(node: ir.Node, new: ir.Node, what: str) -> ir.Value:
    new.outputs[0].name = f"{node.outputs[0].name}_{what}"
    new.metadata_props.update(node.metadata_props)
    body = node.graph
    assert body is not None
    body.insert_before(node, new)
    return new.outputs[0]


def _constant(node: ir.Node, what: str, numbers: np.ndarray | list[int] | int) -> ir.Value:
    array = numbers if isinstance(numbers, np.ndarray) else np.array(numbers, np.int64)
    # A node rather than an initializer: functions have no initializers.
    value = ir.AttrTensor("value", ir.tensor(array))
    output = _insert(node, ir.Node("", "Constant", [], [value]), what)
    output.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    output.shape = ir.Shape(array.shape)
    return output


def _set_inputs(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


# One judge for each change of meaning ----------------------------------------------------------


def _moved(*names: str) -> Judge:
    """Attributes that became inputs, in this order; numbers of the tensor's own type among them."""

    def judge(node: ir.Node, opset: int) -> Edit | str:
        x = node.inputs[0]
        given = [node.attributes.get(name) for name in names]
        dtype = None if x is None else x.dtype
        if dtype is None and any(a is not None and a.type == ir.AttributeType.FLOAT for a in given):
            return "the type of its input is not known"

        def edit() -> None:
            inputs = [x]
            for attribute in given:
                if attribute is None:
                    inputs.append(None)
                else:
                    inputs.append(_constant(node, attribute.name, _array(attribute, dtype)))
                    node.attributes.pop(attribute.name)
            _set_inputs(node, inputs)

        return edit

    return judge


def _array(attribute: ir.Attr, dtype: ir.DataType | None) -> np.ndarray:
    match attribute.type:
        case ir.AttributeType.FLOAT:
            assert dtype is not None
            return np.array(attribute.as_float(), dtype.numpy())
        case ir.AttributeType.FLOATS:
            return np.array(list(attribute.as_floats()), np.float32)
        case ir.AttributeType.INT:
            return np.array([attribute.as_int()], np.int64)
    return np.array(list(attribute.as_ints()), np.int64)


def _split(node: ir.Node, opset: int) -> Edit | str:
    """Sizes were an attribute; equal parts are said by their number."""
    if "split" in node.attributes:
        return _moved("split")(node, opset)
    if _input(node, 1) is not None:
        return lambda: None
    return lambda: node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))


def _coerced(node: ir.Node, opset: int) -> Edit | str:
    """Softmax, LogSoftmax and Hardmax ran over all axes from `axis` (1 by default) to the last."""

    def edit() -> None:
        axis = node.attributes.get_int("axis", 1)
        x = node.inputs[0]
        if axis == -1 or axis + 1 == rank(x):
            node.attributes.add(ir.AttrInt64("axis", -1))
            return
        shape = _before(node, "Shape", [x])
        rows = _before(node, "Flatten", [x], axis=axis)
        result = _before(node, node.op_type, [rows], axis=-1)
        node.op_type = "Reshape"
        node.attributes.pop("axis", None)
        _set_inputs(node, [result, shape])

    return edit


def _inference(node: ir.Node, opset: int) -> Edit | str:
    """Dropout and BatchNormalization had further outputs and attributes, of training."""
    if opset < 9 and node.attributes.get_int("spatial", 1) != 1:
        return "spatial is 0, which opset 9 dropped"
    for value in node.outputs[1:]:
        if value.uses() or value.is_graph_output():
            return f"its output {value.name!r} is read, whose meaning changed"

    def edit() -> None:
        for name in ("ratio", "spatial"):
            node.attributes.pop(name, None)
        node.resize_outputs(1)

    return edit


def _upsample(node: ir.Node, opset: int) -> Edit | str:
    """Became Resize, in whose words it is asymmetric and takes the floor."""

    def edit() -> None:
        if (scales := node.attributes.pop("scales", None)) is not None:
            _set_inputs(node, [node.inputs[0], _constant(node, "scales", _array(scales, None))])
        _resize_as_upsample(node)

    return edit


def _resize_as_upsample(node: ir.Node) -> None:
    node.op_type = "Resize"
    node.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
    node.attributes.add(ir.AttrString("nearest_mode", "floor"))
    _set_inputs(node, [node.inputs[0], None, node.inputs[1]])


def _resize(node: ir.Node, opset: int) -> Edit | str:
    """Opset 10 had Upsample's form; in 11 an empty tensor stood for an input that is not given."""
    if opset < 11:
        scales = constant(_input(node, 1))
        if node.attributes.get_string("mode", "nearest") == "nearest" and (
            scales is None or (scales < 1).any()
        ):
            return "opset 10 does not say how nearest rounds where a scale is below 1"
        return lambda: _resize_as_upsample(node)
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if mode == "tf_half_pixel_for_nn":
        return "coordinate_transformation_mode is tf_half_pixel_for_nn, which opset 13 dropped"
    inputs = list(node.inputs)
    for index in range(1, len(inputs)):
        array = constant(inputs[index])
        if array is not None and not array.size:
            inputs[index] = None
    if len(inputs) > 3 and inputs[2] is not None and inputs[3] is not None:
        return "it has scales and sizes, and opset 13 takes one of them"
    return lambda: _set_inputs(node, inputs)


def _grid_sample(node: ir.Node, opset: int) -> Edit | str:
    """The modes were named after two dimensions."""
    mode = node.attributes.get_string("mode", "bilinear").removeprefix("bi")
    return lambda: node.attributes.add(ir.AttrString("mode", mode))


def _group_normalization(node: ir.Node, opset: int) -> Edit | str:
    """Scale and bias were one number for each group, and are one for each channel."""
    x, groups = node.inputs[0], node.attributes.get_int("num_groups", 0)
    channels = dim(x, 1) if (rank(x) or 0) > 1 else None
    if not isinstance(channels, int) or not groups or channels % groups:
        return f"its channels are {channels}, in {groups} groups"
    if any(rank(v) != 1 or dim(v, 0) != groups for v in node.inputs[1:3]):
        return f"its scale and bias are not known to have {groups} numbers, one for each group"

    def edit() -> None:
        inputs = [x]
        for value in node.inputs[1:3]:
            column = _before(node, "Unsqueeze", [value, _constant(node, "axis", [1])])
            each = _constant(node, "each", [1, channels // groups])
            spread = _before(node, "Expand", [column, each])
            inputs.append(_before(node, "Reshape", [spread, _constant(node, "flat", [-1])]))
        _set_inputs(node, inputs)

    return edit


def _dft(node: ir.Node, opset: int) -> Edit | str:
    """The axis was an attribute with another default."""

    def edit() -> None:
        axis = node.attributes.pop("axis", None)
        number = _constant(node, "axis", 1 if axis is None else axis.as_int())
        _set_inputs(node, [node.inputs[0], _input(node, 1), number])

    return edit


def _scatter(node: ir.Node, opset: int) -> Edit | str:
    """Was given another name."""

    def edit() -> None:
        node.op_type = "ScatterElements"

    return edit


def _refused(reason: str) -> Judge:
    return lambda node, opset: reason


CHANGES: dict[str, tuple[int, Judge]] = {
    **{
        f"Reduce{kind}": (18, _moved("axes"))
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
    },
    **{op: (13, _moved("axes")) for op in ("ReduceSum", "Squeeze", "Unsqueeze")},
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), (13, _coerced)),
    **{
        op: (22, _refused("onnxruntime 1.32 has no CPU kernel for it from opset 22 on"))
        for op in (
            *("GlobalLpPool", "MaxRoiPool", "Multinomial", "RoiAlign"),
            *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"),
        )
    },
    "BatchNormalization": (14, _inference),
    "Clip": (11, _moved("min", "max")),
    "DFT": (20, _dft),
    "Dropout": (12, _inference),
    "GridSample": (20, _grid_sample),
    "GroupNormalization": (21, _group_normalization),
    "Pad": (11, _moved("pads", "value")),
    "Resize": (13, _resize),
    "Scan": (9, _refused("opset 8 scans along a batch, which opset 9 dropped")),
    "Scatter": (11, _scatter),
    "Slice": (10, _moved("starts", "ends", "axes")),
    "Split": (18, _split),
    "TopK": (10, _moved("k")),
    "Upsample": (10, _upsample),
}
"""Ops whose meaning, form or kernel changed, each with the opset that changed it."""

SHAPED = {"Softmax", "LogSoftmax", "Hardmax", "Clip", "Pad", "GroupNormalization"}
