"""Sizes are read whole: the same numbers at every size, and nothing left for the host to compute.

What a rewrite looks like is in fixtures/passes/read_sizes_whole.txt.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnxpress.optimizers import TARGETS, pipeline
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.lower.read_sizes_whole import ReadSizesWhole
from onnxpress.optimizers.placeable import unplaced

HEAD = '<ir_version: 10, opset_import: ["" : 23]>'
# n, m and k as tensors [1], and as scalars; `at` is a float, so that it stands for data.
SIZES = """
    n = Shape<start=0, end=1>(a)  m = Shape<start=1, end=2>(a)  k = Shape<start=1, end=2>(b)
    n0 = Squeeze(n)  m0 = Squeeze(m)  k0 = Squeeze(k)
"""
CONSTANTS = """
    int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64 low = {-1},
    int64[1] zeros = {0}, int64[1] ones = {1}, int64[1] twos = {2}, int64[1] threes = {3},
    int64[2] axes = {0, 1}, int32 one32 = {1},
    float[1] number = {5}, float[1, 4] row = {1, 2, 3, 4}"""
AT = [(2, 3, 4), (1, 1, 1), (3, 1, 2), (1, 5, 3), (2, 0, 1), (1, 4, 0)]  # n, m, k


def graph(body: str, *outputs: str, inputs: str = "", opset: int = 23) -> ir.Model:
    """A graph of a [n, m] and b [n, k, 3], typed as the pipeline leaves it; see `SIZES`."""
    text = f"""{HEAD.replace("23", str(opset))}
    g (float[n, m] a, float[n, k, 3] b{inputs}) => ({", ".join(outputs)}) <{CONSTANTS}>
    {{ {SIZES if opset >= 15 else ""} {body} }}"""
    model = ir.from_onnx_text(text)
    for value in model.graph.outputs:  # as in the pipeline: nobody vouches for these names
        value.shape = ir.Shape([None] * len(value.shape))
    InferShapes()(model)
    return model


def run(model: ir.Model, n: int, m: int, k: int) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    feeds = {"a": rng.normal(size=(n, m)), "b": rng.normal(size=(n, k, 3))}
    for name in ("c", "d"):
        feeds[name] = np.arange(1 if name == "c" else m)
    types = {i.name: np.int64 if "int64" in i.type else np.float32 for i in session.get_inputs()}
    return session.run(None, {name: feeds[name].astype(t) for name, t in types.items()})


def same(before: ir.Model, after: ir.Model, at=AT) -> None:
    for sizes in at:
        for one, other in zip(run(after, *sizes), run(before, *sizes), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, err_msg=str(sizes))


def signature(model: ir.Model) -> list[tuple[str | None, str]]:
    return [(v.name, str(v.type)) for v in (*model.graph.inputs, *model.graph.outputs)]


def read(model: ir.Model, hits: int, *, at=AT, placed: bool = True) -> ir.Model:
    """The graph after the pass, which is held against the one before."""
    after = model.clone()
    done = ReadSizesWhole()(after)
    assert done.hits == hits, done.notes
    assert done.modified == bool(hits)
    assert not done.notes
    assert signature(after) == signature(model)
    same(model, after, at)
    again = ReadSizesWhole()(after)
    assert (again.hits, again.modified, again.notes) == (0, False, ())
    if placed:
        assert not unplaced(after, TARGETS["cuda"]), ops(after)
    return after


def refuse(model: ir.Model, *said: str) -> None:
    """Declined for these reasons, in order, and the graph is what it was."""
    before = ir.to_onnx_text(model)
    done = ReadSizesWhole()(model)
    assert (done.hits, done.modified) == (0, False)
    assert len(done.notes) == len(said), done.notes
    for note, part in zip(done.notes, said, strict=True):
        assert part in note
    assert ir.to_onnx_text(model) == before


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# What is stretched ------------------------------------------------------------------------------

EXPANDS = {  # the target, what is stretched, the rank of the result, how many Expands it takes
    "one tensor": ("t = Concat<axis=0>(n, k, threes)", "number", 3, 1),
    "an axis between": ("t = Concat<axis=0>(n, ones, m)", "number", 3, 1),
    "axis by axis": ("t = Concat<axis=0>(k, m, n)", "number", 3, 3),
    "numbers at once": ("t = Concat<axis=0>(twos, k, threes)", "number", 3, 2),
    "more axes than the target": ("t = Concat<axis=0>(m, ones)  v = Unsqueeze(b, twos)", "v", 4, 1),
    "a longer axis stays": ("t = Concat<axis=0>(m, ones)", "row", 2, 1),
    "a sum": ("s = Add(n, k)  t = Concat<axis=0>(s, m)", "number", 2, 2),
    "a sum with a number": ("s = Add(k, threes)  t = Concat<axis=0>(s, m)", "number", 2, 2),
    "what is 0": ("s = Sub(n, n)  t = Concat<axis=0>(m, s)", "number", 2, 2),
}


@pytest.mark.parametrize("case", EXPANDS)
def test_a_target_is_read_of_one_tensor_or_stretched_axis_by_axis(case):
    target, stretched, rank, steps = EXPANDS[case]
    model = graph(f"{target}  y = Expand({stretched}, t)", f"float[{', '.join('pqrs'[:rank])}] y")
    after = read(model, 1, at=[s for s in AT if s[2] or "more" not in case])
    made = [n for n in after.graph if n.op_type == "Expand" and n.inputs[0].name != "ones"]
    assert len(made) == steps


def test_a_name_is_no_promise_that_another_is_1():
    """[n] stretched to [m] is [m] where n is 1: a tensor [n] does not stretch it."""
    read(graph("t = Add(m, zeros)  y = Expand(c, t)", "float[p] y", inputs=", float[rest] c"), 1)


def test_a_target_that_changes_nothing_leaves_a_copy():
    """Nothing to stretch, and no tensor of these sizes: what made it keeps its name."""
    body = "s = Sub(n, n)  e = Add(s, ones)  t = Concat<axis=0>(e, ones)  y = Expand(row, t)"
    after = read(graph(body, "float[p, q] y"), 1)
    assert ops(after) == ["Expand"]
    assert "row" in after.graph.initializers
    body = "s = Sub(n, n)  e = Add(s, ones)  t = Concat<axis=0>(e, ones)  y = Expand(number, t)"
    read(graph(body, "float[p, q] y"), 1)  # one more axis than before is a change


TYPES = {
    "float": "float[1] f = {2}", "float16": "float16[1] f = {2}", "double": "double[1] f = {2}",
    "bool": "bool[1] f = {1}", "int32": "int32[1] f = {7}", "int64": "int64[1] f = {-7}",
    "uint8": "uint8[1] f = {255}",
}  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
def test_constants_of_every_type(dtype):
    body = f"t = Concat<axis=0>(n, m) y = ConstantOfShape<value: tensor = {TYPES[dtype]}>(t)"
    read(graph(body, f"{dtype}[p, q] y"), 1)


def test_a_constant_without_a_value_is_0_in_float32():
    after = read(graph("t = Concat<axis=0>(k, n) y = ConstantOfShape(t)", "float[p, q] y"), 1)
    assert not np.any(run(after, 2, 3, 4)[0])


# What counts --------------------------------------------------------------------------------------

RANGES = {
    "from 0": "y = Range(zero, m0, one)",
    "from a number": "y = Range(two, m0, one)",
    "from a size": "y = Range(n0, m0, one)",
    "from one size to a sum": "s = Add(n0, m0) y = Range(n0, s, one)",
    "from a sum": "s = Add(n0, m0) t = Add(s, k0) y = Range(s, t, one)",
    "to a sum with a number": "s = Add(n0, two) y = Range(zero, s, one)",
    "from a size to a number": "t = Add(two, two) y = Range(n0, t, one)",
    "one size twice": "s = Add(n0, m0) x = Range(n0, s, one) z = Range(zero, s, one) "
    "y = Concat<axis=0>(x, z)",
}  # fmt: skip


@pytest.mark.parametrize("case", RANGES)
def test_a_range_is_a_running_sum(case):
    after = read(graph(RANGES[case], "int64[p] y"), 1 + ("z =" in RANGES[case]))
    assert "Range" not in ops(after)


def test_what_was_rewritten_is_no_tensor_to_read_from():
    """The second mask is as long as the first positions, which no one has but they."""
    body = """s = Add(n0, m0)  r = Range(zero, s, one)  t = Concat<axis=0>(k, ones)
        rows = Shape(r)  u = Concat<axis=0>(k, rows)  y = Expand(number, u)  z = Identity(r)"""
    after = read(graph(body, "float[p, q] y", "int64[r] z"), 2)
    assert "Range" not in ops(after)


# What is a number -----------------------------------------------------------------------------

NUMBERS = {  # and how many nodes read one
    "a scalar": ("y = Add(x, m0)", 1),
    "a tensor of one element": ("y = Add(x, m)", 1),
    "both sides of it": ("s = Add(n0, m0)  z = Add(x, m0)  y = Mul(z, s)", 2),
    "one of int32": ("s = Cast<to=6>(m0) t = Cast<to=6>(x) z = Add(t, s) y = Cast<to=7>(z)", 1),
    "a mean": ("f = Cast<to=1>(m0)  g = Cast<to=1>(x)  z = Div(g, f)  y = Cast<to=7>(z)", 1),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_a_size_that_data_is_computed_with(case):
    body, hits = NUMBERS[case]
    read(graph(f"f0 = Sign(a)  x = Cast<to=7>(f0)  {body}", "int64[p, q] y"), hits)


def test_a_number_keeps_its_rank():
    body = "y = Cast<to=1>(m)  z = Cast<to=1>(m0)"
    after = read(graph(body, "float[p] y", "float z"), 2)
    assert [x.shape for x in run(after, 2, 3, 4)] == [(1,), ()]


def test_a_size_in_two_places_is_one_line_of_ones():
    body = """t = Concat<axis=0>(k, m, n) y = Expand(number, t)  r = Range(zero, m0, one)
        c0 = Cast<to=1>(r)  z = Add(c0, a)"""
    after = read(graph(body, "float[p, q, s] y", "float[t, u] z"), 2)
    names = [str(n.outputs[0].name) for n in after.graph if n.op_type == "Expand"]
    assert names.count("a_1_ones") == 1


# What is left alone ---------------------------------------------------------------------------

REFUSED = {
    "one less": ("d = Add(m0, low) f = Cast<to=7>(a) x = Add(f, d) y = Cast<to=1>(x)",
                 "has the size -1 + m"),
    "a product": ("s = Mul(n, m) t = Concat<axis=0>(k, s) y = Expand(number, t)",
                  "no tensor before it has the size m*n"),
    "a multiple": ("s = Add(n, n) y = ConstantOfShape(s)", "has the size 2*n"),
    "steps": ("r = Range(zero, m0, two) y = Cast<to=1>(r)", "does not count in int64 by 1"),
    "backwards": ("r = Range(m0, zero, low) y = Cast<to=1>(r)", "does not count in int64 by 1"),
    "int32": ("e = Cast<to=6>(m0) s = Cast<to=6>(zero) r = Range(s, e, one32) y = Cast<to=1>(r)",
              "does not count in int64 by 1"),
    "a difference": ("s = Sub(m0, k0) r = Range(zero, s, one) y = Cast<to=1>(r)",
                     "how far it counts is no size"),
    "below 0": ("r = Range(low, m0, one) y = Cast<to=1>(r)", "it starts at no size"),
    "data": ("x = ReduceMax<keepdims=0>(a) e = Cast<to=7>(x) r = Range(zero, e, one) "
             "y = Cast<to=1>(r)", "how far it counts is no size"),
    "data in a target": ("x = Cast<to=7>(row) s = Slice(x, zeros, ones, ones) e = Squeeze(s) "
                         "i = Cast<to=7>(a) j = ReduceMax<keepdims=0>(i) f = Unsqueeze(j, zeros) "
                         "t = Concat<axis=0>(n, f) y = Expand(number, t)", "are not known"),
    "a number that is no size": ("d = Sub(m0, k0) f = Cast<to=7>(a) "
                                 "x = Add(f, d) y = Cast<to=1>(x)",
                                 "no tensor before it has the size"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(case):
    body, said = REFUSED[case]
    refuse(
        graph(body, "float[p, q] y" if "Concat" in body or "Add" in body else "float[p] y"), said
    )


def test_half_of_a_rewrite_is_none():
    """One input has a place, the other has none: nothing is put in for the first."""
    body = "s = Mul(n0, m0)  c = Greater(a, a)  y = Where(c, m0, s)"
    refuse(graph(body, "int64[p, q] y"), "no tensor before it has the size m*n")


def test_a_tensor_that_comes_later_has_nothing_to_say_yet():
    """Of the flat one, n*m long, the first mask knows nothing; the second reads from it."""
    body = """s = Mul(n, m)  y = Expand(number, s)  flat = Reshape<allowzero=1>(a, s)  r = Abs(flat)
        z0 = ConstantOfShape(s)  z = Add(z0, r)"""
    model = graph(body, "float[p] y", "float[q] z")
    after = model.clone()
    done = ReadSizesWhole()(after)
    assert done.hits == 1
    assert len(done.notes) == 1
    assert "Expand" in done.notes[0]
    same(model, after)


QUIET = {
    "a target straight of Shape": "t = Shape(a)  y = Expand(number, t)",
    "a number of data": """i = Cast<to=7>(a)  j = ReduceMax<keepdims=0>(i)  x = Add(i, j)
        y = Cast<to=1>(x)""",
    "a range of constants": """r = Range(zero, two, one)  f = Cast<to=1>(r)
        t = Slice(f, zeros, ones)  y = Add(a, t)""",
}


@pytest.mark.parametrize("case", QUIET)
def test_what_needs_nothing_gets_no_note(case):
    refuse(graph(QUIET[case], "float[p, q] y"))


def test_branches_and_what_they_read():
    """What they compute stays theirs; what is rewritten outside they read from its new place."""
    body = """t = Concat<axis=0>(n, m) y0 = Expand(number, t)  s0 = ReduceSum<keepdims=0>(a)
        yes = Greater(s0, s0)
        y = If (yes) <then_branch = yes () => (float[p, q] u) {
                ty = Concat<axis=0>(n, m)  u = Expand(y0, ty) },
            else_branch = no () => (float[p, q] v) {
                tn = Concat<axis=0>(n, m)  w = ConstantOfShape(tn)  v = Add(w, y0) }>"""
    after = read(graph(body, "float[p, q] y"), 1, placed=False)
    inner = [n.op_type for g in after.graphs() if g is not after.graph for n in g]
    assert inner == ["Concat", "Expand", "Concat", "ConstantOfShape", "Add"]


def test_sequences_text_and_unused_outputs_have_no_sizes_to_read():
    """They are declared with the very sizes that are wanted."""
    text = f"""{HEAD} g (seq(float[p, q]) s, string[p, q] w, float[p, 1] a, float[q] b)
        => (float[p, q] y) <float[1] number = {{5}}>
        {{ p = Shape<start=0, end=1>(a)  q = Shape(b)  t = Concat<axis=0>(p, q)
           y = Expand(number, t) }}"""
    model = ir.from_onnx_text(text)
    InferShapes()(model)
    assert ReadSizesWhole()(model).hits == 1
    read_by = {v.name for n in model.graph for v in n.inputs if v is not None}
    assert not read_by & {"s", "w"}


def test_values_without_types_are_typed_first():
    """Rules before it in the pipeline write nodes without types."""
    model = graph("t = Concat<axis=0>(n, k, threes) y = Expand(number, t)", "float[p, q, r] y")
    for node in model.graph:
        if node.op_type in ("Shape", "Concat"):
            node.outputs[0].type = node.outputs[0].shape = None
    after = model.clone()
    assert ReadSizesWhole()(after).hits == 1
    same(model, after)


def test_an_old_opset_is_left_alone():
    body = """s = Shape(a)  i = Gather(s, ones)  t = Concat<axis=0>(i, ones)
        y = Expand(number, t)"""
    refuse(graph(body, "float[p, q] y", opset=13), "the opset is 13")


# Graphs by chance -----------------------------------------------------------------------------


def by_chance(seed: int) -> ir.Model:
    """Masks, positions, and numbers of random sizes, each of which may read from those before."""
    rng = np.random.default_rng(seed)
    body, outputs = ["nk = Add(n, k)  nk0 = Squeeze(nk)"], []
    entries = ["n", "m", "k", "nk", "twos", "ones"]
    scalars = ["n0", "m0", "k0", "nk0"]
    for i in range(4):
        what = rng.choice(["expand", "mask", "zeros", "range", "number"])
        if what == "range":
            start, last = rng.choice(["zero", "two", *scalars]), rng.choice(scalars)
            body.append(f"y{i} = Range({start}, {last}, one)")
            outputs.append(f"int64[p{i}] y{i}")
            entries.append(f"e{i}")
            body.append(f"e{i} = Shape(y{i})")
        elif what == "number":
            body.append(f"f{i} = Cast<to=7>(a)  y{i} = Add(f{i}, {rng.choice(scalars)})")
            outputs.append(f"int64[p{i}, q{i}] y{i}")
        else:
            sizes = list(rng.choice(entries, rng.integers(1, 4)))
            source = "number"
            if what == "mask":  # [n, 1, m], of which any axis may be asked for as it is, or as 1
                body.append(f"x{i} = Unsqueeze(a, ones)")
                source, free = f"x{i}", rng.choice(entries)
                sizes = [rng.choice(["n", "ones"]), free, rng.choice(["m", "ones"])]
            body.append(f"t{i} = Concat<axis=0>({', '.join(sizes)})")
            op = "ConstantOfShape(" if what == "zeros" else f"Expand({source}, "
            body.append(f"y{i} = {op}t{i})")
            outputs.append(f"float[{', '.join(f'{d}{i}' for d in 'pqr'[: len(sizes)])}] y{i}")
    return graph("\n".join(body), *outputs)


def test_graphs_by_chance():
    hits = 0
    for seed in range(40):
        model = by_chance(seed)
        after = model.clone()
        done = ReadSizesWhole()(after)
        same(model, after, AT[seed % 2 :: 2])
        hits += done.hits
        if not done.notes:
            assert not unplaced(after, TARGETS["cuda"]), (seed, ops(after))
        again = ReadSizesWhole()(after)
        assert (again.hits, again.notes) == (0, done.notes)
    assert hits > 80


def test_the_pipeline_asks_for_it_where_sizes_lie_on_the_host():
    asks = {
        name
        for name, target in TARGETS.items()
        if any(isinstance(p, ReadSizesWhole) for p in pipeline.lower(target))
    }
    assert asks == {name for name, target in TARGETS.items() if target.sizes_on_host} == {"cuda"}
