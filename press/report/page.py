"""The page: one file, no script, and nothing in it that comes from elsewhere.

A policy in its head forbids scripts and requests besides, should a name ever slip through. The
same input gives the same bytes.
"""

from __future__ import annotations

import importlib.resources
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ...artifact import Manifest
from . import gate, proof
from .markup import DASH, TIMES, Html, element
from .plots import as_float, number, size

Numbers = Mapping[str, Any]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_ASTRAY = "! Differs from its reference, and published with --allow-drift"


def report(
    manifest: Manifest,
    *,
    measured: Mapping[str, Any] | None,
    examples: Sequence[Mapping[str, Any]],
    drifts: Sequence[float],
    before_ops: Mapping[str, int],
    after_ops: Mapping[str, int],
) -> str:
    """The report of an artifact, as the text of one HTML file.

    Args:
        manifest: What is published, its `files` filled in; `precision` may be missing or None.
        measured: What `timing.time_against` gave; None where nothing was measured.
        examples: The worst examples of the eval set: `text` and `drift`.
        drifts: One number for each example of the eval set.
        before_ops: Operator counts of the captured graph.
        after_ops: Those of the published one.
    """
    precision: Numbers = getattr(manifest, "precision", None) or {}
    rows = [r for r in (measured or {}).get("rows", ()) if r.get("ms")]
    sections = [
        ("drift", "Drift", gate.drift(precision, drifts, examples)),
        ("layers", "Layers", gate.layers(precision)),
        ("candidates", "Candidates", gate.candidates(precision)),
        ("speed", "Speed", proof.speed(rows, measured or {})),
        ("graph", "Graph", proof.graph(before_ops, after_ops, precision)),
        ("fusions", "Fusions", proof.fusions(manifest)),
        ("parity", "Parity", proof.parity(manifest)),
        ("origin", "Origin", proof.origin(manifest, precision)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body]
    style = importlib.resources.files(__package__).joinpath("report.css").read_text("utf-8")
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("link", rel="icon", href="data:,"),
        element("title", f"{_name(manifest)}, {_precision(manifest)}: onnxpress report"),
        element("style", Html(style)),
    ]
    body = [
        _header(manifest, precision, rows, len(drifts)),
        element(
            "nav",
            (element("a", title, href=f"#{key}") for key, title, _ in shown),
            aria_label="Sections",
        ),
        element(
            "main",
            (element("section", element("h2", title), b, id=key) for key, title, b in shown),
        ),
    ]
    page = element("html", element("head", head), "\n", element("body", body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _name(manifest: Manifest) -> str:
    spec = str(manifest.source["spec"]).replace("\\", "/").rstrip("/")
    return spec.rsplit("/", 1)[-1] or "model"


def _precision(manifest: Manifest) -> str:
    chosen = getattr(manifest, "precision", None) or manifest.target
    return str(chosen["precision"])


def _header(manifest: Manifest, precision: Numbers, rows: Sequence[Numbers], count: int) -> Html:
    look, word, why = _verdict(manifest, precision, count)
    provider, opset = manifest.target["provider"], manifest.target["opset"]
    return element(
        "header",
        element("h1", _name(manifest)),
        element("p", f"{manifest.task} · {provider} · opset {opset}", class_="soft"),
        element("div", element("strong", word), element("p", why), class_=f"verdict {look}"),
        element(
            "dl",
            (
                element("div", element("dt", k), element("dd", element("b", v), element("span", s)))
                for k, v, s in _tiles(manifest, precision, rows)
            ),
            class_="tiles",
        ),
    )


def _verdict(manifest: Manifest, precision: Numbers, count: int) -> tuple[str, str, str]:
    """How it looks, what it says, and the sentence below."""
    checked, drift, asked = manifest.parity, precision.get("drift"), precision.get("asked")
    astray = bool(checked and (checked["allowed_drift"] or not checked["passed"]))
    if drift and (_precision(manifest) != "fp32" or precision.get("pruned")):
        why = (
            f"Mean drift {number(drift['mean'])} of {number(drift['budget'])} allowed, worst "
            f"{number(drift['worst'])} of {number(drift['worst_budget'])} allowed"
            + (f", on {count:,} examples." if count else ".")
            + (f" {drift['why']}" if drift.get("why") else "")
            + " Its graph differs from its reference before any precision was lowered." * astray
        )
        if drift["passed"] and not astray:
            return "good", f"✓ {_precision(manifest)} passed the gate", why
        if drift["passed"]:
            return "warn", _ASTRAY, why
        if drift["allowed"]:
            return "warn", "! Past the budget, and published with --allow-drift", why
        return "bad", "✕ Did not pass the gate", why
    if checked is None:
        return "warn", "! Not checked", "There was no reference to hold the graph against."
    largest = max(checked["max_abs"].values(), key=as_float, default=None)
    why = (
        f"Largest difference {number(largest)}, over {len(checked['points'])} points against "
        f"{checked['reference']}."
    )
    if astray:
        return "warn", _ASTRAY, why
    if asked not in (None, "fp32"):
        why = f"{asked} was asked for: the candidates below say why none was kept. {why}"
        return "plain", f"{DASH} fp32 only", why
    return "good", f"✓ Computes what {checked['reference']} computes", why


def _tiles(
    manifest: Manifest, precision: Numbers, rows: Sequence[Numbers]
) -> list[tuple[str, str, str]]:
    """The few numbers that count: what, the number, and a word on it."""
    layers = precision.get("layers") or ()
    kept = sum(gate.in_float(layer, precision) for layer in layers)
    said = f"{kept} of {len(layers)} layers in float" if kept else "throughout"
    tiles = [("Precision", _precision(manifest), said)]
    if drift := precision.get("drift"):
        tiles.append(("Mean drift", number(drift["mean"]), f"worst {number(drift['worst'])}"))
    candidates = precision.get("candidates") or ()
    chosen: Numbers = next((c for c in candidates if c["kept"]), {})
    fp32: Numbers = next((c for c in candidates if c["name"] == "fp32"), {})
    files = [f["bytes"] for n, f in manifest.files.items() if n.startswith("model.onnx")]
    own, whole = sum(files) or chosen.get("bytes"), fp32.get("bytes")
    share = f"{own / whole:.0%} of fp32" if own and whole and own != whole else "graph and weights"
    tiles.append(("Size", size(own), share))

    ratios: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, ms in row["ms"].items():
            if name not in ("onnxpress", _precision(manifest)) and row["ms"].get("onnxpress"):
                ratios[name].append(ms / row["ms"]["onnxpress"])
    ours, theirs = chosen.get("ms") or {}, fp32.get("ms") or {}
    if "fp32" not in (*ratios, _precision(manifest)):
        ratios["fp32"] = [theirs[s] / ours[s] for s in ours if theirs.get(s) and ours[s]]
    for name, found in sorted(ratios.items()):
        if found:
            low, high = f"{min(found):.2f}", f"{max(found):.2f}"
            span = f"{low}{TIMES}" if low == high else f"{low}{DASH}{high}{TIMES}"
            tiles.append(
                (
                    f"Speed beside {proof.who(name)}",
                    span,
                    f"{len(found)} size{'s' * (len(found) > 1)}",
                )
            )
    return tiles
