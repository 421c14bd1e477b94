"""Views, packed projections and layouts: random chains are rewritten right, or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxpress.optimizers.clean.factors import Layout
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.clean.merge_views import MergeViews
from onnxpress.optimizers.clean.remove_no_ops import RemoveNoOps
from onnxpress.optimizers.clean.sink_transposes import SinkTransposes
from onnxpress.optimizers.clean.sizes import Size, product
from onnxpress.optimizers.clean.split_packed import SplitPacked
from onnxpress.optimizers.clean.split_projections import SplitProjections
from onnxpress.optimizers.clean.unfold_gemm import UnfoldGemm
from onnxpress.optimizers.counts import count_ops
from onnxpress.optimizers.lift.merge_attention_heads import MergeAttentionHeads
from onnxpress.optimizers.outcome import Outcome

SIZES = [(2, 3), (1, 1), (4, 4), (2, 2), (3, 1), (1, 4)]  # equal to each other, to heads, and 1


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def check(model: ir.Model, rewrite, rtol: float = 0.0, grows: int = 0) -> int:
    """Rewrite a model of x [batch, seq, 8]; nothing it computes may change. Returns the hits."""
    common.RemoveUnusedNodesPass()(model)  # dead code still reads
    InferShapes()(model)
    feeds = [
        {"x": np.random.default_rng(0).standard_normal((b, s, 8)).astype(np.float32)}
        for b, s in SIZES
    ]
    want = [run(model, f) for f in feeds]
    before = sum(count_ops(model).values())
    outcome = rewrite(model)
    for f, old in zip(feeds, want, strict=True):
        for a, b in zip(run(model, f), old, strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
    assert sum(count_ops(model).values()) <= before + grows
    assert rewrite(model).hits == 0, "not idempotent"
    return outcome.hits


# ---- random chains ---------------------------------------------------------------------------

Axis = tuple[str, ...]  # the factors of an axis, by name: numbers, or b and s


class Chain:
    """A graph that grows by random views; axes are known as lists of factors."""

    def __init__(self, draw) -> None:
        self.draw, self.lines, self.count = draw, [], 0
        self.tips: list[tuple[str, list[Axis]]] = [("x", [("b",), ("s",), ("8",)])]
        self.outputs: list[str] = []
        self.weights: list[str] = []

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def step(self) -> None:
        tip, axes = self.draw(st.sampled_from(self.tips[-2:]))
        kinds = ["transpose", "unsqueeze", "merge", "split", "relu"]
        ones = [i for i, axis in enumerate(axes) if not axis]
        kind = self.draw(st.sampled_from([*kinds, *(["squeeze"] * 3 if ones else [])]))
        new, axes = self.name(), list(axes)
        match kind:
            case "transpose":
                perm = self.draw(st.permutations(range(len(axes))))
                self.lines.append(f"{new} = Transpose<perm={list(perm)}>({tip})")
                axes = [axes[p] for p in perm]
            case "unsqueeze" if len(axes) < 6:
                at = self.draw(st.integers(0, len(axes)))
                axis = self.constant(new, [at])
                self.lines.append(f"{new} = Unsqueeze({tip}, {axis})")
                axes.insert(at, ())
            case "squeeze":
                at = self.draw(st.sampled_from(ones))
                axis = self.constant(new, [at - self.draw(st.sampled_from([0, len(axes)]))])
                self.lines.append(f"{new} = Squeeze({tip}, {axis})")
                del axes[at]
            case "merge" if len(axes) > 1:
                at = self.draw(st.integers(0, len(axes) - 2))
                axes[at : at + 2] = [axes[at] + axes[at + 1]]
                self.reshape(new, tip, axes)
            case "split":
                found = [(i, p) for i, axis in enumerate(axes) for p in parts(axis)]
                if not found:
                    return
                at, pieces = self.draw(st.sampled_from(found))
                axes[at : at + 1] = pieces
                self.reshape(new, tip, axes)
            case "relu":
                self.lines.append(f"{new} = Relu({tip})")
            case _:
                return
        self.tips.append((new, axes))
        if self.draw(st.integers(0, 7)) == 0:
            self.outputs.append(new)

    def constant(self, name: str, numbers: list[int]) -> str:
        listed = ", ".join(map(str, numbers))
        self.lines.append(f"{name}_c = Constant<value = int64[{len(numbers)}] {{{listed}}}>()")
        return f"{name}_c"

    def reshape(self, new: str, tip: str, axes: list[Axis]) -> None:
        """A target of numbers and one -1, or one that is computed from the sizes of x."""
        numbers = [size(a) for a in axes]
        if numbers.count(None) <= 1 and self.draw(st.booleans()):
            target = self.constant(new, [-1 if n is None else n for n in numbers])
            self.lines.append(f"{new} = Reshape({tip}, {target})")
            return
        terms = []
        for i, axis in enumerate(axes):
            term = f"{new}_{i}"
            number = size(tuple(f for f in axis if f.isdigit()))
            self.lines.append(f"{term}_one = Constant<value = int64[1] {{{number}}}>()")
            last = f"{term}_one"
            for k, factor in enumerate(f for f in axis if not f.isdigit()):
                at = "bs".index(factor)
                self.lines.append(f"{term}_{k}s = Shape<start={at}, end={at + 1}>(x)")
                self.lines.append(f"{term}_{k} = Mul({last}, {term}_{k}s)")
                last = f"{term}_{k}"
            terms.append(last)
        self.lines.append(f"{new}_t = Concat<axis=0>({', '.join(terms)})")
        self.lines.append(f"{new} = Reshape({tip}, {new}_t)")

    def model(self) -> ir.Model:
        tip, shapes = self.tips[-1][0], dict(self.tips)
        for extra in dict.fromkeys([*self.outputs, tip]):
            self.lines.append(f"{extra}_y = Neg({extra})")
        outputs = [f"{n}_y" for n in dict.fromkeys([*self.outputs, tip])]
        if self.outputs and self.outputs[0] != "x":
            outputs.append(self.outputs[0])  # a graph output in the middle of a chain
        ranks = {f"{n}_y": len(a) for n, a in shapes.items()} | {
            n: len(a) for n, a in shapes.items()
        }
        declared = ", ".join(
            f"float[{', '.join(f'{n}_d{i}' for i in range(ranks[n]))}] {n}"
            if ranks[n]
            else f"float {n}"
            for n in outputs
        )
        lines = "\n".join(self.lines)
        return ir.from_onnx_text(
            f'<ir_version: 10, opset_import: ["" : 23]>\n'
            f"g (float[batch, seq, 8] x) => ({declared})\n"
            f"<{', '.join(self.weights)}>\n{{\n{lines}\n}}"
        )


def size(axis: Axis) -> int | None:
    return int(np.prod([int(f) for f in axis])) if all(f.isdigit() for f in axis) else None


def parts(axis: Axis) -> list[list[Axis]]:
    """The ways to split an axis in two, at a factor or within one."""
    found = [[axis[:i], axis[i:]] for i in range(1, len(axis))]
    for i, f in enumerate(axis):
        for d in (2, 4):
            if f.isdigit() and int(f) % d == 0 and int(f) > d:
                found.append([(*axis[:i], str(d)), (str(int(f) // d), *axis[i + 1 :])])
    return found


@st.composite
def chains(draw) -> ir.Model:
    chain = Chain(draw)
    for _ in range(draw(st.integers(1, 8))):
        chain.step()
    return chain.model()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(chains())
def test_any_chain_of_views_computes_the_same_in_no_more_nodes(model: ir.Model) -> None:
    if len(model.graph.inputs[0].uses()) == 0:
        return
    check(model, MergeViews())


class Layers(Chain):
    """A graph of layers on x, in whatever layout, with Transposes and views in between."""

    def step(self) -> None:
        tip, axes = self.draw(st.sampled_from(self.tips[-3:]))
        last = size(axes[-1]) if axes else None
        kind = self.draw(st.sampled_from([*KINDS, *["view"] * 3, *["turn"] * 6]))
        if kind == "view" or not (3 <= len(axes) <= 4) or last is None:
            super().step()
            return
        new = self.name()
        lead = axes[:-1]
        match kind:
            case "turn":
                perm = [*self.draw(st.permutations(range(len(lead)))), len(lead)]
                self.lines.append(f"{new} = Transpose<perm={perm}>({tip})")
                axes = [axes[p] for p in perm]
            case "matmul":
                width = self.draw(st.sampled_from([4, 8]))
                self.lines.append(f"{new} = MatMul({tip}, {self.weight(last, width)})")
                axes = [*lead, (str(width),)]
            case "bias":
                shape = self.draw(st.sampled_from([(last,), (1, last), (1,) * len(lead) + (last,)]))
                pair = self.draw(st.permutations([tip, self.weight(*shape)]))
                self.lines.append(f"{new} = Add({', '.join(pair)})")
            case "norm":
                axis = self.draw(st.sampled_from([-1, len(lead)]))
                w = self.weight(last)
                self.lines.append(f"{new} = LayerNormalization<axis={axis}>({tip}, {w}, {w})")
            case "softmax":
                axis = self.draw(st.sampled_from([-1, len(lead), 1]))
                self.lines.append(f"{new} = Softmax<axis={axis}>({tip})")
            case "cumsum":  # minds the order of axes
                axis = f"{new}_axis"
                self.lines.append(
                    f"{axis} = Constant<value = int64 {{{self.draw(st.integers(0, 2))}}}>()"
                )
                self.lines.append(f"{new} = CumSum({tip}, {axis})")
            case "gelu" | "tanh":
                self.lines.append(f"{new} = {kind.title()}({tip})")
            case "square":  # the same value twice, turned once: only right at equal sizes
                self.lines.append(f"{new} = Mul({tip}, {tip})")
            case "join":
                same = [t for t, a in self.tips if a == axes and t != "x"]
                if not same:
                    return
                self.lines.append(f"{new} = Add({tip}, {self.draw(st.sampled_from(same))})")
            case "split" if last % 2 == 0 and last > 2:
                axis = self.draw(st.sampled_from([-1, len(lead)]))
                self.lines.append(f"{new}, {new}b = Split<axis={axis}, num_outputs=2>({tip})")
                axes = [*lead, (str(last // 2),)]
                self.tips.append((f"{new}b", axes))
            case _:
                return
        self.tips.append((new, axes))
        if self.draw(st.integers(0, 9)) == 0:
            self.outputs.append(new)

    def weight(self, *shape: int) -> str:
        self.count += 1
        numbers = (np.arange(np.prod(shape)) * 7919 % 13 - 6) / 10
        listed = ", ".join(f"{n:g}" for n in numbers)
        dims = ", ".join(map(str, shape))
        self.weights.append(f"float[{dims}] w{self.count} = {{{listed}}}")
        return f"w{self.count}"


KINDS = ("matmul", "bias", "norm", "softmax", "cumsum", "gelu", "tanh", "square", "join", "split")


@st.composite
def layers(draw) -> ir.Model:
    graph = Layers(draw)
    for _ in range(draw(st.integers(2, 14))):
        graph.step()
    return graph.model()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(layers())
def test_layers_in_any_layout_compute_the_same_in_no_more_nodes(model: ir.Model) -> None:
    if model.graph.inputs[0].uses():
        check(model, SinkTransposes(), rtol=1e-5)


# ---- the algebra, without a graph ------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(SIZES))
def test_a_layout_says_what_numpy_does(data: st.DataObject, sizes: tuple[int, int]) -> None:
    known = {"b": sizes[0], "s": sizes[1]}

    def numbers(shape: Iterable[Axis]) -> list[int]:
        return [int(np.prod([known.get(f) or int(f) for f in axis])) for axis in shape]

    axes: list[Axis] = [("b",), (), ("s",), ("8",)]
    layout = Layout.of(tuple(Size.of(f) for f in ("b", 1, "s", 8)))
    want = source = np.arange(8 * known["b"] * known["s"]).reshape(numbers(axes))
    assert layout is not None
    for _ in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            perm = data.draw(st.permutations(range(len(axes))))
            axes, want = [axes[p] for p in perm], want.transpose(perm)
            layout = layout.transposed(perm)
            continue
        split = [(i, p) for i, axis in enumerate(axes) for p in parts(axis)]
        if split and data.draw(st.booleans()):
            at, pieces = data.draw(st.sampled_from(split))
            axes[at : at + 1] = pieces
        else:
            at = data.draw(st.integers(0, len(axes) - 1))
            axes[at : at + 2] = [tuple(f for axis in axes[at : at + 2] for f in axis)]
        target = tuple(product([Size.of(int(f) if f.isdigit() else f) for f in a]) for a in axes)
        layout, want = layout.reshaped(target), want.reshape(numbers(axes))
        assert layout is not None

    def value(size: Size) -> int:
        return sum(f * int(np.prod([known[n] for n in names])) for names, f in size.terms)

    for plan in layout.plans():
        have = source
        if plan.first is not None:
            have = have.reshape([value(size) for size in plan.first])
        if plan.perm is not None:
            have = have.transpose(plan.perm)
        assert have.shape == tuple(value(size) for size in plan.between)
        if plan.last is not None:
            have = have.reshape([value(size) for size in plan.last])
        np.testing.assert_array_equal(have, want)


# ---- what the generators do not make ---------------------------------------------------------


def test_a_view_that_a_subgraph_reads_stays_for_it() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[batch, seq, 8] x) => (float[batch, seq, 8] y, float[a, b, 8] z) {
            t = Transpose<perm=[1, 0, 2]>(x)
            u = Transpose<perm=[1, 0, 2]>(t)
            y = Tanh(u)
            s = Size(x)  c = Constant<value = int64 {40}>()  few = Less(s, c)
            z = If (few) <
                then_branch = yes () => (float[a, b, 8] p) { p = Relu(t) },
                else_branch = no () => (float[a, b, 8] q) {
                    v = Transpose<perm=[1, 0, 2]>(t)  w = Transpose<perm=[1, 0, 2]>(v)  q = Neg(w)
                }
            >
        }""")
    assert check(model, MergeViews()) == 2  # u, and v and w within the branch
    assert check(model, SinkTransposes()) == 0
    assert count_ops(model)["Transpose"] == 1


def test_a_region_that_reaches_into_a_subgraph_is_left_alone() -> None:
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[batch, seq, 8] x) => (float[batch, seq, 8] y, float[a, b, 8] z) {
            t = Transpose<perm=[1, 0, 2]>(x)  r = Relu(t)  y = Transpose<perm=[1, 0, 2]>(r)
            s = Size(x)  c = Constant<value = int64 {40}>()  few = Less(s, c)
            z = If (few) <
                then_branch = yes () => (float[a, b, 8] p) { p = Softmax<axis=1>(r) },
                else_branch = no () => (float[a, b, 8] q) { q = Neg(r) }
            >
        }""")
    assert check(model, SinkTransposes()) == 1  # the branches read r through a Transpose
    assert count_ops(model)["Transpose"] == 1


LAYER = """
    <ir_version: 10, opset_import: ["" : 23]>
    g (float[batch, seq, 8] x) => (float[batch, seq, 8] y)
    <float[8, 24] w = {WEIGHTS}, float[24] b = {BIAS}, float[8, 8] o = {OUT}, float[8] c = {ROW},
     int64[1] h = {2}, int64[1] d = {4}, int64[1] e = {8}, int64[1] three = {3},
     int64[1] zero = {0}, int64[1] back = {-2}, int64 q_ = {0}, int64 k_ = {1}, int64 v_ = {2},
     int64[2] flat = {-1, 8}> {
        batch_ = Shape<start=0, end=1>(x)  seq_ = Shape<start=1, end=2>(x)
        bh = Mul(batch_, h)
        t = Transpose<perm=[1, 0, 2]>(x)  m = MatMul(t, w)  p = Add(m, b)
        s4 = Concat<axis=0>(seq_, batch_, three, e)  r = Reshape<allowzero=1>(p, s4)
        u = Unsqueeze(r, zero)  a = Transpose<perm=[3, 1, 2, 0, 4]>(u)  z = Squeeze(a, back)
        q = Gather<axis=0>(z, q_)  k = Gather<axis=0>(z, k_)  v = Gather<axis=0>(z, v_)
        s3 = Concat<axis=0>(seq_, bh, d)  sh = Concat<axis=0>(batch_, h, seq_, d)
        q1 = Reshape(q, s3)  q2 = Transpose<perm=[1, 0, 2]>(q1)  q3 = Reshape(q2, sh)
        k1 = Reshape(k, s3)  k2 = Transpose<perm=[1, 0, 2]>(k1)  k3 = Reshape(k2, sh)
        v1 = Reshape(v, s3)  v2 = Transpose<perm=[1, 0, 2]>(v1)  v3 = Reshape(v2, sh)
        n = Attention(q3, k3, v3)
        n1 = Transpose<perm=[2, 0, 1, 3]>(n)  n2 = Reshape(n1, flat)
        n3 = Gemm<transB=1>(n2, o, c)  st = Concat<axis=0>(seq_, batch_, e)
        n4 = Reshape(n3, st)  n5 = Transpose<perm=[1, 0, 2]>(n4)  y = Add(x, n5)
    }"""


def layer() -> ir.Model:
    """One nn.MultiheadAttention with its residual, as torch's dynamo writes it."""
    rng = np.random.default_rng(0)
    text = LAYER
    for name, count in (("WEIGHTS", 192), ("BIAS", 24), ("OUT", 64), ("ROW", 8)):
        text = text.replace(name, ", ".join(f"{n:.3f}" for n in rng.standard_normal(count)))
    return ir.from_onnx_text(text)


class InOrder:
    """The passes of this file as one, as the pipeline runs them."""

    def __init__(self, *passes: ir.passes.InPlacePass) -> None:
        self.passes = passes

    def __call__(self, model: ir.Model) -> Outcome:
        hits = 0
        for rewrite in self.passes:
            InferShapes()(model)
            hits += rewrite(model).hits
        return Outcome(model, bool(hits), hits=hits)


LAYOUT = (
    *(SplitPacked(), RemoveNoOps(), UnfoldGemm(), MergeViews(), SinkTransposes()),
    *(RemoveNoOps(), MergeAttentionHeads()),
)


def test_a_layer_of_nn_multihead_attention_becomes_plain() -> None:
    model = layer()
    check(model, InOrder(*LAYOUT), rtol=1e-5)
    assert count_ops(model) == {"MatMul": 2, "Add": 3, "Split": 1, "Attention": 1}
    check(model, InOrder(SplitProjections()), rtol=1e-5, grows=3)
    assert count_ops(model) == {"MatMul": 4, "Add": 5, "Attention": 1}


def test_weights_that_are_taken_apart_or_turned_leave_the_file_as_large() -> None:
    def size(model: ir.Model) -> int:
        tensors = [v.const_value for v in model.graph.initializers.values()]
        return sum(t.nbytes for t in tensors if t is not None and t.dtype == ir.DataType.FLOAT)

    model = layer()
    before = size(model)
    InOrder(*LAYOUT, SplitProjections())(model)
    assert size(model) == before


def test_a_weight_that_a_caller_may_set_is_none() -> None:
    model = layer()
    InOrder(SplitPacked(), RemoveNoOps())(model)
    for name in ("w", "o"):
        model.graph.inputs.append(model.graph.initializers[name])
    assert UnfoldGemm()(model).hits == 0
    assert SplitProjections()(model).hits == 0


def test_the_cost_is_linear_in_the_number_of_nodes() -> None:
    def model(layers: int) -> ir.Model:
        lines = [
            f"t{i} = Transpose<perm=[1, 0, 2]>(r{i})  v{i} = Relu(t{i})\n"
            f"u{i} = Transpose<perm=[1, 0, 2]>(v{i})  r{i + 1} = CumSum(u{i}, one)"
            for i in range(layers)
        ]
        return ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["" : 23]>\n'
            f"g (float[batch, seq, 8] r0) => (float[batch, seq, 8] r{layers})\n"
            f"<int64 one = {{1}}> {{\n{' '.join(lines)}\n}}"
        )

    seconds = {}
    for layers in (50, 500):
        graph = model(layers)
        InferShapes()(graph)
        start = time.perf_counter()
        assert MergeViews()(graph).hits == 0
        assert SinkTransposes()(graph).hits == layers
        seconds[layers] = time.perf_counter() - start
    assert len(graph.graph) == 1000
    assert seconds[500] < 40 * max(seconds[50], 0.02)
