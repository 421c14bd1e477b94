"""HTML that cannot be broken from within: what was not built here is text, and is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any

DASH, MINUS, TIMES = "\u2013", "\u2212", "\u00d7"  # not a hyphen, and not an x

_VOID = {"circle", "line", "link", "meta", "path", "rect", "wbr"}

# What neither HTML nor UTF-8 can carry; a layer name or a text may hold it all the same.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Markup that `element` built; every other string is text."""

    __slots__ = ()


def element(tag: str, *children: Any, **attributes: Any) -> Html:
    """One element, with its children and attributes escaped.

    Args:
        tag: Its name; a void one (and an SVG shape without children) closes itself.
        children: Markup, text or numbers, or iterables of them; None is left out.
        attributes: `class_` is class, `aria_label` is aria-label; None is left out.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = markup(children)
    if tag in _VOID and not inner:
        return Html(f"<{tag}{given}/>")
    return Html(f"<{tag}{given}>{inner}</{tag}>")


def markup(child: Any) -> Html:
    """A child of an element, or an iterable of them, as markup."""
    if child is None:
        return Html()
    if isinstance(child, Html):
        return child
    if isinstance(child, Iterable) and not isinstance(child, str):
        return Html("".join(markup(c) for c in child))
    return Html(_escaped(str(child)))


def _escaped(text: str) -> str:
    return escape(_FORBIDDEN.sub("\ufffd", text))


def table(
    head: Iterable[Any],
    rows: Iterable[Iterable[Any]],
    *,
    label: str,
    numeric: Iterable[int] = (),
    foot: Iterable[Any] | None = None,
    marked: Iterable[int] = (),
) -> Html:
    """A table in a box of its own that scrolls sideways, by keyboard too.

    Args:
        head: The heads of the columns.
        rows: The cells; the first of each row is its head.
        label: What the table is of, for those who do not see it.
        numeric: Columns that are set to the right.
        foot: A last row, of sums.
        marked: Rows that stand out, by their place.
    """
    right, bold = set(numeric), set(marked)

    def row(cells: Iterable[Any], mark: bool = False) -> Html:
        made = []
        for i, cell in enumerate(cells):
            kind = "n" if i in right else None
            made.append(
                element("td", cell, class_=kind, dir=None if kind else "auto")
                if i
                else element("th", cell, scope="row", class_=kind, dir="auto")
            )
        return element("tr", made, class_="marked" if mark else None)

    heads = [
        element("th", h, scope="col", class_="n" if i in right else None)
        for i, h in enumerate(head)
    ]
    body = [row(cells, i in bold) for i, cells in enumerate(rows)]
    inner = [
        element("thead", element("tr", heads)),
        element("tbody", body),
        None if foot is None else element("tfoot", row(foot)),
    ]
    box = {"class_": "scroll", "tabindex": 0, "role": "region", "aria_label": label}
    return element("div", element("table", inner), **box)


def dotted(name: str) -> Html:
    """A name of a layer or an operator, which a line may break behind a dot and its like."""
    return markup((part, element("wbr")) for part in re.findall(r".*?[./:_]+|.+", name, re.DOTALL))


def facts(pairs: Iterable[tuple[Any, Any]]) -> Html:
    """Names and what they are."""
    return element(
        "dl",
        [element("div", element("dt", k), element("dd", v, dir="auto")) for k, v in pairs],
        class_="facts",
    )
