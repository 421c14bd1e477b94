"""Rotations in spellings drawn at random: lifted right, or left alone with a reason."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.lift.lift_rotary_embedding import LiftRotaryEmbedding
from onnxpress.optimizers.lower.expand_rotary_cache import ExpandRotaryCache
from onnxpress.optimizers.outcome import Outcome

HALF = 3  # odd on purpose: kernels like multiples of 4 or 8
WRONG = ("swapped", "other half negated", "halves differ", "unequal split", "turned back")


@dataclass(frozen=True)
class Spelling:
    """One way to write a rotation; `wrong` makes it something else."""

    interleaved: bool
    joined_last: bool  # x1*cos - x2*sin, x2*cos + x1*sin are joined; else -x2, x1 are
    split: bool  # by Split, not Slice
    passing: int  # columns that are not rotated
    heads_last: bool  # [batch, seq, heads, d]
    cache_batch: bool  # a cache for each of the batch
    full_cache: bool  # the caches have both halves
    order: tuple[bool, ...]  # whether operands are swapped
    reader: bool  # the turned half is an output too
    wrong: str
    dtype: str


spellings = st.builds(
    Spelling,
    interleaved=st.booleans(),
    joined_last=st.booleans(),
    split=st.booleans(),
    passing=st.sampled_from([0, 0, 2]),
    heads_last=st.booleans(),
    cache_batch=st.booleans(),
    full_cache=st.booleans(),
    order=st.tuples(*[st.booleans()] * 6),
    reader=st.booleans(),
    wrong=st.sampled_from(["", "", "", *WRONG]),
    dtype=st.sampled_from(["float", "float", "float16"]),
)


def spell(s: Spelling) -> str:
    """The graph as text: x [batch, 2, seq, d], angles f [1 or batch, seq, d/2]."""
    rot, swaps = 2 * HALF, list(s.order)
    full = s.full_cache or not s.joined_last
    lines = ["c0 = Cos(f)", "s0 = Sin(f)"]

    def op(name: str, kind: str, a: str, b: str) -> str:
        if kind != "Sub" and swaps and swaps.pop():
            a, b = b, a
        lines.append(f"{name} = {kind}({a}, {b})")
        return name

    def pairs(name: str, a: str, b: str) -> str:
        """a and b as halves, or as even and odd columns."""
        if not s.interleaved:
            lines.append(f"{name} = Concat<axis=-1>({a}, {b})")
            return name
        lines.append(f"{name}a = Unsqueeze({a}, minus)  {name}b = Unsqueeze({b}, minus)")
        lines.append(f"{name}c = Concat<axis=-1>({name}a, {name}b)")
        rank = 3 if a in ("f", "h") else 4
        lines.append(f"{name} = Reshape({name}c, flat{rank})")
        return name

    if full:
        pairs("e", "f", "f")
        pairs("k", "f", "h" if s.wrong == "halves differ" else "f")
        lines += ["c1 = Cos(e)", "s1 = Sin(k)"]
    axis = "two" if s.heads_last else "one"
    lines += [f"cos = Unsqueeze(c{int(full)}, {axis})", f"sin = Unsqueeze(s{int(full)}, {axis})"]

    whole = "x"
    if s.passing:
        lines.append("whole = Slice(x, zero, rot, last)  rest = Slice(x, rot, far, last)")
        whole = "whole"
    at = HALF - 1 if s.wrong == "unequal split" and not s.joined_last else HALF
    if s.interleaved:
        lines.append(f"x1 = Slice({whole}, zero, far, last, two)")
        lines.append(f"x2 = Slice({whole}, one, far, last, two)")
    elif s.split:
        lines.append(f"x1, x2 = Split<axis=-1>({whole}, at)")
    else:
        lines.append(f"x1 = Slice({whole}, zero, cut, last)  x2 = Slice({whole}, cut, far, last)")

    y = "y0" if s.passing else "y"
    if s.joined_last:
        c1, s1, c2, s2 = "cos", "sin", "cos", "sin"
        if full and s.interleaved:
            lines += [f"{t}a = Slice({t}, zero, far, last, two)" for t in ("cos", "sin")]
            lines += [f"{t}b = Slice({t}, one, far, last, two)" for t in ("cos", "sin")]
        elif full:
            lines += [f"{t}a, {t}b = Split<axis=-1, num_outputs=2>({t})" for t in ("cos", "sin")]
        if full:
            c1, c2, s1, s2 = "cosa", "cosb", "sina", "sinb"
        if s.wrong == "swapped":
            c2, s2 = s2, c2
        down, up = ("Add", "Sub") if s.wrong == "turned back" else ("Sub", "Add")
        if s.wrong == "other half negated":
            down, up = "Sub", "Sub"
        real = op("re", down, op("a", "Mul", "x1", c1), op("b", "Mul", "x2", s1))
        imaginary = op("im", up, op("c", "Mul", "x2", c2), op("d", "Mul", "x1", s2))
        pairs(y, real, imaginary)
        turned = real
    else:
        back = s.wrong in ("other half negated", "turned back")
        lines.append("n = Neg(x1)" if back else "n = Neg(x2)")
        turned = pairs("r", "x2", "n") if back else pairs("r", "n", "x1")
        op(y, "Add", op("a", "Mul", whole, "cos"), op("b", "Mul", turned, "sin"))
    if s.passing:
        lines.append("y = Concat<axis=-1>(y0, rest)")
    if s.reader:
        lines.append(f"seen = Identity({turned})")
    lead = "batch,seq,2" if s.heads_last else "batch,2,seq"
    batch = "batch" if s.cache_batch else "1"
    x, f = f"{s.dtype}[{lead},{rot + s.passing}]", f"{s.dtype}[{batch},seq,{HALF}]"
    seen = f", {s.dtype}[a,b,c,d] seen" if s.reader else ""
    return f"""<ir_version: 10, opset_import: ["" : 23]>
g ({x} x, {f} f, {f} h) => ({x} y{seen})
<int64[1] zero={{0}}, int64[1] one={{1}}, int64[1] two={{2}}, int64[1] last={{3}},
 int64[1] minus={{-1}}, int64[1] rot={{{rot}}}, int64[1] cut={{{at}}}, int64[1] far={{99}},
 int64[2] at={{{at}, {rot - at}}},
 int64[3] flat3={{0,0,{rot}}}, int64[4] flat4={{0,0,0,{rot}}}> {{
{chr(10).join(lines)}
}}"""


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def lifted(text: str, batch: int = 2, seq: int = 3) -> tuple[ir.Model, Outcome]:
    """The graph after the pass, once its outputs are the same as before."""
    model = ir.from_onnx_text(text)
    InferShapes()(model)
    rng, feeds = np.random.default_rng(0), {}
    sizes = {"batch": batch, "seq": seq}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        feeds[value.name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    want = run(model, feeds)
    outcome = LiftRotaryEmbedding()(model)
    for a, b in zip(run(model, feeds), want, strict=True):
        tolerance = 1e-2 if a.dtype == np.float16 else 1e-5
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    return model, outcome


def kinds(model: ir.Model, kind: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == kind]


@given(spellings, st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_spelling_is_lifted_right_or_left_alone(s: Spelling, batch: int, seq: int) -> None:
    wrong = s.wrong
    if wrong == "unequal split" and (s.joined_last or s.interleaved):
        wrong = ""  # that spelling has no bounds to get wrong
    if wrong == "halves differ" and s.joined_last and not s.full_cache:
        wrong = ""
    if wrong == "swapped" and not s.joined_last:
        wrong = ""
    if wrong == "" and s.wrong:
        s = Spelling(**{**vars(s), "wrong": ""})

    model, outcome = lifted(spell(s), batch, seq)

    assert outcome.hits == (not wrong)
    assert bool(outcome.misses) == bool(wrong)
    if not wrong:
        (node,) = kinds(model, "RotaryEmbedding")
        assert node.attributes.get_int("interleaved", 0) == s.interleaved
        rot = node.attributes.get_int("rotary_embedding_dim", 0)
        # A rotated part that another reader keeps apart is lifted without the rest.
        assert rot == (2 * HALF if s.passing else 0)
    assert LiftRotaryEmbedding()(model).hits == 0


def attention(layers: int, cache: str) -> str:
    """q and k of each layer, rotated by the caches of one Concat(f, f), [batch,4,seq,8]."""
    lines = ["e = Concat<axis=-1>(f, f)  c = Cos(e)  s = Sin(e)"]
    lines.append("cos = Unsqueeze(c, one)  sin = Unsqueeze(s, one)")
    names = [f"{side}{i}" for i in range(layers) for side in "qk"]
    for n in names:
        lines.append(f"{n}1 = Slice({n}, zero, four, last)  {n}2 = Slice({n}, four, far, last)")
        lines.append(f"{n}n = Neg({n}2)  {n}r = Concat<axis=-1>({n}n, {n}1)")
        lines.append(f"{n}a = Mul({n}, cos)  {n}b = Mul({n}r, sin)  {n}y = Add({n}a, {n}b)")
    inputs = ", ".join(f"float[batch,{4 if n[0] == 'q' else 2},seq,8] {n}" for n in names)
    outputs = ", ".join(f"float[batch,{4 if n[0] == 'q' else 2},seq,8] {n}y" for n in names)
    return f"""<ir_version: 10, opset_import: ["" : 24]>
g ({inputs}, float[{cache},seq,4] f) => ({outputs})
<int64[1] zero={{0}}, int64[1] one={{1}}, int64[1] four={{4}}, int64[1] last={{3}},
 int64[1] far={{99}}> {{
{chr(10).join(lines)}
}}"""


@pytest.mark.parametrize(("cache", "expands"), [("1", 2), ("batch", 0)])
def test_all_layers_share_the_caches(cache: str, expands: int) -> None:
    model, outcome = lifted(attention(3, cache))
    assert outcome.hits == 6
    assert not outcome.misses
    assert len(kinds(model, "Expand")) == expands
    assert len(kinds(model, "Cos")) == len(kinds(model, "Sin")) == 1
    assert not kinds(model, "Neg")
    caches = {tuple(node.inputs[1:]) for node in kinds(model, "RotaryEmbedding")}
    assert len(caches) == 1


def test_sin_and_cos_may_have_any_name() -> None:
    """x*s + turned(x)*c is a rotation too, by caches of the other names."""
    text = attention(1, "1").replace("c = Cos(e)  s = Sin(e)", "c = Sin(e)  s = Cos(e)")
    model, outcome = lifted(text)
    assert outcome.hits == 2
    cos = kinds(model, "RotaryEmbedding")[0].inputs[1].producer()
    assert cos.inputs[0].producer().op_type == "Sin"


def test_a_rotation_in_a_branch_is_lifted_there() -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]>
g (float[2,2,3,8] x, float[1,1,3,4] c, float[1,1,3,4] s) => (float[2,2,3,8] y)
<int64[2] at={4, 4}, bool yes={1}> {
  y = If (yes) <
    then_branch = a () => (float[2,2,3,8] t) {
      x1, x2 = Split<axis=3>(x, at)
      p = Mul(x1, c)  q = Mul(x2, s)  u = Sub(p, q)  v1 = Mul(x2, c)  v2 = Mul(x1, s)
      v = Add(v1, v2)  t = Concat<axis=3>(u, v)
    },
    else_branch = b () => (float[2,2,3,8] o) { o = Neg(x) }
  >
}"""
    model = ir.from_onnx_text(text)
    x, branch = model.graph.inputs[0], model.graph[0].attributes["then_branch"].as_graph()
    for node in branch:  # inference leaves branches alone
        for value in node.outputs:
            value.shape = value.shape or ir.Shape([2, 2, 3, 4])
            value.type = x.type
    rng = np.random.default_rng(0)
    feeds = {v.name: rng.standard_normal(tuple(v.shape)).astype("f") for v in model.graph.inputs}
    want = run(model, feeds)
    assert LiftRotaryEmbedding()(model).hits == 1
    assert [node.op_type for node in branch][-1] == "RotaryEmbedding"
    np.testing.assert_allclose(run(model, feeds)[0], want[0], rtol=1e-5, atol=1e-5)


def test_sizes_of_no_name_get_an_expand_each() -> None:
    """Two unnamed batches may differ, so the second layer must not read the first one's cache."""
    text = """<ir_version: 10, opset_import: ["" : 23]>
g (float[?,2,3,8] x, float[?,2,3,8] z, float[1,3,4] c, float[1,3,4] s)
  => (float[?,2,3,8] y, float[?,2,3,8] w) {
  y = RotaryEmbedding(x, c, s)
  w = RotaryEmbedding(z, c, s)
}"""
    model = ir.from_onnx_text(text)
    assert ExpandRotaryCache()(model).hits == 2
    assert len(kinds(model, "Expand")) == 4
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 2, 3, 8), "z": (3, 2, 3, 8), "c": (1, 3, 4), "s": (1, 3, 4)}
    feeds = {k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()}
    assert [a.shape[0] for a in run(model, feeds)] == [2, 3]
