"""Golden tests: each rewrite on the smallest graph that shows it, as text, and executed.

A case in tests/fixtures/passes/*.txt is a header, the graph before and, after `---`, the graph
after it; without the latter the pass leaves the graph alone. Header fields: `pass`, `hits`,
`miss` (part of the reason that is given), and `before` where ONNX Runtime cannot run the graph
before: `reference` runs onnx's own evaluator, `none` nothing. `then` names a pass without which
ONNX Runtime cannot run the graph after. ONNXPRESS_UPDATE=1 rewrites what
stands after `---`.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator
from onnxpress.optimizers import clean, lift, lower
from onnxpress.optimizers.clean.infer_shapes import InferShapes
from onnxpress.optimizers.pipeline import pass_name

FIXTURES = Path(__file__).parent / "fixtures" / "passes"


def own_passes() -> dict[str, ir.passes.InPlacePass]:
    """One of each pass in clean/, lift/ and lower/, with its defaults."""
    found = {}
    for room in (clean, lift, lower):
        for module in pkgutil.iter_modules(room.__path__):
            for thing in vars(importlib.import_module(f"{room.__name__}.{module.name}")).values():
                if isinstance(thing, type) and issubclass(thing, ir.passes.InPlacePass):
                    found[pass_name(thing())] = thing()
    return found


PASSES = own_passes()
SIZES = {"batch": 2, "seq": 3, "keys": 5, "rows": 1}
EXACT = {"rtol": 0.0, "atol": 0.0}
TOLERANCE = {"float32": {"rtol": 1e-5, "atol": 1e-6}, "bool": EXACT, "int64": EXACT}


@dataclass(frozen=True)
class Case:
    path: Path
    title: str
    header: str
    before: str
    after: str | None

    def field(self, name: str, default: str = "") -> str:
        found = re.search(rf"\b{name}: (.*?)(?:   |$)", self.header)
        return found[1].strip() if found else default


def cases() -> list[Case]:
    found = []
    for path in sorted(FIXTURES.glob("*.txt")):
        for block in path.read_text().split("# title: ")[1:]:
            title, header, body = block.split("\n", 2)
            before, _, after = body.partition("---\n")
            found.append(Case(path, title, header, before.strip(), after.strip() or None))
    return found


def text(model: ir.Model) -> str:
    """The graph without node names and inferred types, so that a diff shows rewrites only."""
    model = model.clone()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.name = ""
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    return "\n".join(line.rstrip() for line in ir.to_onnx_text(model).strip().splitlines())


def update(case: Case, after: str) -> None:
    old = f"# title: {case.title}\n"
    head, _, rest = case.path.read_text().partition(old)
    _, mark, tail = rest.partition("# title: ")
    block = f"{old}{case.header}\n{case.before}\n"
    if after:
        block += f"---\n{after}\n"
    case.path.write_text(head + block + ("\n" + mark + tail if mark else ""))


def io(model: ir.Model) -> list[tuple[str | None, ir.DataType | None, str]]:
    values = (*asked(model), *model.graph.outputs)
    return [(v.name, v.dtype, str(v.shape)) for v in values]


def asked(model: ir.Model) -> list[ir.Value]:
    """The inputs that have no value of their own."""
    return [v for v in model.graph.inputs if not v.is_initializer()]


def random_feeds(model: ir.Model, seed: int) -> dict[str, np.ndarray]:
    rng, feeds = np.random.default_rng(seed), {}
    for value in asked(model):
        shape = [d if isinstance(d, int) else SIZES.get(str(d.value), 4) for d in value.shape]
        x = rng.standard_normal(shape).astype(np.float32)
        if value.dtype == ir.DataType.BOOL:
            x = x > -0.5
            x[..., 0] = True  # no row is masked throughout
        elif value.dtype == ir.DataType.INT64:
            x = rng.integers(0, 4, shape)
        feeds[value.name] = x
    return feeds


def run(model: ir.Model, feeds: dict[str, np.ndarray], how: str = "ort") -> list[np.ndarray]:
    proto = ir.to_proto(model)
    if how == "reference":
        return ReferenceEvaluator(proto).run(None, feeds)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c.path.stem}: {c.title}")
def test_pass(case: Case) -> None:
    model = ir.from_onnx_text(case.before)
    InferShapes()(model)  # as in the pipeline: rewrites are proved by shapes
    rewrite = PASSES[case.field("pass")]
    how, feeds = case.field("before", "ort"), random_feeds(model, seed=0)
    untouched, signature = text(model), io(model)
    want = None if how == "none" else run(model, feeds, how)

    outcome = rewrite(model)
    common.RemoveUnusedNodesPass()(model)  # rewrites leave dead nodes to the pipeline

    assert outcome.hits == int(case.field("hits"))
    assert outcome.modified == bool(outcome.hits)
    after = text(model)
    if os.environ.get("ONNXPRESS_UPDATE") == "1":
        update(case, after if outcome.hits else "")
    else:
        assert after == (case.after or untouched)
    assert getattr(rewrite, "changes_signature", False) or io(model) == signature
    common.CheckerPass(full_check=True)(model)
    if want is not None:
        runnable = model.clone()
        if then := case.field("then"):
            PASSES[then](runnable)
        for a, b in zip(run(runnable, feeds), want, strict=True):
            np.testing.assert_allclose(a, b, **TOLERANCE[str(b.dtype)])
    assert rewrite(model).hits == 0, "not idempotent"
    assert text(model) == after
    if miss := case.field("miss"):
        assert any(miss in said for said in (*outcome.notes, *map(str, outcome.misses))), outcome
    else:
        assert not outcome.notes
        assert not outcome.misses


def test_there_are_cases_for_each_pass_that_rewrites() -> None:
    assert {c.path.stem for c in cases()} == set(PASSES) - {
        "infer_shapes",
        "rename_values",
        "simplify_with_onnxsim",
    }
    assert all(c.path.stem == c.field("pass") for c in cases())
