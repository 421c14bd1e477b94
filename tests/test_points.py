"""The check has teeth: kinds of inputs, tolerance, and dimensions that only seem to vary."""

from __future__ import annotations

import numpy as np
import onnxpress
import pytest
import torch
from onnxpress.artifact import TensorSpec
from onnxpress.exporter import check
from onnxpress.exporter.points import Points, kind_of
from onnxpress.exporter.reference import Reference

LOWEST = np.finfo(np.float32).min
X = TensorSpec("x", "float32", ("batch", 4))


def reference(run, **examples) -> Reference:
    def one(feeds):
        return [np.asarray(run(**feeds))]

    return Reference("torch", one, lambda feeds: lambda: one(feeds), examples)


def verdict(right, wrong, spec=X, example=None):
    example = np.zeros((2, 4), np.float32) + 0.5 if example is None else example
    name = spec.name
    return check(
        reference(right, **{name: example}),
        lambda feeds: {"y": np.asarray(wrong(**feeds))},
        (spec,),
    )


@pytest.mark.parametrize(
    ("name", "example", "kind"),
    [
        ("keep", np.ones((2, 3), bool), "mask"),
        ("valid", np.array([[1, 0]]), "mask"),
        ("attention_mask", np.ones((2, 3), np.int64), "mask"),
        ("input_ids", np.array([[7, 0]]), "ids"),
        ("token_type_ids", np.zeros((2, 3), np.int64), "ids"),
        ("bias", np.array([[0.0, LOWEST]], np.float32), "additive mask"),
        ("bias", np.array([[0.0, -np.inf]], np.float32), "additive mask"),
        ("bias", np.array([[0.0, -1e4]], np.float32), "additive mask"),
        ("x", np.array([[0.0, 1.5]], np.float32), "numbers"),
        ("x", np.zeros((2, 2), np.float32), "numbers"),
    ],
)
def test_the_kind_of_an_input_follows_from_its_example(name, example, kind):
    assert kind_of(name, example) == kind


def test_noise_does_not_hide_behind_a_column_of_minus_infinity():
    def logits(x):
        return np.concatenate([x, np.full((len(x), 1), LOWEST)], axis=1)

    def noise(x):
        return np.concatenate([x * 1000, np.full((len(x), 1), LOWEST)], axis=1)

    assert verdict(logits, logits).passed
    assert not verdict(logits, noise).passed


def test_zeros_are_not_small_probabilities():
    def softmax(x):
        e = np.exp(np.tile(x, (1, 7000)))
        return e / e.sum(-1, keepdims=True)

    assert verdict(softmax, lambda x: softmax(x) * (1 + 1e-6)).passed
    assert not verdict(softmax, lambda x: np.zeros((len(x), 28000))).passed


def test_rounding_next_to_zero_passes():
    assert verdict(lambda x: x - x, lambda x: x - x + 1e-7).passed


def test_integers_are_equal_or_wrong():
    big = 1 << 60
    assert not verdict(lambda x: np.array([big]), lambda x: np.array([big + 1])).passed


def test_ids_vary_although_the_example_is_zeros():
    spec = TensorSpec("i", "int64", ("batch", 4))
    table = np.arange(50.0)
    assert not verdict(
        lambda i: table[i], lambda i: np.zeros(i.shape), spec, np.zeros((2, 4), np.int64)
    ).passed


def test_ids_that_cannot_vary_are_named():
    spec = TensorSpec("i", "int64", ("batch", 4))
    table = np.ones(1)
    found = verdict(lambda i: table[i], lambda i: table[i], spec, np.zeros((2, 4), np.int64))
    assert found.constant == ["i"]
    assert found.summary()["constant_inputs"] == ["i"]


def test_a_dimension_that_never_varied_is_refused():
    spec = TensorSpec("x", "float32", ("batch", "width"))

    def four(x):
        return x.reshape(-1, 4)[: len(x)] if x.shape[1] == 4 else 1 / 0

    found = verdict(four, four, spec, np.ones((2, 4), np.float32))
    assert not found.passed
    assert "width=4" in found.worst


def test_a_scalar_stays_one():
    example = {"x": np.float32(0.7) * np.ones(()), "y": np.ones((2, 3), np.float32)}
    specs = (TensorSpec("x", "float32", ()), TensorSpec("y", "float32", ("batch", 3)))
    points = Points(reference(lambda x, y: y, **example), specs, seed=0)
    assert {points.feeds(p)["x"].shape for p in points} == {()}


@pytest.mark.parametrize("name", ["keep", "valid"])
def test_masks_are_filled_whatever_they_are_called(name):
    example = {name: np.ones((2, 5), bool)}
    specs = (TensorSpec(name, "bool", ("batch", "sequence")),)
    points = Points(reference(lambda **f: f[name], **example), specs, seed=0)
    rows = [row for p in points for row in points.feeds(p)[name]]
    assert any(not row.any() for row in rows)
    assert any(row.any() and not row.all() for row in rows)


# Real modules, of which the check used to say yes ---------------------------------------------


def attend(q, mask):
    q = q[:, None]
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


class Unmasked(torch.nn.Module):
    """transformers' way: a row that is masked throughout attends to everything."""

    def forward(self, x, keep):
        m = torch.where(keep, 0.0, torch.finfo(torch.float32).min)[:, None, None, :]
        m = m * ~(m == torch.finfo(torch.float32).min).all(-1, keepdim=True)
        return attend(x, m)


class Additive(torch.nn.Module):
    def forward(self, x, bias):
        return attend(x, bias)


class Seq2Seq(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        self.encoder = torch.nn.GRU(8, 8, batch_first=True)
        self.decoder = torch.nn.GRU(8, 8, batch_first=True)

    def forward(self, src, tgt):
        _, state = self.encoder(self.embed(src))
        return self.decoder(self.embed(tgt), state)[0]


class Head(torch.nn.Module):
    def forward(self, x):
        return x[:, :4] * 2


class Conv(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(144, 5)

    def forward(self, x, temperature):
        return self.out(self.conv(x).flatten(1)) / temperature


def press(tmp_path, monkeypatch, module, *example):
    import onnxpress.exporter.factory as factory
    from onnxpress.exporter.source import from_factory

    torch.manual_seed(0)
    built = from_factory("test.py:build", "factory", (module, example))
    monkeypatch.setattr(factory, "build", lambda spec, task: built)
    return onnxpress.press("test.py:build", tmp_path / "out", measure=False)


def bias() -> torch.Tensor:
    mask = torch.zeros(2, 1, 1, 5)
    mask[1, ..., 3:] = torch.finfo(torch.float32).min
    return mask


@pytest.mark.parametrize(
    ("module", "mask"),
    [(Unmasked(), torch.ones(2, 5, dtype=torch.bool)), (Additive(), bias())],
    ids=["unmasked", "additive"],
)
def test_masked_rows_are_right_and_seen(tmp_path, monkeypatch, module, mask):
    manifest = press(tmp_path, monkeypatch, module, torch.randn(2, 5, 8), mask)
    assert manifest.parity["passed"]
    assert any("row 0 all 0" in p["point"] for p in manifest.parity["points"])


def test_lengths_behind_a_gru_are_named(tmp_path, monkeypatch):
    ids = torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 6))
    manifest = press(tmp_path, monkeypatch, Seq2Seq(), *ids)
    assert [s.shape for s in manifest.outputs] == [("batch", "tgt_sequence", 8)]


def test_a_size_that_follows_no_dimension_gets_a_name_of_its_own(tmp_path, monkeypatch):
    manifest = press(tmp_path, monkeypatch, Head(), torch.randn(2, 6, 8))
    assert [s.shape[1] for s in manifest.outputs] == ["output_axis_1"]


def test_sizes_that_pytorch_never_takes_are_fixed_and_scalars_are_inputs(tmp_path, monkeypatch):
    manifest = press(tmp_path, monkeypatch, Conv(), torch.randn(1, 3, 8, 8), torch.tensor(0.7))
    assert [s.shape for s in manifest.inputs] == [("batch", 3, 8, 8), ()]
    assert any("fixed at 8" in note for note in manifest.source["notes"])
