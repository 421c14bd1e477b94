"""nn.Module to base graph: names, dynamic shapes, the traps, and what cannot be captured."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxpress
import pytest
import torch
import torch.nn.functional as F
from onnxpress import artifact, optimizers
from onnxpress.errors import ExportError, GateError, SourceError
from onnxpress.exporter import capture, check, pytorch, refuse, resolve
from onnxpress.exporter.dims import widen
from onnxpress.exporter.names import flatten_inputs, flatten_outputs
from onnxpress.exporter.source import from_factory, register
from onnxpress.runtime import Session
from torch import nn
from torch.export import Dim

A = torch.arange(6.0).reshape(2, 3) - 2.5


def source_of(model, *made):
    return from_factory("test", "factory", (model, *made))


def shapes(model) -> dict[str, list]:
    ends = (*model.graph.inputs, *model.graph.outputs)
    return {v.name: [d if isinstance(d, int) else d.value for d in v.shape] for v in ends}


class Taken:
    """A module on its whole way to a session, optimized for the CPU."""

    def __init__(self, path, model, *made):
        self.source = source_of(model, *made)
        found = capture(self.source)
        self.notes, self.model = found.notes, found.model
        self.shapes = shapes(self.model)
        optimizers.optimize(self.model, optimizers.TARGETS["cpu"])
        artifact.save_model(self.model, path)
        self.session = Session(path)
        self.reference = pytorch(self.source)

    def parity(self):
        return check(self.reference, self.session.run, self.session.inputs)

    def agrees(self, **feeds) -> list[np.ndarray]:
        """Run both on these feeds; what PyTorch leaves undefined is not compared."""
        feeds = {n: np.asarray(v) for n, v in feeds.items()}
        want = self.reference.run(feeds)
        got = list(self.session.run(feeds).values())
        for have, wanted in zip(got, want, strict=True):
            assert have.shape == wanted.shape
            defined = np.isfinite(wanted) if wanted.dtype.kind == "f" else ...
            np.testing.assert_allclose(have[defined], wanted[defined], atol=2e-5)
        return got


@pytest.fixture
def take(tmp_path):
    return lambda model, *made: Taken(tmp_path, model, *made)


# Names of inputs -------------------------------------------------------------------------------


class NestedKeywords(nn.Module):
    def forward(self, ids, *, past, bias):
        return ids + past[0]["key"] - 2 * past[1]["key"] + 3 * bias


def t(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))


def input_names(model, example) -> list[str]:
    return [n for n, _ in flatten_inputs(source_of(model, example))]


class Pair(nn.Module):
    def forward(self, first, second=None):
        return first + second


class Stars(nn.Module):
    def forward(self, x, *rest):
        return x + sum(rest)


class Extra(nn.Module):
    def forward(self, x, **rest):
        return x + rest["y"]


@pytest.mark.parametrize(
    ("model", "example", "names"),
    [
        (Pair(), (A, A), ["first", "second"]),
        (Pair(), {"second": A, "first": A}, ["first", "second"]),
        (Pair(), [A, A], ["first", "second"]),
        (nn.Identity(), A, ["input"]),
        (Stars(), (A, A, A), ["x", "rest.0", "rest.1"]),
        (Extra(), {"y": A, "x": A}, ["x", "y"]),
        (Pair(), ({"a": A, "b": [A, (A, A)]}, A),
         ["first.a", "first.b.0", "first.b.1.0", "first.b.1.1", "second"]),
        (Pair(), (A, 2), ["first"]),
    ],
)  # fmt: skip
def test_inputs_are_named_after_the_parameters(model, example, names):
    assert input_names(model, example) == names


def test_nested_inputs_feed_what_they_name(take):
    past = [{"key": t(1)}, {"key": t(2)}]
    taken = take(NestedKeywords(), {"bias": t(3), "past": past, "ids": t(0)})
    assert list(taken.shapes) == ["ids", "past.0.key", "past.1.key", "bias", "output"]
    names = [i.name for i in taken.session.inputs]
    taken.agrees(**{n: t(10 + i).numpy() for i, n in enumerate(names)})


def test_star_inputs_feed_what_they_name(take):
    taken = take(Stars(), (t(0), t(1), -t(2)))
    assert list(taken.shapes) == ["x", "rest.0", "rest.1", "output"]
    taken.agrees(**{"x": t(5).numpy(), "rest.0": t(6).numpy(), "rest.1": 2 * t(7).numpy()})


@dataclass
class Inputs:
    first: torch.Tensor
    more: list[torch.Tensor]


class DataclassIn(nn.Module):
    def forward(self, given):
        return given.first - 2 * given.more[0]


def test_dataclasses_are_inputs_too(take):
    taken = take(DataclassIn(), (Inputs(t(0), [t(1)]),))
    assert list(taken.shapes) == ["given.first", "given.more.0", "output"]
    taken.agrees(**{"given.first": t(5).numpy(), "given.more.0": t(6).numpy()})


# Names of outputs ------------------------------------------------------------------------------

Two = namedtuple("Two", "mean var")


@dataclass
class Fields:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


@pytest.mark.parametrize(
    ("output", "names"),
    [
        (A, ["output"]),
        ((A,), ["output"]),
        ((A, A, A), ["output", "output_1", "output_2"]),
        ([A, (A, A)], ["output", "output_1", "output_2"]),
        ((A, None, A), ["output", "output_1"]),
        ({"z": A, "a": A}, ["z", "a"]),
        ({"out": {"x": A, "y": [A, A]}}, ["out.x", "out.y.0", "out.y.1"]),
        ({"a": A, "none": None}, ["a"]),
        (Two(A, A), ["mean", "var"]),
        (Fields(A), ["logits"]),
        (Fields(A, A), ["logits", "hidden"]),
        ((A, {"k": A}), ["output", "output.1.k"]),
    ],
)
def test_outputs_are_named_after_the_fields(output, names):
    assert flatten_outputs(register(output)) == names


class ManyOutputs(nn.Module):
    def forward(self, x, y):
        s = x + y
        return {
            "sum": s,
            "again": s,
            "x": x,
            "nothing": None,
            "deep": {"pair": [x * 2, Two(y * 3, y.sum(-1))]},
            "same": y,
        }


def test_outputs_of_every_kind_carry_what_they_name(take):
    taken = take(ManyOutputs(), (t(0), t(1)))
    names = ["sum", "again", "x_out", "deep.pair.0", "deep.pair.1.mean", "deep.pair.1.var", "same"]
    assert list(taken.shapes) == ["x", "y", *names]
    got = taken.agrees(x=t(5), y=t(6))
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_array_equal(got[2], t(5))


class DataclassOut(nn.Module):
    def forward(self, x):
        return Fields(logits=x * 2, hidden=x - 1)


class TupleWithNone(nn.Module):
    def forward(self, x):
        return x * 2, None, x - 1


@pytest.mark.parametrize(
    ("model", "names"),
    [(DataclassOut(), ["logits", "hidden"]), (TupleWithNone(), ["output", "output_1"])],
)
def test_dataclasses_and_none_export(take, model, names):
    taken = take(model, (t(0),))
    assert list(taken.shapes) == ["x", *names]
    taken.agrees(x=t(3))


class Clash(nn.Module):
    """Output names that the exporter would give to inner values, and the inputs' swapped."""

    def forward(self, add, mul):
        return {"mul_1": (add + mul) * 2, "out": (add - mul) * add}


def test_names_do_not_clash_with_inner_values(take):
    taken = take(Clash(), (t(0), t(1)))
    assert list(taken.shapes) == ["add", "mul", "mul_1", "out"]
    taken.agrees(add=t(5), mul=t(6))


# Dynamic shapes --------------------------------------------------------------------------------


class Add(nn.Module):
    def forward(self, x, y):
        return x + y


class Matmul(nn.Module):
    def forward(self, x, y):
        return x.sum(1, keepdim=True) + y.sum(1, keepdim=True)


def test_names_of_dims_that_the_user_gives_are_kept(take):
    rows, tokens = Dim("rows", min=1, max=64), Dim("tokens", min=1, max=32)
    given = ({0: rows, 1: tokens}, {0: rows, 1: tokens})
    taken = take(Add(), (torch.randn(4, 6, 3), torch.randn(4, 6, 3)), given)
    assert taken.shapes["x"] == taken.shapes["output"] == ["rows", "tokens", 3]
    taken.agrees(x=np.ones((1, 9, 3), np.float32), y=np.ones((1, 9, 3), np.float32))


def test_dims_are_checked_within_the_users_bounds(take):
    class NotOne(nn.Module):
        def forward(self, *, y, x):
            assert 2 <= x.shape[0] <= 4
            return x + y

    n = Dim("n", min=2, max=4)
    taken = take(NotOne(), {"x": torch.randn(4, 6), "y": t(0)[:1, :1]}, {"x": {0: n}, "y": {}})
    assert taken.shapes["x"] == ["n", 6]
    parity = taken.parity()
    assert parity.passed
    assert not parity.refused
    assert {p.split(",")[0] for p, _ in parity.points} == {"n=2", "n=4"}


def test_axes_that_the_user_leaves_out_are_fixed(take):
    taken = take(Add(), (torch.randn(4, 6), torch.randn(4, 6)), ({0: Dim("n")}, {0: Dim("n")}))
    assert taken.shapes == {n: ["n", 6] for n in ("x", "y", "output")}


def test_dynamic_shapes_that_do_not_fit_are_explained():
    source = source_of(nn.Linear(4, 3), (torch.randn(2, 4),), ({1: Dim("features")},))
    with pytest.raises(ExportError, match="dynamic shapes do not fit") as caught:
        capture(source)
    assert "features" in str(caught.value)


def test_equal_sizes_are_not_tied(take):
    taken = take(Matmul(), (torch.randn(3, 3), torch.randn(3, 3)))
    x, y = taken.shapes["x"], taken.shapes["y"]
    assert x[0] == y[0] == "batch"
    assert len({x[0], x[1], y[1]}) == 3
    taken.agrees(x=np.ones((2, 5), np.float32), y=np.ones((2, 7), np.float32))


def test_a_batch_of_one_in_the_example_varies(take):
    taken = take(nn.Linear(4, 3), (torch.randn(1, 1, 4),))
    assert taken.shapes == {
        "input": ["batch", "sequence", 4],
        "output": ["batch", "sequence", 3],
    }
    assert any("of size 1 in the example, taken to vary" in n for n in taken.notes)
    assert taken.parity().passed
    taken.agrees(input=np.ones((3, 5, 4), np.float32))


class Cached(nn.Module):
    def forward(self, x, past):
        both = torch.cat([past, x], dim=1)
        return both.sum(1), both


def test_an_empty_past_in_the_example_varies(take):
    taken = take(Cached(), (torch.randn(2, 3, 4), torch.zeros(2, 0, 4)))
    assert taken.shapes["x"][:2] == ["batch", "sequence"]
    assert taken.shapes["past"] == ["batch", "past_sequence", taken.shapes["x"][2]]
    assert any("of size 0 in the example, taken to vary" in n for n in taken.notes)
    taken.agrees(x=np.ones((1, 2, 4), np.float32), past=np.ones((1, 6, 4), np.float32))
    taken.agrees(x=np.ones((1, 2, 4), np.float32), past=np.ones((1, 0, 4), np.float32))


class Heads(nn.Module):
    """Two heads; the mask of the example has one, which is stretched."""

    def forward(self, x, mask):
        heads = torch.stack([x, 2 * x], 1)
        return heads + mask


def test_an_axis_that_was_only_stretched_is_not_grown():
    source = source_of(Heads(), (torch.randn(3, 5), torch.zeros(3, 1, 5)))
    assert not [n for n in widen(source) if "mask[1]" in n]
    assert dict(flatten_inputs(source))["mask"].shape == (3, 1, 5)


def test_widen_leaves_what_only_one_size_fits():
    source = source_of(nn.Linear(1, 3), (torch.randn(4, 1),))
    assert widen(source) == []


# The three traps -------------------------------------------------------------------------------


class Difference(nn.Module):
    def forward(self, a, b):
        return a - 2 * b


def test_one_tensor_given_for_two_inputs_stays_two_inputs(take):
    taken = take(Difference(), (A, A))
    assert list(taken.shapes) == ["a", "b", "output"]
    assert taken.parity().passed
    (got,) = taken.agrees(a=t(1), b=t(2))
    np.testing.assert_allclose(got, t(1) - 2 * t(2), atol=1e-6)  # the reference was fed both, too


def test_one_tensor_twice_in_a_nested_input_stays_two_inputs(take):
    past = {"key": A, "value": A}

    class KV(nn.Module):
        def forward(self, past):
            return past["key"] - 2 * past["value"]

    taken = take(KV(), {"past": past})
    (got,) = taken.agrees(**{"past.key": t(1), "past.value": t(2)})
    np.testing.assert_allclose(got, t(1) - 2 * t(2), atol=1e-6)


LOWEST = torch.finfo(torch.float32).min
MASKS = {
    "bool": lambda keep: keep,
    "-inf": lambda keep: torch.zeros(keep.shape).masked_fill(~keep, float("-inf")),
    "lowest float": lambda keep: torch.zeros(keep.shape).masked_fill(~keep, LOWEST),
}


class Masked(nn.Module):
    """SDPA whose mask is made of 0 and 1 for keys, as every tokenizer gives them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.proj = nn.Linear(8, 8)

    def forward(self, x, attention_mask):
        b, s, _ = x.shape
        q = self.proj(x).view(b, s, 2, 4).transpose(1, 2)
        mask = MASKS[self.kind](attention_mask[:, None, None, :].bool())  # (B, 1, 1, S)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_one_query_run_and_agree(take, kind):
    torch.manual_seed(0)
    taken = take(Masked(kind), (torch.randn(2, 5, 8), torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])))
    nodes = ir.traversal.RecursiveGraphIterator(taken.model.graph)  # it is in a branch
    assert "Attention" in [n.op_type for n in nodes]
    parity = taken.parity()
    assert parity.passed
    assert {p.rsplit(", mask ")[-1] for p, _ in parity.points if "mask" in p} == {
        "ragged",
        "ragged left",
        "row 0 all 0",
        "row 0 all 1",
    }
    x = np.random.default_rng(0).standard_normal((3, 4, 8)).astype(np.float32)
    seen = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])  # the middle row sees nothing
    (got,) = taken.agrees(x=x, attention_mask=seen)
    assert np.isfinite(got[[0, 2]]).all()


class Guarded(nn.Module):
    """The guard that exporters write around a softmax, here by hand: NaN becomes 0."""

    def forward(self, scores, mask):
        p = scores.masked_fill(mask[:, None, :] == 0, float("-inf")).softmax(-1)
        return torch.where(torch.isnan(p), torch.zeros_like(p), p)


def test_nan_guards_keep_fully_masked_rows_at_zero(take):
    taken = take(Guarded(), (torch.randn(2, 4, 5), torch.ones(2, 5, dtype=torch.int64)))
    parity = taken.parity()
    assert parity.passed
    assert parity.undefined == 0
    scores = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    (got,) = taken.agrees(scores=scores, mask=np.array([[0, 0, 0, 0], [1, 0, 1, 0]]))
    assert (got[0] == 0).all()
    assert np.allclose(got[1].sum(-1), 1)


# The graph -------------------------------------------------------------------------------------


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.drop(self.norm(self.linear(x)))


def test_a_module_in_training_mode_is_exported_for_inference(take):
    model = WithDropout()
    model.train()
    taken = take(model, (torch.randn(3, 4),))
    assert not model.training
    assert "Dropout" not in [n.op_type for n in taken.model.graph]
    assert taken.parity().passed


def test_a_module_that_rolls_dice_is_refused(tmp_path):
    class Dice(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, training=True)

    parity = Taken(tmp_path, Dice(), (torch.randn(3, 4),)).parity()
    with pytest.raises(GateError):
        refuse(parity)


def test_the_base_graph_is_of_ai_onnx_at_the_pinned_versions():
    model = capture(resolve("encoder-tiny")).model
    assert model.opset_imports == {"": 23}
    assert model.ir_version == artifact.IR_VERSION
    assert {n.domain for n in model.graph.all_nodes()} == {""}
    ops = {n.op_type for n in model.graph.all_nodes()}
    assert {"Attention", "LayerNormalization", "Gelu"} <= ops
    assert not {"Softmax", "Erf", "ReduceMean"} & ops


def test_what_is_saved_names_no_file_of_this_machine(tmp_path, write):
    spec = write("""
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(4, 4)
            def forward(self, x):
                return torch.relu(self.linear(x))
        def build():
            return Model(), (torch.randn(2, 4),)
    """)
    out = tmp_path / "out"
    for verb in (onnxpress.export, onnxpress.press):
        verb(spec, out, force=True)
        for name in ("model.onnx", "measured.json"):
            if (out / name).exists():
                data = (out / name).read_bytes()
                for word in (str(tmp_path), "user_model", "user code", "site-packages", "/tmp"):
                    assert word.encode() not in data


def test_weights_that_two_layers_share_are_stored_once(take):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    taken = take(Tied(), (torch.randn(2, 64),))
    assert sum(v.const_value.nbytes > 4096 for v in taken.model.graph.initializers.values()) == 1
    taken.agrees(x=np.ones((3, 64), np.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_other_dtypes(take, dtype):
    taken = take(Add(), ((4 * A).to(dtype), (3 * A).to(dtype)))
    assert {i.dtype for i in taken.session.inputs} == {str(dtype).removeprefix("torch.")}
    assert taken.parity().passed


# What cannot be captured -----------------------------------------------------------------------


def test_a_branch_on_a_value_names_the_users_line(write, refused):
    spec = write("""
        class Model(nn.Module):
            def forward(self, x):
                y = x * 2
                if y.sum() > 0:  # here
                    return y
                return x

        def build():
            return Model(), (torch.randn(2, 4),)
    """)
    e = refused(spec, ExportError)
    file, line = spec.removesuffix(":build"), 7
    assert Path(file).read_text().splitlines()[line - 1].endswith("# here")
    assert "depends on the values of a tensor" in e.what
    assert f"{file}:{line} in forward" in e.where
    assert "site-packages" not in e.where
    assert "torch.where" in e.hint


def test_a_size_that_depends_on_values(write, refused):
    e = refused(
        write("""
        class Model(nn.Module):
            def forward(self, x):
                n = int(x.sum().item())
                return torch.zeros(n) if n > 3 else x

        def build():
            return Model(), (torch.ones(2, 4),)
    """),
        ExportError,
    )
    assert "user_model.py:" in e.where


def test_pack_padded_sequence(write, refused):
    e = refused(
        write("""
        from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = nn.LSTM(4, 4, batch_first=True)
            def forward(self, x, lengths):
                packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                return pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]

        def build():
            return Model(), (torch.randn(2, 5, 4), torch.tensor([5, 3]))
    """),
        ExportError,
    )
    assert "pack_padded_sequence has no form" in e.what
    assert "user_model.py:1" in e.where
    assert "packed" in e.where
    assert "padded batch" in e.hint


def test_a_module_that_fails_on_its_own_inputs(write, refused):
    e = refused(
        write("""
        def build():
            return nn.Sequential(nn.Linear(4, 3)), (torch.randn(2, 5),)
    """),
        ExportError,
    )
    assert "does not run on its own example inputs: RuntimeError" in e.what
    assert "2x5" in e.what


def test_a_module_that_fails_in_the_users_line(write, refused):
    e = refused(
        write("""
        class Model(nn.Module):
            def forward(self, x):
                return x @ torch.ones(9)  # no

        def build():
            return Model(), (torch.randn(2, 5),)
    """),
        ExportError,
    )
    assert "user_model.py:6 in forward: return x @ torch.ones(9)  # no" in e.where


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("x.mean().item()", "a float"),
        ("{'y': x, 'n': 3}", "a int at n"),
        ("None", "no tensor"),
        ("'text'", "a str"),
    ],
)
def test_a_module_that_returns_no_tensor(write, refused, returned, said):
    e = refused(
        write(f"""
        class Model(nn.Module):
            def forward(self, x):
                return {returned}

        def build():
            return Model(), (torch.randn(2, 5),)
    """),
        ExportError,
    )
    assert said in e.what.replace("an int", "a int")


def test_an_operator_of_the_users_own(write, refused):
    e = refused(
        write("""
        @torch.library.custom_op("onnxpress_tests::twice", mutates_args=())
        def twice(x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @twice.register_fake
        def _(x):
            return torch.empty_like(x)

        class Model(nn.Module):
            def forward(self, x):
                return twice(x)

        def build():
            return Model(), (torch.randn(2, 5),)
    """),
        ExportError,
    )
    assert "twice" in str(e)


# Factories -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("nn.Linear(4, 3)", "Linear"),
        ("(nn.Linear(4, 3),)", "tuple"),
        ("None", "NoneType"),
        ("(1, (torch.ones(2),))", "first item is"),
        ("(nn.Linear, (torch.ones(2),))", "first item is"),
        ("(nn.Linear(4, 3), 'text')", "str, not a tuple or dict"),
        ("(nn.Linear(4, 3), (3,))", "hold no tensor"),
        ("(nn.Linear(4, 3), ())", "do not fit forward(input"),
        ("(nn.Linear(4, 3), {'x': torch.ones(2, 4)})", "do not fit forward(input"),
    ],
)
def test_factories_that_return_something_else(write, refused, returned, said):
    e = refused(write(f"def build():\n    return {returned}\n"), SourceError)
    assert said in e.what
    assert e.where


def test_a_factory_that_does_not_exist_shows_those_that_do(write, refused):
    e = refused(write("def bild(): ...\ndef other(): ...\n_x = print\n"), SourceError)
    assert "there is no 'build'" in e.what
    assert "bild" in e.hint
    assert "other" in e.hint


def test_places_that_do_not_exist(write, refused, tmp_path):
    e = refused(f"{tmp_path}/nothing.py:build", SourceError)
    assert e.where == f"{tmp_path}/nothing.py"
    assert (
        "no module 'no_such_package_at_all'"
        in refused("no_such_package_at_all.models:build", SourceError).what
    )
    assert "no factory in it" in refused(write("").removesuffix(":build"), SourceError).what
    assert "is no function" in refused(write("build = 3"), SourceError).what
    e = refused("encoder-tinny", SourceError)
    assert "encoder-tiny" in e.hint


def test_a_factory_that_raises_shows_the_users_frames_only(write, refused):
    spec = write("""
        def helper():
            return nn.Linear(-1, 4)

        def build():
            return helper(), (torch.ones(1),)
    """)
    e = refused(spec, SourceError)
    assert "the factory raised RuntimeError" in e.what
    assert "in build" in e.where
    assert "in helper: return nn.Linear(-1, 4)" in e.where
    assert "site-packages" not in e.where
    assert "/exporter/" not in e.where


@pytest.mark.parametrize(
    ("code", "said", "line"),
    [
        ("import json\njson.loads('{')", "raised JSONDecodeError on import", 4),
        ("x = torch.zeros(2) @ torch.zeros(3)", "raised RuntimeError on import", 3),
        ("import numpy\nnumpy.linalg.inv(numpy.zeros((2, 2)))", "raised LinAlgError", 4),
        ("import not_there_at_all", "raised ModuleNotFoundError on import", 3),
        ("def build(:\n  pass", "raised SyntaxError on import", 3),
        ("raise SystemExit('bye')", "raised SystemExit on import: bye", 3),
    ],
)
def test_a_file_that_raises_on_import_shows_the_users_line(write, refused, code, said, line):
    spec = write(code)
    e = refused(spec, SourceError)
    assert said in e.what
    assert f"user_model.py:{line}" in e.where
    for machinery in ("site-packages", "importlib", "json/", "/exporter/"):
        assert machinery not in e.where


def test_a_file_may_import_its_neighbors(write, tmp_path):
    write("SIZE = 5\n", name="its_neighbor_of_the_test.py")
    spec = write("""
        from its_neighbor_of_the_test import SIZE
        def build():
            return nn.Linear(SIZE, 2), torch.ones(2, SIZE)
    """)
    assert resolve(spec).module.in_features == 5


def test_the_same_weights_have_the_same_hash(write):
    code = (
        "def build():\n    torch.manual_seed({0})\n    return nn.Linear(4, 3), torch.ones(2, 4)\n"
    )
    hashes = [
        resolve(write(code.format(seed), name=f"m{i}.py")).weights_sha256
        for i, seed in enumerate((0, 0, 1))
    ]
    assert hashes[0] == hashes[1] != hashes[2]
