"""What the gate saw and what it chose from: drift, layers, candidates."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .markup import DASH, Html, dotted, element, facts, markup, table
from .plots import Bar, Mark, as_float, columns, histogram, number, size

Numbers = Mapping[str, Any]

_PANELS = 16  # kinds of layers with a plot of their own
_TEXT = 400  # characters of an example


def drift(precision: Numbers, drifts: Sequence[float], examples: Sequence[Numbers]) -> Html | None:
    """The drift of the eval set as a histogram, and the worst of its examples."""
    found = precision.get("drift")
    if not found or (precision["precision"] == "fp32" and not precision.get("pruned")):
        return None
    finite = sorted(v for v in map(as_float, drifts) if math.isfinite(v))
    parts = [element("p", f"How far its answers are from those of fp32: {found['metric']}.")]
    if finite:
        marks = [
            Mark("mean", as_float(found["mean"]), "mean"),
            Mark("worst", as_float(found["worst"]), "worst"),
            Mark("budget of the mean", as_float(found["budget"]), "budget"),
            Mark("budget of the worst", as_float(found["worst_budget"]), "worst-budget"),
        ]
        label = f"Histogram of the drift of {len(finite)} examples: " + ", ".join(
            f"{m.name} {number(m.value)}" for m in marks
        )
        caption = "How many examples drift how far; a bar says its numbers when pointed at."
        plot = histogram(finite, [m for m in marks if math.isfinite(m.value)], label=label)
        parts.append(element("figure", plot, element("figcaption", caption)))
    if lost := len(drifts) - len(finite):
        said = f"{lost} of {len(drifts)} examples gave no finite number."
        parts.append(element("p", element("strong", said), class_="bad"))
    about = [("examples", number(len(drifts)))] if drifts else []
    if finite:
        at = finite[math.ceil(0.95 * len(finite)) - 1]
        about += [
            ("median", number(statistics.median(finite))),
            ("95 of 100 are below", number(at)),
        ]
    about += [(k.replace("_", " "), number(v)) for k, v in (found.get("extra") or {}).items()]
    parts.append(facts(about))
    if examples:
        worst = sorted(examples, key=lambda x: -_rank(x["drift"]))
        rows = [(number(x["drift"]), _text(x["text"])) for x in worst]
        listed = table(("drift", "text"), rows, label="Worst examples", numeric=[0])
        parts += [element("h3", "Worst examples"), listed]
    return markup(parts)


def _text(text: object) -> Html:
    whole = str(text)
    cut = whole if len(whole) <= _TEXT else f"{whole[:_TEXT]}… ({len(whole):,} characters)"
    return element("div", cut or "(empty)", class_="text", dir="auto")


def _rank(value: object) -> float:
    """For sorting: what is no number is the worst."""
    given = as_float(value)
    return math.inf if math.isnan(given) else given


# Layers -------------------------------------------------------------------------------------


def in_float(layer: Numbers, precision: Numbers) -> bool:
    """Whether a layer was kept in a wider float than the rest."""
    own = str(layer["precision"])
    return own.startswith(("fp", "bf")) and own != precision["precision"]


def layers(precision: Numbers) -> Html | None:
    """How sensitive each layer is, and which were kept in float and why."""
    every = precision.get("layers")
    if not every:
        return None
    kept = [x for x in every if in_float(x, precision)]
    known = any(x["sensitivity"] is not None for x in every)
    told = f"{len(every)} layers, {len(kept) or 'none'} of them kept in float. " + (
        "A bar is the drift that comes from one layer; all plots have the same scale, and a bar "
        "that is cut through goes beyond it."
        if known
        else "How sensitive each one is was not measured."
    )
    parts = [element("p", told)]
    if known:
        if kept:
            parts.append(element("p", _key(), "kept in float", class_="soft"))
        parts.append(element("div", _panels(every, precision), class_="panels"))
    if kept:
        heads = ("layer", "precision", "sensitivity", "why")
        rows = [
            (dotted(x["name"]), x["precision"], number(x["sensitivity"]), x["reason"] or "unknown")
            for x in kept
        ]
        listed = table(heads, rows, label="Layers kept in float", numeric=[2])
        parts += [element("h3", "Kept in float"), listed]
    heads = ("layer", "precision", "sensitivity", "smoothing alpha")
    rows = [
        (dotted(x["name"]), x["precision"], number(x["sensitivity"]), number(x.get("alpha")))
        for x in every
    ]
    full = table(heads, rows, label="All layers", numeric=[2, 3])
    said = "The one layer" if len(every) == 1 else f"All {len(every)} layers"
    parts.append(element("details", element("summary", said), full))
    return markup(parts)


def _key() -> Html:
    """What a layer kept in float looks like in the plots."""
    shapes = [
        element("path", d="M1 1h8l-4 6z", class_="pointer"),
        element("rect", x=2, y=9, width=6, height=7, class_="bar float"),
    ]
    return element("svg", shapes, width=10, height=16, class_="key", aria_hidden="true")


def _panels(every: Sequence[Numbers], precision: Numbers) -> list[Html]:
    """A plot for each kind of layer; past `_PANELS` of them, one for all that are least sensitive.

    A bar has the same place in each, so that the plots of one block's layers line up.
    """
    kinds: dict[str, list[Numbers]] = defaultdict(list)
    for layer in every:
        kinds[layer["kind"]].append(layer)
    if len(kinds) > _PANELS:
        order = sorted(
            kinds, key=lambda k: max(_rank(x["sensitivity"] or 0) for x in kinds[k]), reverse=True
        )
        least = set(order[_PANELS - 1 :])
        rest = [x for x in every if x["kind"] in least]
        kinds = {k: v for k, v in kinds.items() if k not in least}
        kinds[f"{len(least)} more kinds"] = rest
    high = _scale(every, precision)
    slots = max(12, *map(len, kinds.values()))
    figures = []
    for kind, members in kinds.items():
        bars = [_bar(x, precision) for x in members]
        kept = sum(b.marked for b in bars)
        values = [b.value for b in bars if math.isfinite(b.value)]
        said = f"max {number(max(values))}" if values else "not measured"
        said = f"{kept} of {len(bars)} in float, {said}" if kept else said
        caption = element("figcaption", element("span", dotted(kind)), element("small", said))
        label = f"Sensitivity of the {len(bars)} layers {kind}: {said}"
        figures.append(element("figure", caption, columns(bars, high, slots, label=label)))
    return figures


def _scale(every: Sequence[Numbers], precision: Numbers) -> float:
    """The value of a full bar: the largest, unless it would leave nothing to see of the others."""
    known = [(as_float(x["sensitivity"]), in_float(x, precision)) for x in every]
    largest = max((v for v, _ in known if math.isfinite(v)), default=0.0)
    lowered = max((v for v, kept in known if not kept and math.isfinite(v)), default=0.0)
    return 1.5 * lowered if 0 < 4 * lowered < largest else largest


def _bar(layer: Numbers, precision: Numbers) -> Bar:
    said = f"{layer['name']}: {number(layer['sensitivity'])}, {layer['precision']}"
    said += f" ({layer['reason']})" if layer["reason"] else ""
    return Bar(as_float(layer["sensitivity"]), said, in_float(layer, precision))


# Candidates ---------------------------------------------------------------------------------


def candidates(precision: Numbers) -> Html | None:
    """What was tried, and what it was kept or left for."""
    tried = precision.get("candidates")
    if not tried:
        return None
    shapes = list(dict.fromkeys(s for c in tried for s in c["ms"] or {}))
    best = {s: min(c["ms"][s] for c in tried if s in (c["ms"] or {})) for s in shapes}
    gate = {None: DASH, True: "✓\u00a0passed", False: "✕\u00a0not\u00a0passed"}

    def ms(candidate: Numbers, shape: str) -> str | Html:
        value = (candidate["ms"] or {}).get(shape)
        text = number(value)
        return element("b", text) if value == best[shape] else text

    rows = [
        (
            c["name"],
            number(c["drift"]),
            gate[c["passed"]],
            *(ms(c, s) for s in shapes),
            size(c["bytes"]),
            _why(c),
        )
        for c in tried
    ]
    heads = ("candidate", "mean drift", "gate", *(f"ms at {s}" for s in shapes), "size", "why")
    listed = table(
        heads,
        rows,
        label="Candidates",
        numeric=[1, *range(3, 4 + len(shapes))],
        marked=[i for i, c in enumerate(tried) if c["kept"]],
    )
    told = f"Asked for: {precision['asked']}."
    told += " The fastest at each size is in bold." if shapes else " None of them was timed."
    return markup([element("p", told), listed])


def _why(candidate: Numbers) -> str:
    """Why it was kept or left."""
    if candidate["kept"]:
        return f"Kept. {candidate['why']}".strip()
    beaten = candidate["passed"] and candidate["ms"]
    return candidate["why"] or ("not the fastest" if beaten else DASH)
