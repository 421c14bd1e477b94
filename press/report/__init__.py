"""report.html: what a person reads who decides whether to ship the model.

page.py       the page: its head, the verdict, the tiles
gate.py       drift, layers, candidates: what the gate saw and what it chose from
proof.py      speed, graph, fusions, parity, origin
plots.py      SVG that stays legible at any width
markup.py     HTML that escapes whatever was not built as markup
report.css    the looks, for light and dark
"""

from .page import report

__all__ = ["report"]
