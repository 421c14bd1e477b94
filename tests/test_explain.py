"""The table of layers: what counts as fused, what as missed, and what is said of it."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnxpress.optimizers.explain import Fusion, explain, kind_of
from onnxpress.optimizers.outcome import Miss
from onnxpress.optimizers.pipeline import Step

HEAD = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'


def step(name: str, *, hits: int = 0, misses: tuple[Miss, ...] = (), notes=()) -> Step:
    return Step(0, name, bool(hits), 0.0, {}, tuple(notes), hits, misses)


def graph(body: str, inputs: str = "float[b,s,8] x") -> ir.Model:
    return ir.from_onnx_text(f"{HEAD} g ({inputs}) => (float[b,s,8] y) {{ {body} }}")


def rows(model: ir.Model, *steps: Step) -> dict[str, Fusion]:
    found = explain(model, steps)
    assert [f.kind for f in found] == list(dict.fromkeys(f.kind for f in found))
    return {f.kind: f for f in found}


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        ("Attention", "Attention"),
        ("com.microsoft.Attention", "Attention"),
        ("com.microsoft.MultiHeadAttention", "Attention"),
        ("com.microsoft.GroupQueryAttention", "Attention"),
        ("com.microsoft.PackedMultiHeadAttention", "Attention"),
        ("LayerNormalization", "LayerNormalization"),
        ("com.microsoft.SkipLayerNormalization", "LayerNormalization"),
        ("com.microsoft.EmbedLayerNormalization", "LayerNormalization"),
        ("RMSNormalization", "RMSNormalization"),
        ("SimplifiedLayerNormalization", "RMSNormalization"),
        ("com.microsoft.SkipSimplifiedLayerNormalization", "RMSNormalization"),
        ("Gelu", "Gelu"),
        ("com.microsoft.BiasGelu", "Gelu"),
        ("com.microsoft.FastGelu", "Gelu"),
        ("com.microsoft.QuickGelu", "Gelu"),
        ("RotaryEmbedding", "RotaryEmbedding"),
        ("com.microsoft.RotaryEmbedding", "RotaryEmbedding"),
    ],
)
def test_every_form_of_a_layer_counts(op, kind):
    found = explain(graph(f"h = {op}(x, x, x)  y = {op}(h, h, h)"), [])
    assert found == [Fusion(kind, 2, 0, ())]


def test_an_op_of_that_name_in_another_domain_is_none():
    model = graph("y = com.microsoft.Gelu(x)")
    assert explain(model, [])
    model.graph[0].domain = "my.own"
    assert explain(model, []) == []


def test_a_kernel_that_turns_q_and_k_is_both():
    body = "y = com.microsoft.GroupQueryAttention<do_rotary={}>(x, x, x)"
    assert set(rows(graph(body.format(1)))) == {"Attention", "RotaryEmbedding"}
    assert set(rows(graph(body.format(0)))) == {"Attention"}


def test_lifted_is_of_all_times_that_a_pass_ran_and_missed_of_the_last():
    early = Miss("Gelu", "Erf 'a'", "x has two readers")
    late = Miss("Gelu", "Erf 'b'", "the factor is 0.7")
    steps = [
        step("lift_gelu", hits=2, misses=(early, late)),
        step("infer_shapes", hits=9),
        step("lift_gelu", hits=1, misses=(late,)),
    ]
    assert rows(graph("y = Gelu(x)"), *steps) == {"Gelu": Fusion("Gelu", 1, 3, (late,))}


def test_misses_of_one_kind_by_two_passes_stand_together():
    a, b = (Miss("Attention", f"Softmax {n!r}", "no") for n in "ab")
    steps = [step("lift_attention", misses=(a,)), step("lift_packed_attention", misses=(b, a))]
    assert rows(graph("y = Relu(x)"), *steps)["Attention"].missed == (a, b)


PARTS = {
    "Attention": "s = Softmax(x)  n = IsNaN(s)  g = Where(n, x, s)  y = MatMul(g, x)",
    "Gelu": "e = Erf(x)  one = Constant<value_float=1.0>()  a = Add(e, one)  y = Mul(x, a)",
    "LayerNormalization": """
        m = ReduceMean(x)  d = Sub(x, m)  two = Constant<value_float=2.0>()  p = Pow(d, two)
        v = ReduceMean(p)  eps = Constant<value_float=1e-5>()  a = Add(v, eps)  r = Sqrt(a)
        y = Div(d, r)""",
    "RMSNormalization": """
        p = Mul(x, x)  v = ReduceMean(p)  eps = Constant<value_float=1e-5>()  a = Add(eps, v)
        r = Sqrt(a)  y = Div(x, r)""",
    "RotaryEmbedding": """
        zero = Constant<value_ints=[0]>()  four = Constant<value_ints=[4]>()
        end = Constant<value_ints=[8]>()  axis = Constant<value_ints=[2]>()
        l = Slice(x, zero, four, axis)  h = Slice(x, four, end, axis)  n = Neg(h)
        y = Concat<axis=-1>(n, l)""",
}


@pytest.mark.parametrize("kind", PARTS)
def test_layers_in_parts_that_no_pass_looked_at(kind):
    (found,) = explain(graph(PARTS[kind]), [step("fold_constants", hits=3)])
    assert (found.kind, found.fused, found.lifted) == (kind, 0, 0)
    (miss,) = found.missed
    assert miss.reason == f"no pass that lifts to {kind} ran"


@pytest.mark.parametrize("kind", PARTS)
def test_what_is_left_after_a_pass_that_looked(kind):
    name = {"RMSNormalization": "lift_rms_normalization"}.get(kind)
    name = name or "lift_" + "".join(f"_{c.lower()}" if c.isupper() else c for c in kind)[1:]
    assert kind_of(name) == kind
    # A Softmax may belong to a pooling, a Concat of halves to anything: the pass knows better.
    left = [] if kind in ("Attention", "RotaryEmbedding") else ["in a form that no rule reads"]

    def reasons(of):
        return [m.reason for row in explain(graph(PARTS[kind]), [of]) for m in row.missed]

    assert reasons(step(name)) == left
    why = "the opset is 13, and it is lifted from opset 20"
    assert reasons(step(name, notes=[why])) == [why]
    assert reasons(step(name, hits=1, notes=["something odd"])) == left


@pytest.mark.parametrize(
    "body",
    [
        "y = Softmax(x)",  # the end of a classifier
        "s = Softmax(x)  y = MatMul(x, s)",  # as the values, not the weights
        "y = Erf(x)",
        "y = Tanh(x)",
        "y = Sqrt(x)",
        "n = Neg(x)  y = Concat<axis=-1>(n, x)",
    ],
)
def test_what_only_looks_like_a_part(body):
    assert explain(graph(body), []) == []


def test_layers_in_subgraphs_count():
    body = """y = If (c) <then_branch = t () => (float[b,s,8] a) { a = Gelu(x) },
                          else_branch = e () => (float[b,s,8] z) { z = Relu(x) }>"""
    assert rows(graph(body, "float[b,s,8] x, bool c"))["Gelu"].fused == 1


def test_a_layer_in_both_branches_is_one():
    body = """y = If (c) <then_branch = t () => (float[b,s,8] a) { a = Gelu(x) },
                          else_branch = e () => (float[b,s,8] z) { r = Gelu(x) z = Gelu(r) }>"""
    assert rows(graph(body, "float[b,s,8] x, bool c"))["Gelu"].fused == 2
