"""Attention in every spelling: each is lifted to the same numbers, or refused and left alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.lift.lift_attention import LiftAttention
from onnxpress.optimizers.lower.expand_attention_mask import ExpandAttentionMask
from onnxpress.optimizers.lower.soften_attention_mask import SoftenAttentionMask

LOWEST = float(np.finfo(np.float32).min)
SIZES = [(2, 3, 5), (1, 1, 1), (3, 4, 4)]  # batch, queries, keys


@dataclass
class Spelling:
    """One way to write attention, as ONNX text."""

    lines: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    count: int = 0

    def op(self, expression: str) -> str:
        self.count += 1
        self.lines.append(f"t{self.count} = {expression}")
        return f"t{self.count}"

    def number(self, value: float, rank: int) -> str:
        self.count += 1
        self.constants.append(f"float{'[1]' * rank} c{self.count} = {{{value!r}}}")
        return f"c{self.count}"

    def binary(self, op: str, a: str, b: str, swap: bool) -> str:
        return self.op(f"{op}({b}, {a})" if swap else f"{op}({a}, {b})")

    def text(self) -> str:
        constants = f"<{', '.join(self.constants)}>" if self.constants else ""
        return (
            '<ir_version: 10, opset_import: ["" : 23]>\n'
            f"g ({', '.join(self.inputs)}) => ({', '.join(self.outputs)})\n{constants}\n"
            "{" + "\n".join(self.lines) + "}"
        )


MASKS = {
    "padding": "[batch,1,1,keys]",
    "square": "[seq,keys]",
    "per head": "[1,2,seq,keys]",
    "full": "[batch,2,seq,keys]",
}


@st.composite
def spellings(draw: st.DrawFn) -> Spelling:
    s, flip = Spelling(), st.booleans()
    kv = draw(st.sampled_from(["2", "2", "2", "1"]))
    s.inputs = [f"float[batch,2,seq,4] q, float[batch,{kv},keys,4] k, float[batch,{kv},keys,4] v"]
    s.outputs = ["float[batch,2,seq,4] y"]

    def scaled(x: str) -> str:
        if not draw(flip):
            return x
        # Never up: large scores differ by rounding alone.
        op, by = draw(st.sampled_from([("Mul", 0.5), ("Mul", 1e-4), ("Div", 2.0), ("Div", 1e4)]))
        number = s.number(by, draw(st.integers(0, 1)))
        return s.binary(op, x, number, op == "Mul" and draw(flip))

    def masked(x: str, name: str) -> str:
        shape = MASKS[draw(st.sampled_from(sorted(MASKS)))]
        kind = draw(st.sampled_from(["add", "sub", "fill", "keep", "lowest"]))
        if kind in ("add", "sub"):
            s.inputs.append(f"float{shape} {name}")
            return s.binary(
                "Add" if kind == "add" else "Sub", x, name, kind == "add" and draw(flip)
            )
        s.inputs.append(f"bool{shape} {name}")
        low = s.number(
            draw(st.sampled_from([-1e9, -1e4, LOWEST, LOWEST, LOWEST] * 3 + [-5.0])),
            draw(st.integers(0, 1)),
        )
        if kind == "lowest":
            added = s.op(f"Where({name}, {s.number(0.0, 0)}, {low})")
            return s.binary("Add", x, added, draw(flip))
        return s.op(
            f"Where({name}, {low}, {x})" if kind == "fill" else f"Where({name}, {x}, {low})"
        )

    q = scaled("q")
    kt = scaled(s.op("Transpose<perm=[0,1,3,2]>(k)"))
    x = scaled(s.op(f"MatMul({q}, {kt})"))
    for i in range(draw(st.integers(0, 2))):
        x = scaled(masked(x, f"mask{i}"))
    if draw(st.integers(0, 9)) == 0:  # a second reader
        s.outputs.append("float[batch,2,seq,1] seen")
        s.lines.append(f"axes = Constant<value_ints=[-1]>()\nseen = ReduceMax({x}, axes)")
    axis = draw(st.sampled_from([-1] * 9 + [3, 2]))
    p = s.op(f"Softmax<axis={axis}>({x})")
    if draw(flip):
        p = s.op(f"Where({s.op(f'IsNaN({p})')}, {s.number(0.0, 0)}, {p})")
    s.lines.append(f"y = MatMul({p}, v)")
    return s


def feeds(model: ir.Model, batch: int, seq: int, keys: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    sizes = {"batch": batch, "seq": seq, "keys": keys}
    found = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d.value)] for d in value.shape]
        x = rng.standard_normal(shape).astype(np.float32)
        if value.dtype == ir.DataType.BOOL:
            x = x > -0.3
            x[0] = batch == 2  # rows that are masked throughout, or not at all
        found[value.name] = x
    return found


def run(model: ir.Model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, inputs)


def test_right_or_refused() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
    @given(spellings())
    def check(spelling: Spelling) -> None:
        seen["lifted" if lifted_and_right(spelling) else "refused"] += 1

    check()
    assert seen["lifted"] >= 30, "to refuse everything is right, and worth nothing"
    assert seen["refused"] > 0


def lifted_and_right(spelling: Spelling) -> bool:
    model = ir.from_onnx_text(spelling.text())
    InferShapes()(model)
    before = model.clone()
    outcome = LiftAttention()(model)
    if not outcome.hits:
        assert outcome.misses, spelling.text()
        assert ir.to_onnx_text(model) == ir.to_onnx_text(before)
        return False
    assert not outcome.misses
    common.CheckerPass(full_check=True)(model)
    assert not LiftAttention()(model).modified
    for lower in (InferShapes(), SoftenAttentionMask(), ExpandAttentionMask()):
        lower(model)
    for sizes in SIZES:
        inputs = feeds(before, *sizes)
        for a, b in zip(run(model, inputs), run(before, inputs), strict=True):
            a[np.isnan(b)] = np.nan  # a row of -inf throughout: Softmax has no answer to it
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5, err_msg=spelling.text())
    return True
