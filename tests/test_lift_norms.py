"""GELU and the norms, in random spellings: lifted where it is right, else untouched."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.lift.lift_gelu import LiftGelu
from onnxpress.optimizers.lift.lift_layer_normalization import LiftLayerNormalization
from onnxpress.optimizers.lift.lift_rms_normalization import LiftRmsNormalization

FLOAT, HALF, DOUBLE = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE
BRAIN = ir.DataType.BFLOAT16
TOLERANCE = {BRAIN: 2e-2, HALF: 1e-2, FLOAT: 1e-5, DOUBLE: 1e-12}
ROOT = math.sqrt(2 / math.pi)


class Draft:
    """A graph in the making: ops with their operands in a drawn order, constants of drawn rank."""

    def __init__(self, draw, dtype: ir.DataType, sizes: list[int], seed: int = 0) -> None:
        self.draw, self.dtype, self.rng = draw, dtype, np.random.default_rng(seed)
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self.ranks = [0, 1]  # of scalars
        self.x = self.input("x", sizes)

    def input(self, name: str, sizes: list[int]) -> ir.Value:
        self.inputs.append(ir.val(name, self.dtype, sizes))
        return self.inputs[-1]

    def array(self, array: np.ndarray) -> ir.Value:
        value = ir.Value(name=f"c{len(self.constants)}", const_value=ir.tensor(array))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        self.constants.append(value)
        return value

    def number(self, number: float, dtype: ir.DataType | None = None) -> ir.Value:
        sizes = [1] * self.draw(st.sampled_from(self.ranks))
        return self.array(np.full(sizes, number, (dtype or self.dtype).numpy()))

    def op(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def either(self, op_type: str, a: ir.Value, b: ir.Value) -> ir.Value:
        """A commutative op."""
        return self.op(op_type, *((a, b) if self.draw(st.booleans()) else (b, a)))

    def times(self, v: ir.Value, number: float) -> ir.Value:
        if self.draw(st.booleans()):
            return self.op("Div", v, self.number(1 / number))
        return self.either("Mul", v, self.number(number))

    def model(self, *outputs: ir.Value) -> ir.Model:
        graph = ir.Graph(
            self.inputs,
            [],
            nodes=self.nodes,
            initializers=self.constants,
            opset_imports={"": 23},
            name="g",
        )
        model = ir.Model(graph, ir_version=10)
        InferShapes()(model)
        for v in outputs:
            if v.dtype == BRAIN:  # which the CPU returns to nobody
                cast = ir.node("Cast", [v], attributes={"to": FLOAT.value})
                graph.append(cast)
                v = cast.outputs[0]
                v.name = f"y{len(graph.outputs)}"
            graph.outputs.append(v)
        InferShapes()(model)
        return model

    def feeds(self, model: ir.Model) -> dict[str, np.ndarray]:
        return {
            v.name: self.rng.standard_normal([int(d) for d in v.shape]).astype(v.dtype.numpy())
            for v in model.graph.inputs
        }


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def lifted(draft: Draft, model: ir.Model, rewrite: ir.passes.InPlacePass, tolerance: float) -> int:
    """How often `rewrite` hits, after a proof that it is right, or left the graph as it was."""
    feeds, before = draft.feeds(model), ir.to_onnx_text(model)
    signature = [(v.name, v.dtype) for v in model.graph.outputs]
    want = run(model, feeds)
    outcome = rewrite(model)
    assert outcome.modified == bool(outcome.hits)
    if not outcome.hits:
        assert ir.to_onnx_text(model) == before
        return 0
    common.CheckerPass(full_check=True)(model)
    assert [(v.name, v.dtype) for v in model.graph.outputs] == signature
    for a, b in zip(run(model, feeds), want, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(
            a.astype(np.float64), b.astype(np.float64), rtol=tolerance, atol=tolerance
        )
    assert rewrite(model).hits == 0
    return outcome.hits


def product(draft: Draft, factors: list[ir.Value]) -> ir.Value:
    """The factors in a drawn order and association."""
    factors = draft.draw(st.permutations(factors))
    while len(factors) > 1:
        at = draft.draw(st.integers(0, len(factors) - 2))
        factors[at : at + 2] = [draft.either("Mul", *factors[at : at + 2])]
    return factors[0]


def cubic(draft: Draft, a: float, b: float) -> ir.Value:
    """a x + b x**3"""
    x, form = draft.x, draft.draw(st.integers(0, 4))
    if form == 0:  # k (x + c x^3)
        cube = draft.op("Pow", x, draft.number(3.0, FLOAT))
        return draft.times(draft.either("Add", x, draft.times(cube, b / a)), a)
    square = draft.op("Pow", x, draft.number(2.0)) if form == 1 else draft.op("Mul", x, x)
    if form == 2:
        cube = draft.either("Mul", square, x)
        return draft.either("Add", draft.times(x, a), draft.times(cube, b))
    if form == 3:  # x (a + b x^2)
        inner = draft.either("Add", draft.number(a), draft.times(square, b))
        return draft.either("Mul", x, inner)
    inner = draft.either("Add", draft.number(1.0), draft.times(square, b / a))
    return product(draft, [x, inner, draft.number(a)])


def gelu(draft: Draft, curve: str, scale: float) -> ir.Value:
    """A GELU of draft.x; `scale` is 1 where it is one."""
    if curve == "Erf":
        e = draft.op("Erf", draft.times(draft.x, math.sqrt(0.5) * scale))
    elif curve == "Tanh":
        e = draft.op("Tanh", cubic(draft, ROOT, ROOT * 0.044715 * scale))
    else:
        e = draft.op("Sigmoid", cubic(draft, 2 * ROOT * scale, 2 * ROOT * 0.044715))
        return draft.either("Mul", draft.x, e)
    form = draft.draw(st.integers(0, 3))
    if form == 0:
        half = draft.number(0.5)
        return product(draft, [draft.x, draft.either("Add", draft.either("Mul", e, half), half)])
    if form == 1:
        hx = draft.times(draft.x, 0.5)
        return draft.either("Add", hx, draft.either("Mul", hx, e))
    raised = draft.either("Add", e, draft.number(1.0))
    if form == 2:
        return product(draft, [draft.times(draft.x, 0.5), raised])
    return product(draft, [draft.x, draft.number(0.5), raised])


def test_gelu() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def spell(data) -> None:
        curve = data.draw(st.sampled_from(["Erf", "Tanh", "Sigmoid"]))
        dtype = data.draw(
            st.sampled_from([FLOAT, FLOAT, HALF, FLOAT if curve == "Erf" else DOUBLE])
        )
        twist = data.draw(st.sampled_from([*["none"] * 5, "constant", "reader", "rank", "x"]))
        draft = Draft(data.draw, dtype, data.draw(st.sampled_from([[5], [2, 3], [1, 2, 5]])))
        draft.ranks = [3] if twist == "rank" else [0, 1]
        scale = data.draw(st.sampled_from([0.9, 1.01, 1.5])) if twist == "constant" else 1.0
        y = gelu(draft, curve, scale)
        if twist == "x":  # one reader of x reads another value
            z = draft.input("z", list(draft.x.shape))
            node, index = data.draw(st.sampled_from(sorted(draft.x.uses(), key=str)))
            node.replace_input_with(index, z)
        outputs = [y]
        if twist == "reader" and (inner := _behind(draft, curve, y)):
            outputs.append(draft.op("Identity", data.draw(st.sampled_from(inner))))
        hits = lifted(draft, draft.model(*outputs), LiftGelu(), TOLERANCE[dtype])
        if twist == "none":
            assert hits == (dtype != DOUBLE)
        if twist in ("constant", "reader", "x") and (twist != "reader" or len(outputs) > 1):
            assert hits == 0
        if dtype == DOUBLE:
            assert hits == 0
        seen[f"{twist} {hits}"] += 1

    spell()
    assert sum(n for name, n in seen.items() if name.endswith("1")) > 25, seen


def _behind(draft: Draft, curve: str, y: ir.Value) -> list[ir.Value]:
    """What depends on the curve, but for the GELU itself."""
    found = [v for node in draft.nodes if node.op_type == curve for v in node.outputs]
    for v in found:  # grows meanwhile
        found += [out for node, _ in v.uses() for out in node.outputs if out is not y]
    return found if y not in found else []


def inverse(draft: Draft, v: ir.Value) -> tuple[ir.Value, bool]:
    """The root of v, or its inverse; and whether it is inverse."""
    form = draft.draw(st.integers(0, 4))
    if form == 0:
        return draft.op("Pow", v, draft.number(-0.5)), True
    if form == 1:
        return draft.op("Sqrt", draft.op("Reciprocal", v)), True
    root = (
        draft.op("Sqrt", v) if draft.draw(st.booleans()) else draft.op("Pow", v, draft.number(0.5))
    )
    if form == 2:
        return draft.op("Reciprocal", root), True
    if form == 3:
        return draft.op("Div", draft.number(1.0), root), True
    return root, False


def weight(draft: Draft, kind: str, sizes: list[int], axes: int, dtype: ir.DataType) -> ir.Value:
    """A weight that fits (plain, led by ones, an input, widened), or one that only broadcasts."""
    shape = list(sizes[len(sizes) - axes :])
    if kind in ("input", "widened"):
        value = draft.input(f"w{len(draft.inputs)}", shape)
        value.dtype = dtype
        if kind == "widened" and dtype == FLOAT:
            value.dtype = HALF
            return draft.op("Cast", value, to=dtype.value)
        return value
    if kind == "ones":
        shape = [1] * (len(sizes) - axes) + shape
    if kind == "wide":
        shape = list(sizes)
    if kind == "scalar":
        shape = [1]
    array = draft.rng.integers(1, 9, shape) / 4  # float16 can hold it
    return draft.array(array.astype(dtype.numpy()))


def norm(draft: Draft, centered: bool, axes: list[int], count: int, twist: str) -> ir.Value:
    """A norm of draft.x; `twist` is "none" where it is one."""
    draw, sizes = draft.draw, [int(d) for d in draft.x.shape]
    dtype, wide, x = draft.dtype, draft.dtype, draft.x
    if dtype == BRAIN:  # the CPU runs bfloat16 only in this way, and takes no feeds of it
        draft.x.dtype, x = FLOAT, draft.op("Cast", draft.x, to=BRAIN.value)
    if dtype == BRAIN or (dtype == HALF and draw(st.booleans())):  # computed in float32
        draft.dtype = wide = FLOAT
        x = draft.op("Cast", x, to=FLOAT.value)
    over, keep = draft.array(np.array(axes)), {"keepdims": int(twist != "keepdims")}

    def difference() -> ir.Value:
        return draft.op("Sub", x, draft.op("ReduceMean", x, over, keepdims=1)) if centered else x

    d = difference()
    power = draw(st.booleans())
    square = draft.op("Pow", d, draft.number(2.0)) if power else draft.op("Mul", d, d)
    v = draft.op("ReduceMean", square, over, **keep)
    if twist == "unbiased":
        v = draft.op("Mul", v, draft.number(8 / 7))
    if twist != "root":
        v = draft.either("Add", v, draft.number(1e-3))
    v, inverted = inverse(draft, v)
    if twist == "root":
        v = draft.op("Add", v, draft.number(1e-3))
    again = difference() if draw(st.booleans()) else d
    kind = draw(st.sampled_from(["none", "plain", "ones", "input", "widened", "wide", "scalar"]))
    where = "after" if kind in ("wide", "scalar") else draw(st.sampled_from(["root", "x", "after"]))
    w = None if kind == "none" else weight(draft, kind, sizes, count, wide)
    if w is not None and where == "x":
        again = draft.either("Mul", again, w)
    if w is not None and where == "root":
        v = draft.either("Mul", v, w) if inverted else draft.op("Div", w, v)
        inverted = True
    if inverted and centered and where != "x" and draw(st.booleans()):  # multiplied out
        parts = [draft.either("Mul", part, v) for part in (x, d.producer().inputs[1])]
        if draw(st.booleans()):
            less = draft.op("Sub", weight(draft, "plain", sizes, count, wide), parts[1])
            y = draft.either("Add", parts[0], less)
        else:
            y = draft.op("Sub", *parts)
    else:
        y = draft.either("Mul", again, v) if inverted else draft.op("Div", again, v)
    narrow = wide != dtype
    early = narrow and dtype != BRAIN and draw(st.booleans())
    if early:
        y, wide = draft.op("Cast", y, to=dtype.value), dtype
    if w is not None and where == "after":
        y = draft.either("Mul", y, weight(draft, kind, sizes, count, wide))
    if centered and draw(st.booleans()):
        kind = draw(st.sampled_from(["plain", "ones", "input", "wide", "scalar"]))
        y = draft.either("Add", y, weight(draft, kind, sizes, count, wide))
    if narrow and not early and draw(st.booleans()):
        y, wide = draft.op("Cast", y, to=dtype.value), dtype
    draft.dtype = wide
    return y


@pytest.mark.parametrize(
    ("rewrite", "centered"), [(LiftLayerNormalization, True), (LiftRmsNormalization, False)]
)
def test_norm(rewrite: type[ir.passes.InPlacePass], centered: bool) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=120, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def spell(data) -> None:
        draw = data.draw
        dtype = draw(st.sampled_from([FLOAT] * 3 + [HALF] * 3 + [BRAIN] * 2 + [DOUBLE]))
        twists = ["unbiased", "root", "axis", "keepdims", "rank", "reader"]
        twist = draw(st.sampled_from(["none"] * 6 + twists))
        n = draw(st.integers(1 + (twist == "axis"), 3))
        count = draw(st.integers(1, min(2, n)))
        axes = list(range(n - count, n)) if draw(st.booleans()) else list(range(-count, 0))
        if twist == "axis":
            axes, count = [0], 1
        sizes = [4] * n if twist in ("keepdims", "axis") else [2, 3, 4][3 - n :]
        draft = Draft(draw, dtype, sizes)
        draft.ranks = [3] if twist == "rank" else [0, 1]
        y = norm(draft, centered, axes, count, twist)
        outputs = [y]
        if twist == "reader":
            inner = [v for node in draft.nodes for v in node.outputs if v is not y]
            outputs.append(draft.op("Identity", draw(st.sampled_from(inner))))
        hits = lifted(draft, draft.model(*outputs), rewrite(), TOLERANCE[dtype])
        if twist == "none":
            assert hits == (dtype != DOUBLE)
        if twist in ("unbiased", "root", "axis", "keepdims") or dtype == DOUBLE:
            assert hits == 0
        seen[f"{twist} {hits}"] += 1

    spell()
    assert sum(n for name, n in seen.items() if name.endswith("1")) > 25, seen


def test_ones_in_a_branch_and_outside_of_it() -> None:
    """The scale of one graph must not hide that of another."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (float[2,8] x, float[2,4] u, float[1] z) => (float[2,8] y, float[2,4] r)
        <float two = {2.0}, float eps = {0.1}, int64[1] last = {-1}> {
            p = Pow(x, two)  m = ReduceMean(p, last)  v = Add(m, eps)  s = Sqrt(v)  y = Div(x, s)
            c = Cast<to=9>(z)
            r = If (c) <then_branch = t () => (float[2,4] a) {
                p1 = Pow(u, two)  m1 = ReduceMean(p1, last)  v1 = Add(m1, eps)  s1 = Sqrt(v1)
                a = Div(u, s1)
            }, else_branch = e () => (float[2,4] b) { b = Identity(u) }>
        }"""
    )
    InferShapes()(model)
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 8), "u": (2, 4), "z": (1,)}
    feeds = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    want = run(model, feeds)
    assert LiftRmsNormalization()(model).hits == 2
    common.CheckerPass(full_check=True)(model)
    for a, b in zip(run(model, feeds), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_large_norms_without_weight_share_their_ones() -> None:
    """edit.constant compares only small constants."""
    norm = "p{1} = Pow({0}, two)  m{1} = ReduceMean(p{1}, last)  s{1} = Sqrt(m{1})"
    norm += "  {2} = Div({0}, s{1})\n"
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]> g (float[2,256] x) => (float[2,256] y)
        <float two = {2.0}, int64[1] last = {-1}> {"""
        + norm.format("x", 1, "a")
        + norm.format("a", 2, "y")
        + "}"
    )
    InferShapes()(model)
    assert LiftRmsNormalization()(model).hits == 2
    scales = {node.inputs[1] for node in model.graph}
    assert len(scales) == 1
