"""The plots of report.html, in SVG.

They have no viewBox: what is wide is in percent, and what is high and all text in pixels, so that
a plot takes the width that there is, and its text stays legible on a phone. Colors come from
report.css by class, for light and dark; each also differs in shape, and says it in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import DASH, Html, element

_FAR = 4  # a mark beyond so many times the largest value leaves the axis, or all would be one bar

_NAME = 14  # characters that have room before a bar


@dataclass(frozen=True)
class Mark:
    """A value with a name on an axis; `look` is its class: mean, worst or budget."""

    name: str
    value: float
    look: str


@dataclass(frozen=True)
class Bar:
    """A bar: its height or length, what it says when pointed at, and whether it stands out."""

    value: float
    title: str
    marked: bool = False


def number(value: object) -> str:
    """A number for a person: three digits, five close to 1, and whatever is none as it is."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float) and value not in ("inf", "-inf", "nan"):
        return str(value)
    value = float(str(value))
    if not math.isfinite(value):
        return "not finite"
    if 0.99 <= abs(value) < 1:  # a cosine, where all that counts is how far it is from 1
        return f"{value:.5f}"
    if value == 0 or 1e-4 <= abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.1e}"


def as_float(value: object) -> float:
    """A number of a manifest, which writes "inf" for one that is infinite; NaN for what is none."""
    return math.nan if value is None else float(str(value))


def size(count: int | None) -> str:
    """Bytes for a person."""
    if count is None:
        return DASH
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{number(count / unit)} {name}"
    return f"{count} B"


def ticks(high: float, most: int = 5) -> list[float]:
    """Round numbers from 0 to `high`, at most `most` and a 0."""
    if not 0 < high < math.inf:
        return [0.0]
    unit = 10.0 ** math.floor(math.log10(high / most))
    step = next(unit * m for m in (1, 2, 5, 10) if high / (unit * m) <= most)
    return [i * step for i in range(int(high / step * (1 + 1e-9)) + 1)]


def histogram(values: Sequence[float], marks: Sequence[Mark], *, label: str) -> Html:
    """How many of the values, all of them finite, lie where, with the marks above.

    A mark far beyond the values is named at the right edge instead, with an arrow.
    """
    low, top = min(0.0, *values), max(values)
    reach = _FAR * top if top > 0 else math.inf
    near = [m.value for m in marks if m.value <= reach]
    span = (max([top, *near]) - low) * 1.04 or 1.0  # so that no value is at its very end
    count = max(10, min(40, 2 * math.isqrt(len(values))))
    bins = [0] * count
    for v in values:
        bins[int((v - low) / span * count)] += 1
    lane, body = 17, 150
    head = lane * len(marks) + 18
    floor = head + body

    def x(value: float) -> float:
        return 100 * (value - low) / span

    shapes: list[Html] = []
    texts: list[Html] = []  # drawn over the lines, which cross them
    tallest = max(bins)
    for t in ticks(tallest, 3):
        if t == int(t):
            level = floor - body * t / tallest
            place = {"x2": "100%", "y1": _px(level), "y2": _px(level)}
            shapes.append(element("line", **place, class_="grid"))
            if t:
                said = f"{t:.0f} example{'s' * (t > 1)}"
                texts.append(_text(said, "100%", level - 4, "tick", "end"))
    for i, n in enumerate(bins):
        if n:
            start, end = (number(low + span * k / count) for k in (i, i + 1))
            title = f"{start} to {end}: {n} example{'s' * (n > 1)}"
            height = max(2.0, body * n / tallest)
            shapes.append(_bar(100 * i / count, 92 / count, floor - height, height, "bar", title))
    for i, m in enumerate(marks):
        y, at = lane * i + 13, x(m.value)
        said = f"{m.name} {number(m.value)}"
        if m.value > reach:
            texts.append(_text(f"{said}, beyond this axis →", "100%", y, m.look, "end"))
            continue
        ends = {"x1": _pc(at), "x2": _pc(at), "y1": _px(y + 4), "y2": _px(floor)}
        shapes.append(element("line", **ends, class_=f"mark {m.look}"))
        anchor = "start" if at < 25 else "end" if at > 75 else "middle"
        texts.append(_text(said, _pc(at), y, m.look, anchor))
    shapes += texts
    for t in ticks(low + span, 4):
        at = x(t)
        anchor = "start" if at < 4 else "end" if at > 96 else "middle"
        shapes.append(_text(number(t), _pc(at), floor + 18, "tick", anchor))
    return _svg(shapes, floor + 24, label)


def columns(bars: Sequence[Bar], high: float, slots: int, *, label: str) -> Html:
    """Upright bars, one a layer; what stands out is hollow, with a pointer above.

    Args:
        bars: In order; a value that is no number is a dash on the floor.
        high: The value of a full bar; a larger one is cut through.
        slots: How many bars have room: the same for plots that are to be compared.
        label: What they show, for those who do not see it.
    """
    body, floor = 48, 58
    slot = 100 / max(slots, 1)
    shapes = [element("line", x2="100%", y1=floor, y2=floor, class_="grid")]
    for i, bar in enumerate(bars):
        at, wide = i * slot + slot * 0.1, slot * 0.8
        known = math.isfinite(bar.value)
        height = max(1.5, body * min(1.0, max(0.0, bar.value) / high)) if known and high else 1.5
        look = "bar float" if bar.marked else "bar" if known else "bar unknown"
        shapes.append(_bar(at, wide, floor - height, height, look, bar.title))
        if known and bar.value > high:
            cut = {"x": _pc(at - wide), "y": _px(floor - body * 0.75), "width": _pc(3 * wide)}
            shapes.append(element("rect", **cut, height=4, class_="cut"))
        if bar.marked:
            pointer = element("path", d="M-4 -9h8l-4 6z", class_="pointer")
            inner = {"x": _pc(at + wide / 2), "y": _px(floor - height), "overflow": "visible"}
            shapes.append(element("svg", pointer, **inner))
    return _svg(shapes, floor + 2, label)


def lengths(bars: Sequence[tuple[str, float, str, str]], *, label: str) -> Html:
    """Bars that lie, each with its name before and what it says behind.

    Args:
        bars: `name`, `value`, `text`, `look`: the class of the bar.
        label: What they show, for those who do not see it.
    """
    row = 24
    most = max((v for _, v, _, _ in bars if math.isfinite(v)), default=0.0) or 1.0
    shapes = []
    for i, (name, value, text, look) in enumerate(bars):
        y = i * row
        wide = 50 * value / most if math.isfinite(value) else 0.0
        brief = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
        shapes.append(_text(brief, "0", y + 16, "name"))
        shapes.append(_bar(28, wide, y + 5, 14, f"bar {look}", f"{name}: {text}"))
        shapes.append(_text(text, _pc(28 + wide + 1.5), y + 16, "value"))
    return _svg(shapes, row * len(bars), label)


def pair(before: float, after: float, most: float) -> Html:
    """Two short bars for a cell of a table, whose numbers stand beside them."""
    most = most or 1.0
    shapes = [
        element("rect", x=0, y=1, width=_pc(100 * before / most), height=6, class_="bar before"),
        element("rect", x=0, y=9, width=_pc(100 * after / most), height=6, class_="bar"),
    ]
    return element("svg", shapes, width=140, height=16, class_="pair", aria_hidden="true")


def _svg(shapes: Sequence[Html], height: float, label: str) -> Html:
    size = {"width": "100%", "height": _px(height)}
    return element("svg", shapes, **size, role="img", aria_label=label, class_="plot")


def _bar(x: float, wide: float, y: float, high: float, look: str, title: str) -> Html:
    place = {"x": _pc(x), "y": _px(y), "width": _pc(wide), "height": _px(high)}
    return element("rect", element("title", title), **place, class_=look)


def _text(text: str, x: str, y: float, look: str, anchor: str | None = None) -> Html:
    return element("text", text, x=x, y=_px(y), class_=look, text_anchor=anchor)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _pc(value: float) -> str:
    return f"{value:.2f}%"
