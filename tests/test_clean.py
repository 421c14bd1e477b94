"""Random programs of shape arithmetic, at sizes that they were not written for; and weights."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from onnxpress.optimizers.clean.fold_constants import FoldConstants
from onnxpress.optimizers.clean.fold_slices_of_weights import FoldSlicesOfWeights
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.clean.merge_views import MergeViews
from onnxpress.optimizers.clean.name_sizes import NameSizes
from onnxpress.optimizers.clean.remove_no_ops import RemoveNoOps
from onnxpress.optimizers.clean.simplify_shapes import SimplifyShapes
from onnxpress.optimizers.clean.sizes import Size
from onnxpress.optimizers.clean.split_packed import SplitPacked

SIZES = [(2, 3), (1, 1), (4, 1), (0, 2)]  # of the names a and b; a graph is built for neither

CLEAN = (InferShapes, SimplifyShapes, NameSizes, RemoveNoOps, MergeViews, SimplifyShapes)


def session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


class Program:
    """A graph that grows by random choices; `ints` are its integers, by length (None: scalar)."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw, self.nodes, self.weights = draw, [], []
        self.x = self.value("x", ir.DataType.FLOAT, ["a", "b", 4])
        self.z = self.value("z", ir.DataType.FLOAT, ["b", "a"])
        self.tensors = [self.x, self.z]
        self.ints: list[tuple[ir.Value, int | None]] = []

    @staticmethod
    def value(name: str, dtype: ir.DataType, shape: list[int | str] | None) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape and ir.Shape(shape))

    def op(self, op: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        node = ir.node(op, list(inputs), attributes=attributes)
        node.outputs[0].name = f"v{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def number(self, *numbers: int, scalar: bool = False) -> ir.Value:
        array = np.array(numbers[0] if scalar else numbers, np.int64)
        name = f"c{len(self.weights)}"
        weight = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        weight.type, weight.shape = ir.TensorType(ir.DataType.INT64), ir.Shape(array.shape)
        self.weights.append(weight)
        return weight

    def choose(self, *what: object) -> object:
        return self.draw(st.sampled_from(what))

    def one(self, size: str) -> ir.Value:
        """The size called a or b as a tensor of one number, read in one of many ways."""
        tensor, axis = self.draw(
            st.sampled_from([(self.x, "ab".index(size)), (self.z, "ba".index(size))])
        )
        rank = 3 if tensor is self.x else 2
        if self.draw(st.booleans()):
            turn = self.draw(st.permutations(range(rank)))
            tensor, axis = self.op("Transpose", tensor, perm=turn), turn.index(axis)
        if self.draw(st.booleans()):
            tensor = self.op("Relu", tensor)
        at = self.choose(axis, axis - rank)
        match self.choose("slice", "gather", "gather1", "attribute", "int32", "sum"):
            case "slice":
                shape, end = self.op("Shape", tensor), at + 1 or (1 << 62)
                return self.op("Slice", shape, self.number(at), self.number(end))
            case "gather":
                number = self.op("Gather", self.op("Shape", tensor), self.number(at, scalar=True))
                return self.op("Unsqueeze", number, self.number(0))
            case "gather1":
                return self.op("Gather", self.op("Shape", tensor), self.number(at))
            case "int32":
                shape = self.op("Shape", tensor, start=axis, end=axis + 1)
                return self.op("Cast", self.op("Cast", shape, to=6), to=7)
            case "sum":
                shape = self.op("Shape", tensor, start=axis, end=axis + 1)
                more = self.op("Add", self.op("Mul", shape, self.number(3)), self.number(2))
                less = self.op("Sub", more, self.op("Add", shape, self.number(2)))
                return self.op("Div", less, self.number(2))
        return self.op("Shape", tensor, start=axis, end=axis + 1)

    def product(self, *parts: str | int) -> ir.Value:
        """The product of names and numbers, in any order."""
        values = [self.one(p) if isinstance(p, str) else self.number(p) for p in parts]
        values = self.draw(st.permutations(values))
        total = values[0]
        for value in values[1:]:
            total = self.op("Mul", total, value)
        return total

    def target(self, *parts: str) -> ir.Value:
        """A list of products, such as a*b or 4; one of them may be -1."""
        sizes = [self.product(*(int(f) if f.isdigit() else f for f in p.split("*"))) for p in parts]
        if self.draw(st.integers(0, 3)) == 0:
            sizes[self.draw(st.integers(0, len(sizes) - 1))] = self.number(-1)
        return self.op("Concat", *sizes, axis=0)

    def model(self, outputs: list[ir.Value]) -> ir.Model:
        graph = ir.Graph(
            [self.x, self.z], outputs, nodes=self.nodes, initializers=self.weights,
            opset_imports={"": 23}, name="g",
        )  # fmt: skip
        return ir.Model(graph, ir_version=10)


@st.composite
def programs(draw: st.DrawFn) -> ir.Model:
    p = Program(draw)
    outputs = []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.sampled_from(
            [("a", "b", "2", "2"), ("a*b", "4"), ("b*4", "a"), ("a", "b*2", "2"), ("b", "a", "4"),
             ("a*4", "b"), ("4", "a", "b"), ("a", "1", "b", "4"), ("a*b*4",)]
        ))  # fmt: skip
        zero = draw(st.sampled_from([0, 1]))
        y = p.op("Reshape", p.x, p.target(*parts), allowzero=zero)
        if len(parts) == 3 and draw(st.booleans()):  # turn, and split what was merged
            y = p.op("Transpose", y, perm=[1, 0, 2])
            split = [f for i in (1, 0, 2) for f in parts[i].split("*")]
            y = p.op("Reshape", y, p.target(*split), allowzero=zero)
        if draw(st.booleans()):
            y = p.op("Reshape", y, p.target("a", "b", "4"))
            y = p.op("Expand", y, p.op("Concat", *(p.product(s) for s in ("a", "b", 4)), axis=0))
        outputs.append(p.op("Neg", y))
    if draw(st.booleans()):
        numbers = p.op("Concat", *(p.one(draw(st.sampled_from("ab"))) for _ in range(3)), axis=0)
        picked = p.op("Gather", numbers, p.number(*draw(st.permutations([0, 1, 2]))))
        outputs.append(p.op("Neg", picked))
    for output in outputs:
        output.type = ir.TensorType(ir.DataType.FLOAT)
    if outputs[-1].producer().inputs[0].producer().op_type == "Gather":
        outputs[-1].type = ir.TensorType(ir.DataType.INT64)
    return p.model(outputs)


def results(model: ir.Model) -> list[list[np.ndarray] | None]:
    """What it gives at each of SIZES; None where ONNX Runtime refuses."""
    run, found = session(model), []
    for a, b in SIZES:
        feeds = {
            "x": np.arange(a * b * 4, dtype=np.float32).reshape(a, b, 4),
            "z": np.zeros((b, a), np.float32),
        }
        try:
            found.append(run.run(None, {i.name: feeds[i.name] for i in run.get_inputs()}))
        except Exception:
            found.append(None)
    return found


@settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
@given(programs())
def test_random_shape_programs_give_the_same(model: ir.Model) -> None:
    text, want = ir.to_onnx_text(model), results(model)
    for rewrite in CLEAN:
        rewrite()(model)
        common.RemoveUnusedNodesPass()(model)
        assert rewrite()(model).hits == 0, f"{rewrite.__name__} is not idempotent"
    for sizes, a, b in zip(SIZES, results(model), want, strict=True):
        if b is None or (a is None and 0 in sizes):
            continue  # a -1 beside a size of 0 is refused; it may not be wrong
        assert a is not None, f"refused at {sizes}"
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=f"{sizes}: {text}")


def test_shape_programs_are_simplified_at_all() -> None:
    """The property holds for a pass that does nothing too; this one does not."""
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 23]>
    g (float[a,b,4] x) => (float[a,b,2,2] y) 
    <int64[1] i = {0}, int64 j = {-2}, int64[2] two = {2, 2}> {
        s = Shape(x)  m = Gather(s, i)  k = Gather(s, j)  n = Unsqueeze(k, i)
        t = Concat<axis=0>(m, n, two)  y = Reshape<allowzero=1>(x, t)
    }""")
    InferShapes()(model)
    SimplifyShapes()(model)
    assert [node.op_type for node in model.graph] == ["Reshape"]


def test_a_computed_0_that_copies_another_size_is_not_taken_for_0() -> None:
    """With a = 0 the first Reshape copies b, and the -1 makes up for it."""
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 23]>
    g (float[a,b,4] x, float[b,a] z) => (float[p,q,4] y)
    <int64[1] minus = {-1}, int64[1] four = {4}> {
        a = Shape<start=0, end=1>(x)  b = Shape<start=1, end=2>(x)
        s = Concat<axis=0>(minus, a, four)  r = Reshape(x, s)  t = Transpose<perm=[1,0,2]>(r)
        u = Concat<axis=0>(minus, b, four)  v = Reshape(t, u)  y = Neg(v)
    }""")
    want = results(model)
    for rewrite in CLEAN:
        rewrite()(model)
    for sizes, a, b in zip(SIZES, results(model), want, strict=True):
        if a is None and 0 in sizes:
            continue  # refused
        assert a is not None
        assert b is not None
        np.testing.assert_array_equal(a[0], b[0], err_msg=str(sizes))


def test_old_opsets_are_left_alone() -> None:
    model = ir.from_onnx_text("""<ir_version: 7, opset_import: ["" : 12]>
    g (float[a,4] x) => (float[a,4] y) { s = Shape(x)  y = Reshape(x, s) }""")
    for rewrite in (SimplifyShapes(), NameSizes()):
        assert not rewrite(model).modified
        assert "the opset is 12" in rewrite(model).notes[0]


def test_a_subgraph_keeps_to_its_own_values() -> None:
    """What is first computed in one branch does not serve the other, nor the graph around it."""
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 23]>
    g (bool c, float[a,b] x) => (float[m,n] y) {
        y = If (c) <
            then_branch = t () => (float[p,q] u) {
                s = Shape<start=1, end=2>(x)  r = Shape<start=0, end=1>(x)
                v = Concat<axis=0>(s, r) u = Reshape(x, v) },
            else_branch = e () => (float[k,l] w) {
                s2 = Shape<start=1, end=2>(x)  r2 = Shape<start=0, end=1>(x)
                v2 = Concat<axis=0>(r2, s2) w = Reshape(x, v2) }
        >
    }""")
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    before = session(model)
    want = [before.run(None, {"c": np.array(c), "x": x})[0] for c in (True, False)]
    for rewrite in CLEAN:
        rewrite()(model)
    after = session(model)
    for c, y in zip((True, False), want, strict=True):
        np.testing.assert_array_equal(after.run(None, {"c": np.array(c), "x": x})[0], y)


class Unreadable(ir.LazyTensor):
    """A weight that may be described, and not read."""

    def __init__(self, *shape: int) -> None:
        def fail() -> ir.TensorProtocol:
            raise AssertionError("a weight was read")

        super().__init__(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name="w")


@pytest.mark.parametrize("view", [
    'a, b = Split<axis=0, num_outputs=2>(w)  y = MatMul(x, a)  z = MatMul(x, b)',
    's = Transpose<perm=[1,0]>(w)  t = Transpose<perm=[1,0]>(s)  y = MatMul(x, t)  z = Relu(x)',
])  # fmt: skip
def test_views_of_weights_read_nothing(view: str) -> None:
    shape = [8192, 4096] if "Split" in view else [4096, 4096]
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 23]>
    g (float[n,4096] x, float[{shape[0]},4096] w) => (float[n,4096] y, float[n,4096] z) {{
        {view}
    }}""")
    weight = model.graph.inputs.pop()
    weight.const_value = Unreadable(*shape)
    model.graph.register_initializer(weight)
    InferShapes()(model)
    outcome = FoldSlicesOfWeights()(model)
    assert outcome.hits == (1 if "Split" in view else 2)
    assert not {"Split", "Transpose"} & {node.op_type for node in model.graph}
    with pytest.raises(AssertionError, match="a weight was read"):
        model.graph.node(0).inputs[1].const_value.numpy()


def test_no_view_makes_the_model_grow() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]>
    g (float[n,64] x) => (float[n,64] y, float[n,64] z) <float[64,64] w = {0}> {
        a = Transpose<perm=[1,0]>(w)  y = MatMul(x, a)  z = MatMul(x, w)
    }""".replace("{0}", "{" + ",".join(map(str, range(4096))) + "}")
    )
    InferShapes()(model)
    outcome = FoldSlicesOfWeights()(model)
    assert not outcome.hits
    assert "would add 16,384 bytes" in outcome.notes[0]


NAMES = st.sampled_from("abc")
POLYNOMIALS = st.recursive(
    st.one_of(NAMES, st.integers(0, 4)).map(Size.of),
    lambda s: st.tuples(st.sampled_from("+*"), s, s).map(
        lambda t: t[1] + t[2] if t[0] == "+" else t[1] * t[2]
    ),
    max_leaves=6,
)


def at(size: Size, **values: int) -> int:
    return sum(f * int(np.prod([values[n] for n in names])) for names, f in size.terms)


@given(POLYNOMIALS, POLYNOMIALS)
@settings(max_examples=60, deadline=None)
def test_sizes_are_numbers(p: Size, q: Size) -> None:
    assert p.number is not None or Size.parse(str(p)) == p
    quotient = p.over(q)
    if quotient is not None:
        assert quotient * q == p
    for a, b, c in itertools.product((0, 1, 5), repeat=3):
        x, y = at(p, a=a, b=b, c=c), at(q, a=a, b=b, c=c)
        assert (at(p + q, a=a, b=b, c=c), at(p * q, a=a, b=b, c=c)) == (x + y, x * y)


PACKED = [(lead, at_, perm) for lead in (1, 2) for at_ in (0, 1) for perm in (0, 1, 2)]


@pytest.mark.parametrize(("lead", "at_", "perm"), PACKED)
def test_packed_axes_are_right_or_refused(lead: int, at_: int, perm: int) -> None:
    """The packed axis at either place among the new ones, under some permutations."""
    new = [3, 2, 4] if at_ == 0 else [2, 3, 4]
    turn = list(itertools.permutations(range(lead + 3)))[perm * 7 % 24]
    axis = turn.index(lead + at_)
    shape = ",".join(map(str, [0] * lead + new))
    ranks = (("nm", lead), ("pqrs", lead + 2), ("tuvw", lead + 2))
    n, y, z = (",".join(names[:rank]) for names, rank in ranks)
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 23]>
    g (float[{n},24] x) => (float[{y}] y, float[{z}] z)
    <int64[{lead + 3}] s = {{{shape}}}, int64 i = {{1}}, int64 j = {{-1}}> {{
        r = Reshape(x, s)  t1 = Transpose<perm={list(turn)}>(r)
        a = Gather<axis={axis}>(t1, i)  b = Gather<axis={axis}>(t1, j)  y = Neg(a)  z = Neg(b)
    }}""")
    InferShapes()(model)
    x = np.random.default_rng(0).standard_normal((*(2, 3)[:lead], 24)).astype(np.float32)
    want = session(model).run(None, {"x": x})
    assert SplitPacked()(model).hits == (0 if at_ else 2)
    for a, b in zip(session(model).run(None, {"x": x}), want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_scale_of_attention_becomes_a_number() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 23]>
    g (float[a,b,16] q) => (float[a,b,16] y)
    <int64[1] i = {-1}, int64[1] e = {9223372036854775807}, float one = {1}> {
        s = Shape(q)  d = Slice(s, i, e)  f = Cast<to=1>(d)  r = Sqrt(f)  v = Div(one, r)
        h = Cast<to=1>(v)  k = Sqrt(h)  y = Mul(q, k)
    }""")
    for rewrite in (InferShapes(), SimplifyShapes(), FoldConstants()):
        rewrite(model)
    assert [node.op_type for node in model.graph] == ["Mul"]
    assert model.graph.node(0).inputs[1].const_value.numpy() == pytest.approx(0.5)
