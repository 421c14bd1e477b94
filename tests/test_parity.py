"""The check against PyTorch: it has to fail where a graph is wrong, and say where."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxpress
import pytest
import torch
from onnxpress import artifact, exporter
from onnxpress.artifact import TensorSpec
from onnxpress.errors import ExportError, GateError, InputError
from onnxpress.exporter import Reference, capture, check, pytorch, refuse, resolve
from onnxpress.exporter.parity import FLOOR, TOLERANCE
from onnxpress.press import verify

from . import factories

SPEC = f"{factories.__file__}:two_outputs"

# Graphs that are wrong on purpose -------------------------------------------------------------


def nudge_a_weight(model, by: float = 1e-3) -> None:
    value = next(v for v in model.graph.initializers.values() if len(v.shape) == 2)
    array = value.const_value.numpy().copy()
    array.flat[0] += by
    value.const_value = ir.tensor(array, name=value.name)


def swap_outputs(model) -> None:
    a, b = model.graph.outputs
    a.name, b.name = "swapped", a.name
    a.name = "second"
    model.graph.outputs[:] = [b, a]


def freeze_the_length(model) -> None:
    """The traced length in the middle of the graph: a reshape that fits no other."""
    node = next(n for n in model.graph if n.outputs[0] in model.graph.outputs)
    shape = ir.Value(name="frozen", const_value=ir.tensor(np.array([-1, 5, 4]), name="frozen"))
    model.graph.register_initializer(shape)
    reshape = ir.node("Reshape", [node.inputs[0], shape])
    model.graph.insert_before(node, reshape)
    node.replace_input_with(0, reshape.outputs[0])


def forget_an_input(model) -> None:
    """The second input is never read: what aliased example inputs did."""
    x, y = model.graph.inputs
    y.replace_all_uses_with(x)


def repeat_one_row(model) -> None:
    """Right at batch 1 alone: every row is given the answer of row 0."""
    last = model.graph.outputs[0]
    node = last.producer()
    zero = ir.Value(name="zero", const_value=ir.tensor(np.array([0]), name="zero"))
    model.graph.register_initializer(zero)
    first = ir.node("Gather", [node.inputs[0], zero])
    back = ir.node("Sub", [node.inputs[0], node.inputs[0]])
    both = ir.node("Add", [back.outputs[0], first.outputs[0]])
    for new in (first, back, both):
        model.graph.insert_before(node, new)
    node.replace_input_with(0, both.outputs[0])


@pytest.fixture
def tamper(monkeypatch):
    """Makes `press` and `export` capture a graph that is changed before anyone sees it."""

    def tamper(change):
        def captured(source):
            found = capture(source)
            change(found.model)
            return found

        monkeypatch.setattr(exporter, "capture", captured)

    return tamper


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (nudge_a_weight, ["output first of shape (", "differs by", "at position [", "against"]),
        (swap_outputs, ["first at", "has shape (", "torch", "gives ("]),
        (freeze_the_length, ["sequence=", "torch 2", "runs and ONNX Runtime does not"]),
        (forget_an_input, ["output", "differs by"]),
        (repeat_one_row, ["output first of shape (", "batch=", "differs by"]),
    ],
)
def test_a_wrong_graph_is_refused(tamper, refused, change, said):
    tamper(change)
    e = refused(SPEC, GateError)
    assert e.exit_code == 3
    assert "does not compute what torch" in e.what
    for words in said:
        assert words in e.what
    assert "nothing was published" in e.hint
    assert "--allow-drift" in e.hint


def test_export_refuses_as_press_does(tamper, refused):
    tamper(nudge_a_weight)
    assert refused(SPEC, GateError, onnxpress.export).what.startswith("the graph does not compute")


def test_the_untampered_graph_passes(tmp_path):
    manifest = onnxpress.press(SPEC, tmp_path / "out", measure=False)
    assert manifest.parity["passed"]
    assert list(manifest.parity["max_abs"]) == ["first", "second"]


def test_a_nudge_within_tolerance_passes(tamper, tmp_path):
    tamper(lambda model: nudge_a_weight(model, 1e-7))
    assert onnxpress.press(SPEC, tmp_path / "out", measure=False).parity["passed"]


def test_drift_that_is_allowed_is_recorded(tamper, tmp_path):
    tamper(nudge_a_weight)
    onnxpress.press(SPEC, tmp_path / "out", allow_drift=True, measure=False)
    parity = artifact.read_manifest(tmp_path / "out").parity
    assert parity["allowed_drift"]
    assert not parity["passed"]
    assert "output first" in parity["worst"]
    assert 1e-5 < float(parity["max_abs"]["first"]) < 1e-1
    *_, found = verify(tmp_path / "out", source=SPEC)
    assert found.passed is False
    assert "drift was allowed" in found.detail


def test_drift_that_did_not_happen_is_not_recorded(tmp_path):
    manifest = onnxpress.press(SPEC, tmp_path / "out", allow_drift=True, measure=False)
    assert manifest.parity["allowed_drift"] is False


def test_a_refusal_keeps_the_artifact_that_is_there(tamper, tmp_path):
    out = tmp_path / "parent" / "out"
    onnxpress.press(SPEC, out, measure=False)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    tamper(nudge_a_weight)
    with pytest.raises(GateError):
        onnxpress.press(SPEC, out, force=True, measure=False)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]


# The check itself, on functions --------------------------------------------------------------

X = TensorSpec("x", "float32", ("batch", "sequence"))
MASK = TensorSpec("attention_mask", "int64", ("batch", "sequence"))


def reference(run, *, examples=None, **more) -> Reference:
    x = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    return Reference("numpy", run, lambda feeds: lambda: run(feeds), examples or {"x": x}, **more)


def double(feeds):
    return [feeds["x"] * 2]


def judged(run, got, inputs=(X,), **more):
    """What the check finds where the reference is `run` and the graph is `got`."""
    return check(reference(run, **more), lambda feeds: {"y": got(feeds)}, inputs)


def test_equal_functions_pass():
    found = judged(double, lambda f: f["x"] + f["x"])
    assert found.passed
    assert found.max_abs == {"y": 0.0}
    assert found.ratio == 0.0
    refuse(found)


def test_a_difference_at_one_place_is_named():
    def wrong(feeds):
        y = feeds["x"] * 2
        if y.shape[1] > 7 and len(y) > 1:
            y[1, 7] += 0.5
        return y

    found = judged(double, wrong)
    assert not found.passed
    assert "output y of shape (" in found.worst
    assert "batch=" in found.worst
    assert "at position [1, 7]" in found.worst
    assert "differs by 0.5" in found.worst


@pytest.mark.parametrize(("share", "passes"), [(0.9, True), (1.1, False)])
def test_the_tolerance_is_where_it_says(share, passes):
    def near(feeds):
        y = (feeds["x"] * 2).astype(np.float64)
        limit = TOLERANCE["float32"] * (np.abs(y) + np.abs(y).max() + FLOOR)
        return y + share * limit

    assert judged(double, near).passed is passes


def test_integers_and_booleans_are_equal_or_not():
    assert judged(lambda f: [f["x"] > 0], lambda f: f["x"] > 0).passed
    assert not judged(lambda f: [f["x"] > 0], lambda f: f["x"] >= -1e9).passed
    top = lambda f: f["x"].argmax(1)  # noqa: E731
    assert judged(lambda f: [top(f)], top).passed
    assert not judged(lambda f: [top(f)], lambda f: top(f) + 1).passed


def test_nan_in_the_reference_is_counted_and_not_compared():
    def rows(feeds):
        y = feeds["x"] * 2
        y[0, 0] = np.nan
        return [y]

    found = judged(rows, lambda f: f["x"] * 2)
    assert found.passed
    assert found.undefined == len(found.points)
    assert found.summary()["undefined"] == len(found.points)
    assert not judged(rows, lambda f: f["x"] * 3).passed  # the others still are


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_in_the_graph_alone_fail(value):
    def wrong(feeds):
        y = feeds["x"] * 2
        y[-1, -1] = value
        return y

    found = judged(double, wrong)
    assert not found.passed
    assert str(value) in found.worst
    with pytest.raises(GateError):
        refuse(found)


def test_a_reference_of_nan_alone_proves_nothing():
    found = judged(lambda f: [f["x"] * np.nan], lambda f: f["x"])
    with pytest.raises(GateError, match="of y it computes NaN alone"):
        refuse(found)


def test_another_shape_fails():
    found = judged(double, lambda f: (f["x"] * 2)[:, :4])
    assert not found.passed
    assert "has shape (2, 4), numpy gives (2, 5)" in found.worst


def test_a_graph_that_breaks_at_a_point_fails():
    def breaks(feeds):
        if feeds["x"].shape[1] == 1:
            raise InputError("no length of one")
        return feeds["x"] * 2

    found = judged(double, breaks)
    assert not found.passed
    assert "sequence=1 numpy runs and ONNX Runtime does not: no length of one" in found.worst


def test_an_output_that_is_missing_is_no_success():
    with pytest.raises(ValueError, match="zip"):
        check(reference(lambda f: [f["x"], f["x"]]), lambda f: {"y": f["x"]}, (X,))


def test_a_reference_that_takes_too_few_points_is_an_error():
    def picky(feeds):
        if feeds["x"].shape != (2, 5):
            raise ValueError("only 2 x 5")
        if feeds["x"][0, 0] > 0:
            raise ValueError("and not above 0")
        return [feeds["x"]]

    with pytest.raises(ExportError, match=r"numpy ran at \d of the points to check at, 8") as e:
        judged(picky, lambda f: f["x"])
    assert "batch=1" in e.value.hint


# Points ----------------------------------------------------------------------------------------


def seen(inputs, **more) -> dict[str, dict[str, np.ndarray]]:
    """The feeds of every point."""
    met = []

    def run(feeds):
        met.append({n: v.copy() for n, v in feeds.items()})
        return {"y": feeds["x"]}

    found = check(reference(lambda feeds: [feeds["x"]], **more), run, inputs)
    return dict(zip((p for p, _ in found.points), met, strict=True))


def mask_example() -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    return {"x": x, "attention_mask": np.ones((2, 5), np.int64)}


def test_points_hold_the_sizes_and_masks_that_break_graphs():
    points = seen((X, MASK), examples=mask_example())
    shapes = [f["x"].shape for f in points.values()]
    assert len(points) >= 8
    assert (1, 5) in shapes  # batch 1
    assert (2, 1) in shapes  # length 1
    assert (1, 1) in shapes
    assert any(b > 2 and s > 5 for b, s in shapes)  # past the traced ones
    assert any(s >= 25 for _, s in shapes)
    masks = {p.split("mask ")[1]: f["attention_mask"] for p, f in points.items() if "mask" in p}
    assert set(masks) == {"ragged", "ragged left", "row 0 all 0", "row 0 all 1"}
    assert not masks["row 0 all 0"][0].any()
    assert masks["row 0 all 0"][1].all()
    assert masks["row 0 all 1"][0].all()
    assert not masks["row 0 all 1"][1].any()
    ragged = [f["attention_mask"] for p, f in points.items() if p.endswith("ragged")]
    assert any(len({tuple(row) for row in m}) > 1 for m in ragged)
    assert all((np.diff(m) <= 0).all() for m in ragged)
    assert (np.diff(masks["ragged left"]) >= 0).all()


def test_every_point_has_values_of_its_own():
    points = seen((X,))
    assert len({f["x"].ravel()[0] for f in points.values()}) == len(points)
    assert len({np.abs(f["x"]).sum() for f in points.values()}) == len(points)


def test_an_empty_past_and_a_long_one_are_points():
    past = TensorSpec("past", "float32", ("batch", "past_sequence"))
    examples = {**reference(double).examples, "past": np.ones((2, 3), np.float32)}
    sizes = [f["past"].shape[1] for f in seen((X, past), examples=examples).values()]
    assert 0 in sizes
    assert 600 in sizes
    short = seen((X, past), examples=examples, limits={"past_sequence": 20})
    assert max(f["past"].shape[1] for f in short.values()) == 20


def test_expressions_follow_their_names():
    both = TensorSpec("both", "float32", ("batch", "past_sequence + sequence"))
    past = TensorSpec("past", "float32", ("batch", "past_sequence"))
    examples = {
        **reference(double).examples,
        "past": np.ones((2, 3), np.float32),
        "both": np.ones((2, 8), np.float32),
    }
    for feeds in seen((X, past, both), examples=examples).values():
        assert feeds["both"].shape[1] == feeds["past"].shape[1] + feeds["x"].shape[1]


def test_the_same_seed_gives_the_same_points_and_values():
    one, other = (seen((X, MASK), examples=mask_example()) for _ in range(2))
    assert list(one) == list(other)
    for point, feeds in one.items():
        for name, value in feeds.items():
            np.testing.assert_array_equal(value, other[point][name])


def test_integers_stay_below_the_vocabulary():
    ids = TensorSpec("x", "int64", ("batch", "sequence"))
    example = {"x": np.array([[3, 1, 4, 1, 5]] * 2)}
    known = seen((ids,), examples=example, highs={"x": 1000}).values()
    assert max(f["x"].max() for f in known) > 100
    assert max(f["x"].max() for f in known) < 1000
    assert max(f["x"].max() for f in seen((ids,), examples=example).values()) > 5  # all are taken


def test_a_model_with_fixed_shapes_is_checked_on_fresh_values():
    fixed = TensorSpec("x", "float32", (2, 5))
    points = seen((fixed,))
    assert len(points) == 8
    assert len({f["x"][0, 0] for f in points.values()}) == 8


def test_additive_masks_are_filled_as_masks():
    bias = TensorSpec("bias", "float32", ("batch", "sequence"))
    example = np.array([[0, 0, 0, -np.inf, -np.inf]] * 2, np.float32)
    points = seen((X, bias), examples={**reference(double).examples, "bias": example})
    assert {v for f in points.values() for v in np.unique(f["bias"])} == {0.0, -np.inf}
    (row,) = (f["bias"] for p, f in points.items() if p.endswith("row 0 all 0"))
    assert np.isinf(row[0]).all()
    assert (row[1] == 0).all()


def test_pytorch_gives_the_outputs_of_the_module():
    source = resolve(SPEC)
    x, y = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    got = pytorch(source).run({"x": x.numpy(), "y": y.numpy()})
    with torch.no_grad():
        want = source.module(x, y)
    assert [g.shape for g in got] == [(3, 2, 4), (3, 2)]
    for one, other in zip(got, want.values(), strict=True):
        np.testing.assert_array_equal(one, other.numpy())
