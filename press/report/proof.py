"""What holds for any artifact: speed, graph, fusions, parity, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...artifact import Manifest
from .markup import DASH, MINUS, TIMES, Html, dotted, element, facts, markup, table
from .plots import as_float, lengths, number, pair, size

Numbers = Mapping[str, Any]


def who(contestant: str) -> str:
    """A contestant of measured.json as a person would name it."""
    known = {"onnxpress": "this artifact", "torch": "PyTorch", "before": "the graph before"}
    return known.get(contestant, contestant)


def speed(rows: Sequence[Numbers], measured: Numbers) -> Html:
    """Milliseconds by size and contestant, as bars and as a table.

    Args:
        rows: Those of `timing.time_against`.
        measured: What it says of the machine.
    """
    if not rows:
        return element(
            "p", "Nothing was measured. ", element("code", "onnxpress bench DIR"), " does."
        )
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    others = [name for name in names if name != "onnxpress"]
    looks = {"onnxpress": "", "torch": "other"}
    figures, cells = [], []
    for row in rows:
        ms, shape = row["ms"], _shape(row)
        bars = [
            (who(n), as_float(ms[n]), f"{number(ms[n])} ms", looks.get(n, "before"))
            for n in names
            if n in ms
        ]
        label = f"Time at {shape}: " + ", ".join(f"{name} {text}" for name, _, text, _ in bars)
        caption = element("figcaption", element("span", shape))
        figures.append(element("figure", caption, lengths(bars, label=label)))
        own = ms.get("onnxpress")
        ratios = (f"{ms[n] / own:.2f}{TIMES}" if own and n in ms else DASH for n in others)
        cells.append((shape, *(number(ms.get(n)) for n in names), *ratios))
    heads = ["size", *(f"{who(n)}, ms" for n in names), *(f"beside {who(n)}" for n in others)]
    told = f"Medians of {measured['rounds']} rounds, interleaved in one run"
    if machine := measured.get("machine"):
        told += f", on {machine['cpu']} with {machine['cores']} cores"
    if threads := measured.get("threads"):
        told += f", {threads} threads each"
    return markup(
        [
            element("p", f"{told}. Shorter is faster; each size has its own scale."),
            element("div", figures, class_="panels"),
            table(heads, cells, label="Speed by size", numeric=range(1, len(heads))),
        ]
    )


def _shape(row: Numbers) -> str:
    """The sizes of a row; caches that are empty are left out."""
    dims = [f"{k} {v}" for k, v in row.items() if k not in ("ms", "speedup") and v != 0]
    return ", ".join(dims) or "fixed shapes"


def graph(before: Mapping[str, int], after: Mapping[str, int], precision: Numbers) -> Html | None:
    """How often each operator occurs before and after, those that changed most first."""
    counts = {op: (before.get(op, 0), after.get(op, 0)) for op in {*before, *after}}
    if not counts:
        return None
    order = sorted(
        counts, key=lambda op: (-abs(counts[op][1] - counts[op][0]), -max(counts[op]), op)
    )
    most = max(max(pair) for pair in counts.values())
    rows = [
        (dotted(op), f"{a:,}", f"{b:,}", _signed(b - a), pair(a, b, most))
        for op in order
        for a, b in [counts[op]]
    ]
    first, last = sum(before.values()), sum(after.values())
    told = f"{first:,} nodes as captured, {last:,} as published. "
    told += "In each row the outlined bar is before and the filled one after."
    pruned = precision.get("pruned") or {}
    listed = table(
        ("operator", "before", "after", "difference", "before and after"),
        rows,
        label="Operators before and after",
        numeric=[1, 2, 3],
        foot=("all", f"{first:,}", f"{last:,}", _signed(last - first), ""),
    )
    gone = [(f"pruned {name}", number(value)) for name, value in pruned.items() if value]
    return markup([element("p", told), facts(gone) if gone else None, listed])


def _signed(difference: int) -> str:
    return f"{difference:+,}".replace("-", MINUS) if difference else "0"


def fusions(manifest: Manifest) -> Html | None:
    """Which layers are one node, and where and why the others stay in parts."""
    if not manifest.fusions:
        return None

    def missed(fusion: Numbers) -> Html | str:
        at = [element("li", f"{m['node']}: {m['reason']}") for m in fusion["missed"]]
        return element("ul", at) if at else DASH

    rows = [
        (f["kind"], f["fused"], f["lifted"], len(f["missed"]), missed(f)) for f in manifest.fusions
    ]
    heads = ("layer", "fused", "made by passes", "missed", "where and why")
    return table(heads, rows, label="Fusions", numeric=[1, 2, 3])


def parity(manifest: Manifest) -> Html | None:
    """How far the graph is from its reference, point by point."""
    checked = manifest.parity
    if checked is None:
        return None
    passed = "✓ within the tolerance" if checked["passed"] else "✕ not within the tolerance"
    passed += ", drift was allowed" if checked["allowed_drift"] else ""
    about = [("reference", checked["reference"]), ("result", passed)]
    about += [(f"largest difference of {n}", number(v)) for n, v in checked["max_abs"].items()]
    more = (
        ("inputs that stayed constant", "constant_inputs"),
        ("dimensions that stayed fixed", "fixed_dimensions"),
        ("points that the reference refused", "refused"),
    )
    about += [(name, ", ".join(checked[key])) for name, key in more if checked.get(key)]
    if undefined := checked.get("undefined"):
        about.append(("values that the reference left undefined", number(undefined)))
    rows = [(p["point"], number(p["max_abs"])) for p in checked["points"]]
    points = table(("point", "largest difference"), rows, label="Points", numeric=[1])
    return markup(
        [
            element(
                "p", "Before any precision is lowered, the graph is held against its reference."
            ),
            facts(about),
            element("p", f"Tolerance: {checked['tolerance']}.", class_="soft"),
            element("p", f"The largest: {checked['worst']}.", class_="soft"),
            element("details", element("summary", "All points"), points),
        ]
    )


def origin(manifest: Manifest, precision: Numbers) -> Html:
    """Where it comes from and what it is made of: source, sets, recipe, files, tools."""
    source = manifest.source
    about = [("source", source["spec"]), ("kind", source["kind"])]
    about.append(("sha256 of its weights", element("code", source["weights_sha256"][:12])))
    parts: list[Html] = [facts(about)]
    if notes := source.get("notes"):
        parts.append(element("ul", (element("li", note) for note in notes), class_="soft"))
    sets = [
        (name, precision[key]["from"], number(precision[key]["examples"]), _sha(precision[key]))
        for name, key in (
            ("calibration", "calibration"),
            ("search", "search"),
            ("evaluation", "eval"),
        )
        if precision.get(key)
    ]
    if sets:
        heads = ("set", "from", "examples", "sha256")
        listed = table(heads, sets, label="Calibration and evaluation sets", numeric=[2])
        parts += [element("h3", "Calibration and evaluation"), listed]
    if recipe := precision.get("recipe"):
        named = [(k.replace("_", " "), number(v)) for k, v in sorted(recipe.items())]
        parts += [element("h3", "Recipe"), facts(named)]
    if told := precision.get("notes"):
        parts.append(element("ul", (element("li", note) for note in told), class_="soft"))
    files = [(n, size(f["bytes"]), _sha(f)) for n, f in sorted(manifest.files.items())]
    if files:
        listed = table(("file", "size", "sha256"), files, label="Files", numeric=[1])
        parts += [element("h3", "Files"), listed]
    signature = [
        (spec.name, side, spec.dtype, ", ".join(map(str, spec.shape)) or "scalar")
        for side, specs in (("input", manifest.inputs), ("output", manifest.outputs))
        for spec in specs
    ]
    heads = ("name", "side", "type", "shape")
    parts += [element("h3", "Signature"), table(heads, signature, label="Signature")]
    if manifest.tools:
        parts += [element("h3", "Tools"), facts(sorted(manifest.tools.items()))]
    return markup(parts)


def _sha(of: Numbers) -> Html:
    return element("code", str(of["sha256"])[:12])
