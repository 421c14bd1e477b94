"""report.html: what it says, that nothing breaks out of it, and how a browser takes it."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import make_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxpress.artifact import Manifest, TensorSpec
from onnxpress.press.report import page, report
from onnxpress.press.report.markup import element
from onnxpress.press.report.plots import histogram, number, ticks

EVIL = (
    """<script>alert(1)</script>"'><img src=//evil.test/x onerror=alert(2)>&amp;]]>\x00\x1b\ud800"""
)
KINDS = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.out",
    "ffn.up",
    "ffn.down",
)
BEFORE = {"Add": 74, "Cast": 1, "Erf": 6, "MatMul": 48, "Div": 24, "Mul": 18, "Softmax": 6}
AFTER = {"Cast": 1, "com.microsoft::Attention": 6, "com.microsoft::MatMulIntegerToFloat": 36}

# Manifest with the field that the gate fills in, whether or not it has it already.
Pressed = (
    Manifest
    if "precision" in Manifest.__dataclass_fields__
    else make_dataclass("Pressed", [("precision", Any, None)], bases=(Manifest,), frozen=True)
)


def precision_of(blocks: int = 6) -> dict[str, Any]:
    draw = random.Random(0)
    layers = [
        {
            "name": f"encoder.layer.{i}.{kind}",
            "kind": f"encoder.layer.*.{kind}",
            "precision": "int8",
            "sensitivity": draw.lognormvariate(-10, 0.8),
            "reason": "",
            "alpha": 0.55 if "attention" in kind else None,
        }
        for i in range(blocks)
        for kind in KINDS
    ]
    layers[5] |= {"precision": "fp32", "sensitivity": 0.0021, "reason": "channel 7 is at 104x"}
    layers[3] |= {"sensitivity": None}
    sets = {"from": "calibration.jsonl", "examples": 128, "sha256": "ab12cd34ef56" + "0" * 52}
    fp32 = {"1x16": 2.9, "8x128": 118.0}
    return {
        "asked": "auto",
        "precision": "int8",
        "recipe": {"calibrator": "entropy", "bias_correction": True, "attention": False},
        "calibration": sets,
        "eval": {**sets, "from": "the default set of embed", "examples": 320},
        "drift": {
            "metric": "1 - cosine",
            "mean": 0.00092,
            "worst": 0.0061,
            "budget": 0.002,
            "worst_budget": 0.015,
            "passed": True,
            "allowed": False,
            "extra": {"mean_cosine": 0.99908, "min_cosine": 0.9939},
        },
        "layers": layers,
        "candidates": [
            candidate("fp32", 0.0, fp32, 90_270_153),
            candidate("int8", 0.00092, {"1x16": 1.2, "8x128": 41.0}, 22_900_000, kept=True),
            candidate("int8-dynamic", 0.0041, {"1x16": 1.6}, 23_100_000, passed=False, why="drift"),
        ],
        "pruned": {"heads": 0.25, "ffn": None},
    }


def candidate(name, drift, ms, size, *, passed=True, kept=False, why="") -> dict[str, Any]:
    return {
        "name": name, "drift": drift, "passed": passed, "ms": ms, "bytes": size, "kept": kept,
        "why": why,
    }  # fmt: skip


def manifest_of(precision: dict[str, Any] | None, **changes) -> Manifest:
    ids = TensorSpec("input_ids", "int64", ("batch", "sequence"))
    hidden = TensorSpec("last_hidden_state", "float32", ("batch", "sequence", 384))
    parity = {
        "reference": "torch 2.13.0",
        "points": [{"point": "batch=2 sequence=5, mask ragged", "max_abs": 2.1e-06}],
        "max_abs": {"last_hidden_state": 3.0e-06},
        "tolerance": "|difference| <= t * (|reference| + 0.02)",
        "passed": True,
        "allowed_drift": False,
        "worst": "output last_hidden_state at [3, 1, 311]",
        "undefined": 0,
        "refused": [],
        "constant_inputs": [],
        "fixed_dimensions": [],
    }
    missed = [{"node": "Softmax 'node_softmax_2'", "reason": "the probabilities have 2 readers"}]
    file = {"bytes": 22_873_943, "sha256": "fe" * 32}
    fields: dict[str, Any] = {
        "task": "embed",
        "source": {
            "spec": "models/all-MiniLM-L6-v2",
            "kind": "huggingface",
            "weights_sha256": "53aa5117" * 8,
            "notes": ["captured from models/ (bert)"],
        },
        "target": {"provider": "cpu", "precision": "fp32", "opset": 23},
        "inputs": (ids,),
        "outputs": (hidden,),
        "fusions": [
            {"kind": "Gelu", "fused": 6, "lifted": 2, "missed": []},
            {"kind": "Attention", "fused": 5, "lifted": 0, "missed": missed},
        ],
        "parity": parity,
        "tools": {"torch": "2.13.0", "onnxruntime": "1.32.0"},
        "files": {"model.onnx": {**file, "bytes": 26_057}, "model.onnx.data": file},
    }
    return Pressed(**{**fields, "precision": precision, **changes})


MEASURED = {
    "machine": {"cpu": "AMD EPYC 9B14", "cores": 2},
    "versions": {"onnxruntime": "1.32.0", "reference": "torch 2.13.0"},
    "threads": None,
    "rounds": 9,
    "rows": [
        {"batch": 1, "sequence": 16, "ms": {"onnxpress": 1.21, "fp32": 2.9, "torch": 7.4}},
        {"batch": 8, "sequence": 128, "ms": {"onnxpress": 40.8, "fp32": 118.2, "torch": 151.0}},
    ],
}


def full(**changes: Any) -> dict[str, Any]:
    draw = random.Random(1)
    drifts = [draw.lognormvariate(-7.2, 0.6) for _ in range(319)] + [0.0061]
    texts = ["The cat sat.", "Ein Satz auf Deutsch, länger als die anderen. " * 4, "", "重い本"]
    return {
        "manifest": manifest_of(precision_of()),
        "measured": MEASURED,
        "examples": [{"text": t, "drift": 0.0061 / i} for i, t in enumerate(texts, start=1)],
        "drifts": drifts,
        "before_ops": BEFORE,
        "after_ops": AFTER,
        **changes,
    }


def press_report(given: dict[str, Any]) -> str:
    rest = {k: v for k, v in given.items() if k != "manifest"}
    return report(given["manifest"], **rest)


def plain(**changes: Any) -> dict[str, Any]:
    """What export and press without a precision give."""
    return full(manifest=manifest_of(None), examples=[], drifts=[], measured=None, **changes)


def tree(html: str) -> ET.Element:
    """The page as XML: it is written so that it is both."""
    return ET.fromstring(html)


def text_of(html: str) -> str:
    root = tree(html)
    root.find("head").remove(root.find("head/style"))
    return " ".join(" ".join(root.itertext()).split())


def words(found: ET.Element) -> str:
    """What one reads: a name that a line may break is one word."""
    for row in found.iter():
        for child in [c for c in row if c.tag == "wbr"]:
            row.text = (row.text or "") + (child.tail or "")
            row.remove(child)
    return " ".join(" ".join(found.itertext()).split())


def section(html: str, key: str) -> str:
    found = tree(html).find(f".//section[@id='{key}']")
    return words(found)


# What it says -------------------------------------------------------------------------------


def test_a_full_report_says_what_one_decides_by():
    html = press_report(full())
    header = " ".join(" ".join(tree(html).find(".//header").itertext()).split())
    assert header.startswith("all-MiniLM-L6-v2 embed · cpu · opset 23 ✓ int8 passed the gate")
    assert "Mean drift 0.00092 of 0.002 allowed, worst 0.0061 of 0.015 allowed, on 320" in header
    assert "1 of 36 layers in float" in header
    assert "22.9 MB 25% of fp32" in header
    assert "Speed beside PyTorch 3.70\u20136.12\u00d7" in header
    assert "Speed beside fp32 2.40\u20132.90\u00d7" in header

    drift = section(html, "drift")
    for said in ("1 - cosine", "mean 0.00092", "worst 0.0061", "budget of the mean 0.002",
                 "mean cosine 0.99908", "The cat sat.", "(empty)", "重い本"):  # fmt: skip
        assert said in drift, said
    layers = section(html, "layers")
    assert "36 layers, 1 of them kept in float" in layers
    assert "encoder.layer.0.ffn.down fp32 0.0021 channel 7 is at 104x" in layers
    candidates = section(html, "candidates")
    assert "int8-dynamic 0.0041 ✕ not passed 1.6 \u2013 23.1 MB drift" in candidates
    assert "fp32 0 ✓ passed 2.9 118 90.3 MB not the fastest" in candidates
    assert "int8 0.00092 ✓ passed 1.2 41 22.9 MB Kept." in candidates
    assert "Asked for: auto" in candidates
    speed = section(html, "speed")
    assert "batch 8, sequence 128 40.8 118 151 2.90\u00d7 3.70\u00d7" in speed
    assert "AMD EPYC 9B14 with 2 cores" in speed
    graph = section(html, "graph")
    assert "177 nodes as captured, 43 as published" in graph
    assert "Add 74 0 \u221274" in graph
    assert "com.microsoft::Attention 0 6 +6" in graph
    assert "all 177 43 \u2212134" in graph
    assert "pruned heads 0.25" in graph
    assert "Softmax 'node_softmax_2': the probabilities have 2 readers" in section(html, "fusions")
    assert "largest difference of last_hidden_state 3.0e-06" in section(html, "parity")
    origin = section(html, "origin")
    for said in ("calibration.jsonl 128 ab12cd34ef56", "the default set of embed 320",
                 "model.onnx.data 22.9 MB fefefefefefe", "torch 2.13.0", "calibrator entropy",
                 "bias correction yes", "attention no", "53aa51175"):  # fmt: skip
        assert said[:12] in origin, said


def test_operators_that_changed_most_come_first_and_none_is_left_out():
    table = tree(press_report(full())).find(".//section[@id='graph']//table")
    names = ["".join(row.find("th").itertext()) for row in table.findall("tbody/tr")]
    assert names[:3] == ["Add", "MatMul", "com.microsoft::MatMulIntegerToFloat"]
    assert names[5:] == ["Erf", "Softmax", "com.microsoft::Attention", "Cast"]  # equals by name
    assert set(names) == {*BEFORE, *AFTER}


def test_without_a_precision_it_tells_parity_speed_and_ops():
    html = press_report(plain())
    ids = [s.get("id") for s in tree(html).iter("section")]
    assert ids == ["speed", "graph", "fusions", "parity", "origin"]
    assert "✓ Computes what torch 2.13.0 computes Largest difference 3.0e-06" in text_of(html)
    assert "Nothing was measured" in section(html, "speed")


def test_a_manifest_that_has_no_such_field_is_taken_for_fp32():
    bare = Manifest(
        **{k: v for k, v in vars(manifest_of(None)).items() if k in Manifest.__dataclass_fields__}
    )
    assert press_report(plain()) == press_report({**plain(), "manifest": bare})


def verdict(given: dict[str, Any]) -> tuple[str, str]:
    box = tree(press_report(given)).find(".//header/div")
    return box.get("class").removeprefix("verdict "), " ".join(box.itertext())


def test_the_verdict_follows_the_gate_and_the_parity():
    def gate(**drift):
        precision = precision_of()
        precision["drift"] |= drift
        return full(manifest=manifest_of(precision))

    assert verdict(gate())[0] == "good"
    look, said = verdict(gate(passed=False, allowed=True, mean=0.04))
    assert look == "warn"
    assert "Past the budget, and published with --allow-drift" in said
    assert "0.04 of 0.002 allowed" in said
    assert verdict(gate(passed=False, mean="inf")) == verdict(gate(passed=False, mean=math.inf))
    assert verdict(gate(passed=False))[0] == "bad"

    only = {**precision_of(), "precision": "fp32", "drift": None, "pruned": None}
    look, said = verdict(full(manifest=manifest_of(only)))
    assert (look, said[:11]) == ("plain", "\u2013 fp32 only")
    html = press_report(full(manifest=manifest_of({**only, "drift": precision_of()["drift"]})))
    assert '<section id="drift"' not in html  # from itself it is 0 away
    pruned = {**only, "drift": precision_of()["drift"], "pruned": {"heads": 0.25}}
    assert '<section id="drift"' in press_report(full(manifest=manifest_of(pruned)))
    assert "Speed beside fp32" not in html
    assert "auto was asked for" in said

    parity = {**manifest_of(None).parity, "passed": False, "allowed_drift": True}
    assert verdict(plain() | {"manifest": manifest_of(None, parity=parity)})[0] == "warn"
    both = verdict(full(manifest=manifest_of(precision_of(), parity=parity)))
    assert both[0] == "warn"
    assert "Differs from its reference" in both[1]
    assert "Not checked" in verdict(plain() | {"manifest": manifest_of(None, parity=None)})[1]


def test_numbers_that_are_none_are_told_and_break_nothing():
    precision = precision_of()
    precision["drift"] |= {"mean": "inf", "worst": math.nan, "passed": False}
    precision["layers"][0]["sensitivity"] = math.inf
    given = full(
        manifest=manifest_of(precision),
        drifts=[0.001, math.nan, math.inf, -1e-8],
        examples=[{"text": "fine", "drift": 0.1}, {"text": "broken", "drift": math.nan}],
    )
    drift = section(press_report(given), "drift")
    assert "2 of 4 examples gave no finite number." in drift
    assert drift.index("broken") < drift.index("fine")  # what is no number is the worst
    press_report(given | {"drifts": [math.nan]})
    press_report(given | {"drifts": [0.0] * 5})
    press_report(given | {"drifts": []})


def test_contestants_and_sizes_may_differ_from_row_to_row():
    rows = [
        {"ms": {"onnxpress": 1.0}},
        {"batch": 2, "past_sequence": 0, "ms": {"onnxpress": 2.0, "before": 3.0}},
        {"batch": 4},
    ]
    speed = section(press_report(plain() | {"measured": {**MEASURED, "rows": rows}}), "speed")
    assert "fixed shapes 1 \u2013 \u2013" in speed
    assert "batch 2 2 3 1.50\u00d7" in speed
    assert "Speed beside the graph before" in press_report(
        plain() | {"measured": {**MEASURED, "rows": rows}}
    )
    passes_only = plain() | {"measured": {"passes": [{"name": "x", "ms": 1.0}]}}
    assert "Nothing was measured" in section(press_report(passes_only), "speed")


# Nothing breaks out -------------------------------------------------------------------------


def poisoned(value: Any) -> Any:
    """The same, with every string a user or a model may choose replaced by an attack."""
    fixed = {"asked", "precision", "kind", "reference", "from", "name", "reason", "why", "metric"}
    if isinstance(value, dict):
        return {
            k: EVIL if k in fixed - {"precision"} and isinstance(v, str) and v else poisoned(v)
            for k, v in value.items()
        }
    return [poisoned(v) for v in value] if isinstance(value, list) else value


def attack() -> dict[str, Any]:
    base = manifest_of(poisoned(precision_of()))
    spec, missed = TensorSpec(EVIL, EVIL, (EVIL,)), [{"node": EVIL, "reason": EVIL}]
    manifest = replace(
        base,
        task=EVIL,
        source={"spec": f"a/{EVIL}", "kind": EVIL, "weights_sha256": EVIL, "notes": [EVIL]},
        target={"provider": EVIL, "precision": EVIL, "opset": EVIL},
        inputs=(spec,),
        outputs=(spec,),
        fusions=[{"kind": EVIL, "fused": 1, "lifted": 1, "missed": missed}],
        parity={
            **base.parity, "reference": EVIL, "tolerance": EVIL, "worst": EVIL, "refused": [EVIL],
            "points": [{"point": EVIL, "max_abs": 1.0}], "max_abs": {EVIL: 1.0},
        },
        tools={EVIL: EVIL},
        files={EVIL: {"bytes": 1, "sha256": EVIL}},
    )  # fmt: skip
    rows = [{EVIL: 1, "ms": {"onnxpress": 1.0, EVIL: 2.0}}]
    measured = {**MEASURED, "rows": rows, "machine": {"cpu": EVIL, "cores": EVIL}}
    return full(
        manifest=manifest,
        measured=measured,
        examples=[{"text": EVIL, "drift": 1.0}],
        before_ops={EVIL: 3},
    )


class Strict(HTMLParser):
    """Reads as a browser does, and fails on a tag that is not closed where it was opened."""

    VOID = ("meta", "link", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def strict(html: str) -> Strict:
    parser = Strict()
    parser.feed(html)
    parser.close()
    assert not parser.open
    return parser


REPORTS = {"full": full, "plain": plain, "attack": attack}


@pytest.mark.parametrize("given", REPORTS.values(), ids=REPORTS)
def test_a_page_is_well_formed_and_asks_for_nothing(given: Callable[[], dict[str, Any]]):
    html = press_report(given())
    assert html.startswith("<!DOCTYPE html>\n")
    html.encode()  # a lone surrogate of a name would not
    root, parsed = tree(html), strict(html)
    assert root.get("lang") == "en"
    assert not {"script", "img", "iframe", "object", "base", "form", "image", "use"} & {
        *parsed.tags
    }
    for name, value in parsed.attributes:
        assert not name.startswith("on"), name
        assert name not in ("src", "srcset", "style", "action", "xmlns")
        if name == "href":
            assert re.fullmatch(r"#[a-z]+|data:,", value or "")
    policy = root.find("head/meta[@http-equiv='Content-Security-Policy']").get("content")
    assert policy.startswith("default-src 'none'")
    style = root.find("head/style").text
    assert "url(" not in style
    assert "@import" not in style
    assert "<" not in style
    assert "&" not in style
    if given is not attack:
        assert "//" not in html.replace(style, "")


def test_attacks_stand_there_as_text():
    shown = EVIL.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    root = tree(press_report(attack()))
    for key in ("drift", "layers", "candidates", "speed", "graph", "fusions", "parity", "origin"):
        found = "".join(root.find(f".//section[@id='{key}']").itertext())
        assert shown in found, key
    # evil.test/x, for a title is the last part of a path
    assert root.find("head/title").text.startswith("x onerror=alert(2)>&amp;]]>")


@given(st.text(), st.text())
def test_any_text_stays_text(inner: str, attribute: str):
    made = ET.fromstring(element("p", inner, title=attribute))
    assert [*made] == []
    assert [*made.attrib] == ["title"]
    if inner.isprintable():
        assert (made.text or "") == inner
    if attribute.isprintable():
        assert made.get("title") == attribute


def test_in_a_half_precision_model_what_is_kept_is_wider():
    precision = {**precision_of(), "precision": "fp16"}
    for x in precision["layers"]:
        x["precision"] = "fp16" if x["precision"] == "int8" else "fp32"
    header = words(tree(press_report(full(manifest=manifest_of(precision)))).find(".//header"))
    assert "1 of 36 layers in float" in header


def test_the_same_input_gives_the_same_bytes():
    given = full()
    turned = full(
        before_ops=dict(reversed(BEFORE.items())), after_ops=dict(reversed(AFTER.items()))
    )
    assert press_report(given) == press_report(full()) == press_report(turned)


def test_300_layers_fit_and_every_layer_is_there():
    precision = precision_of(blocks=50)
    html = press_report(full(manifest=manifest_of(precision)))
    assert len(precision["layers"]) == 300
    assert len(html.encode()) < 300_000
    assert len(tree(html).findall(".//section[@id='layers']//div[@class='panels']/figure")) == 6
    rows = tree(html).findall(".//section[@id='layers']/details//tbody/tr/th")
    assert ["".join(row.itertext()) for row in rows] == [x["name"] for x in precision["layers"]]


def test_many_kinds_share_one_plot_and_the_most_sensitive_keep_theirs():
    precision = precision_of(blocks=50)
    for x in precision["layers"]:
        x["kind"] = x["name"]
    html = press_report(full(manifest=manifest_of(precision)))
    figures = tree(html).findall(".//section[@id='layers']//figure")
    assert len(figures) == 16
    captions = ["".join(f.find("figcaption/span").itertext()) for f in figures]
    assert "encoder.layer.0.ffn.down" in captions  # planted as the most sensitive
    assert captions[-1] == "285 more kinds"
    assert len(html.encode()) < 300_000


# Plots --------------------------------------------------------------------------------------


@given(st.floats(1e-12, 1e12), st.integers(3, 8))
def test_ticks_are_few_and_inside(high: float, most: int):
    found = ticks(high, most)
    assert found[0] == 0
    assert 1 <= len(found) - 1 <= most
    assert found[-1] <= high * (1 + 1e-6)


@given(st.lists(st.floats(-1e-6, 10), min_size=1, max_size=60))
def test_no_example_is_lost_in_a_histogram(values: list[float]):
    svg = histogram(values, [], label="x")
    assert sum(int(n) for n in re.findall(r": (\d+) example", svg)) == len(values)
    assert all(0 <= float(x) <= 100.01 for x in re.findall(r'x="([-\d.]+)%"', svg))


def test_a_budget_far_beyond_is_named_and_squeezes_nothing():
    svg = press_report(full(drifts=[0.00001 * i for i in range(1, 20)]))
    assert "budget of the worst 0.015, beyond this axis" in svg
    axis = [float(x) for x in re.findall(r'class="tick"[^>]*>([-.e\d]+)<', svg)]
    assert max(axis) < 0.0002


def test_one_layer_far_above_the_others_does_not_flatten_them():
    html = press_report(full())
    assert html.count('class="cut"') == 1  # the one of 0.0021; the others have at most 0.0002
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" class="bar"><title>enc', html)]
    assert len(heights) == 34  # but one kept in float, and one not measured
    assert max(heights) > 25
    even = precision_of()
    even["layers"][5]["sensitivity"] = 0.0003
    assert 'class="cut"' not in press_report(full(manifest=manifest_of(even)))


def test_numbers_as_a_person_reads_them():
    given = [
        0.0,
        3.1e-06,
        0.00052,
        1.5,
        0.99908,
        118.24,
        4321.0,
        12,
        1234567,
        True,
        None,
        "inf",
        math.inf,
    ]
    said = ["0", "3.1e-06", "0.00052", "1.5", "0.99908", "118", "4,321", "12", "1,234,567", "yes",
            "\u2013", "not finite", "not finite"]  # fmt: skip
    assert [number(v) for v in given] == said


# For everyone -------------------------------------------------------------------------------


def test_headings_tables_and_plots_are_told_to_those_who_do_not_see_them():
    root = tree(press_report(full()))
    levels = [int(e.tag[1]) for e in root.iter() if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    heads = [*root.iter("th")]
    assert heads
    assert all(h.get("scope") in ("col", "row") for h in heads)
    parents = {child: parent for parent in root.iter() for child in parent}
    for svg in root.iter("svg"):
        inside = parents[svg].tag == "svg"
        told = svg.get("role") == "img" and svg.get("aria-label")
        assert inside or told or svg.get("aria-hidden") == "true"
    for table in root.iter("table"):
        box = parents[table]
        assert (box.get("class"), box.get("tabindex")) == ("scroll", "0")
        assert box.get("aria-label")
    links = {a.get("href") for a in root.iter("a")}
    assert links == {f"#{s.get('id')}" for s in root.iter("section")}


def test_the_colors_of_text_reach_aa_by_day_and_by_night():
    css = Path(page.__file__).with_name("report.css").read_text()
    day, night = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in css.split("@media")[:2])
    assert day.keys() == night.keys()

    def light(color: str) -> float:
        parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for theme in (day, night):
        for paper in ("paper", "raised"):
            for ink in theme.keys() - {"paper", "raised", "rule"}:
                low, high = sorted((light(theme[paper]), light(theme[ink])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper)


# In a browser -------------------------------------------------------------------------------

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-sync", "--disable-background-networking", "--disable-component-update",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing leaves the machine, whatever a page asks
    "--allow-file-access-from-files",  # the frame's script looks into the frame
    "--enable-logging=stderr", "--virtual-time-budget=5000",
]  # fmt: skip

# A window cannot be as narrow as a phone, a frame can; what is seen inside goes to the title.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>none</title><body style="margin:0">
<iframe id="f" src="report.html" width="WIDTH" height="1200" style="border:0"></iframe>
<script>addEventListener("load", () => {
  const w = document.getElementById("f").contentWindow, d = w.document;
  d.querySelectorAll("details").forEach(x => x.open = true);
  const free = [...d.querySelectorAll("body *")].filter(x => !x.closest(".scroll, svg"));
  const beyond = free.filter(x => x.getBoundingClientRect().right > w.innerWidth + 1);
  document.title = JSON.stringify({
    inner: w.innerWidth, scroll: d.documentElement.scrollWidth,
    beyond: beyond.map(x => x.tagName + "." + x.className),
    plots: [...d.querySelectorAll("svg.plot")].map(x => x.getBoundingClientRect().width),
    text: Math.min(...[...d.querySelectorAll("svg.plot text")].map(x => x.getBBox().height)),
    asked: w.performance.getEntriesByType("resource").map(x => x.name),
    paper: w.getComputedStyle(d.body).backgroundColor,
  });
});</script>"""


class Browser:
    """Chromium without a screen and without a network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, file: Path, *flags: str) -> tuple[str, list[str]]:
        """What it prints for a file, and what the console says."""
        profile = f"--user-data-dir={self.folder}/profile"
        done = subprocess.run(
            [CHROMIUM, *FLAGS, profile, *flags, file.as_uri()],
            capture_output=True,
            timeout=90,
            check=True,
        )
        log = done.stderr.decode(errors="replace")
        return done.stdout.decode(), [x for x in log.splitlines() if "CONSOLE" in x]

    def look(self, html: str, width: int) -> tuple[dict[str, Any], list[str]]:
        """What is seen in a frame of this width, and what the console says."""
        (self.folder / "report.html").write_text(html, encoding="utf-8")
        frame = self.folder / "frame.html"
        frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
        dom, console = self.run(frame, f"--window-size={width + 40},1300", "--dump-dom")
        return json.loads(ET.fromstring(re.search("<title>.*?</title>", dom)[0]).text), console


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Browser:
    if not CHROMIUM:
        pytest.skip("no chromium on the PATH: apt-get install -y chromium")
    return Browser(tmp_path_factory.mktemp("chromium"))


@pytest.mark.slow
def test_a_request_an_error_and_an_overflow_would_be_seen(browser: Browser):
    bad = """<!DOCTYPE html><meta charset="utf-8"><img src="http://evil.test/a.png" alt="">
        <div class="wide" style="width:900px">x</div><script>undefined_name()</script>"""
    seen, console = browser.look(bad, 380)
    assert seen["asked"] == ["http://evil.test/a.png"]
    assert any("undefined_name" in line for line in console)
    assert seen["scroll"] == 900 + 8
    assert seen["beyond"] == ["DIV.wide"]


@pytest.mark.slow
@pytest.mark.parametrize("given", REPORTS.values(), ids=REPORTS)
@pytest.mark.parametrize("width", [380, 1400])
def test_a_browser_shows_it_whole_and_fetches_nothing(browser: Browser, given, width):
    seen, console = browser.look(press_report(given()), width)
    assert console == []
    assert seen["asked"] == []
    assert seen["inner"] == width
    assert seen["scroll"] <= width
    assert seen["beyond"] == []
    assert all(0 < w <= width for w in seen["plots"])
    assert len(seen["plots"]) == {"full": 9, "plain": 0, "attack": 3}[given.__name__]
    assert seen["text"] is None or seen["text"] >= 12
    assert seen["paper"] == "rgb(252, 252, 251)"


@pytest.mark.slow
def test_a_browser_paints_it_by_day_and_by_night(browser: Browser, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(press_report(full()), encoding="utf-8")
    shots = []
    for scheme in (1, 0):  # light, dark
        shot = tmp_path / f"{scheme}.png"
        night = f"--blink-settings=preferredColorScheme={scheme}"
        _, console = browser.run(file, f"--screenshot={shot}", "--window-size=1400,1200", night)
        assert console == []
        data = shot.read_bytes()
        assert struct.unpack(">II", data[16:24]) == (1400, 1200)
        assert len(data) > 20_000  # an empty page is a tenth of it
        shots.append(data)
    assert shots[0] != shots[1]
