"""The drawing of the way of a weight through its slots, made from the slots themselves when the site is built.

What each slot does and who stands in it is read from the table of `techniques/index.md`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leanmill.core.stage import InputSlot, Slot


MARK = "<!-- the way of a weight -->"
TABLE = Path(__file__).resolve().parents[1] / "techniques" / "index.md"
ROW = re.compile(r"^\| `([A-Z]+)` \| ([^|]+) \| ([^|]+) \|", re.M)
WIDTH, BOX, GAP, LINE, START = 1040, 132, 24, 15, 176
DOES = {
    "COMPACT": "decode bytes",
    "DELTA": "add low rank",
    "ROTATE": "orthonormal",
    "MASK": "zero some",
    "QUANT": "snap to levels",
    "NORM": "scale rows",
}
"""In two words, below the name of a slot."""
MOST_TENANTS = 5


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the drawing where a page asks for it."""
    return markdown.replace(MARK, drawing()) if MARK in markdown else markdown


def tenants() -> dict[str, list[str]]:
    """Techniques of each slot, by the table; of each slot that there is."""
    found = {name: re.findall(r"`([\w.]+)`", cell.replace("`where: weight`", "")) for name, _, cell in _rows()}
    assert list(found) == [slot.name for slot in Slot], "docs/techniques/index.md has other slots than there are"
    return found


def _rows() -> list[tuple[str, str, str]]:
    return ROW.findall(TABLE.read_text(encoding="utf-8"))


def drawing() -> str:
    """Return the SVG in a figure, one line of HTML after the other without an empty one."""
    return "\n".join(['<figure class="wide">', *_svg(), "</figure>"]) + "\n"


def _svg() -> Iterator[str]:
    yield (
        f'<svg viewBox="0 0 {WIDTH} 310" role="img" width="100%" fill="none" stroke="currentColor" '
        f'font-family="inherit" font-size="13" aria-label="A weight goes through its slots into the matmul">'
    )
    yield '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    yield '<path d="M0 0 8 4 0 8z" fill="currentColor" stroke="none"/></marker></defs>'
    yield _text(8, 40, "weight", weight="bold")
    yield _text(8, 56, "one fp32 master,")
    yield _text(8, 71, "sharded by the engine")
    named = tenants()
    for index, slot in enumerate(Slot):
        left = START + index * (BOX + GAP)
        yield _arrow(left - GAP, 48, left, 48)
        yield from _slot(left, 22, slot.name)
        for line, name in enumerate(_first(named[slot.name])):
            yield _text(left + 6, 92 + LINE * line, name, size=12, opacity=0.75)
    right = START + len(Slot) * (BOX + GAP) - GAP
    end = right + 36
    yield f'<path d="M{right} 48H{end}V185" marker-end="url(#tip)"/>'
    yield _text(end + 8, 112, "effective", size=12)
    yield _text(end + 8, 127, "weight", size=12)
    yield f'<circle cx="{end}" cy="206" r="19"/>' + _text(end - 9, 210, "x·W", size=12)
    yield _text(68, 202, "activations", weight="bold")
    yield _text(68, 218, "of the layer")
    for index, input_slot in enumerate(InputSlot):
        left = START + index * (BOX + GAP)
        yield _arrow(left - GAP, 206, left, 206)
        yield from _slot(left, 180, input_slot.name)
    yield _arrow(START + len(InputSlot) * (BOX + GAP) - GAP, 206, end - 20, 206)
    yield f'<path d="M{end} 226V262" marker-end="url(#tip)"/>'
    yield _text(end - 90, 280, "loss, and the loss terms", size=12)
    yield _text(end - 90, 295, "that techniques add", size=12)
    yield f'<path d="M{end - 98} 283H60V82" stroke-dasharray="5 4" marker-end="url(#tip)"/>'
    yield _text(START, 275, "gradient, straight through the slots; step rules once an optimizer step", size=12)
    yield _text(START, 300, "export and evaluation see the same effective weight", size=12, opacity=0.75)
    yield "</svg>"


def _first(names: list[str]) -> list[str]:
    """As many names as there is room for."""
    return (
        names if len(names) <= MOST_TENANTS else [*names[: MOST_TENANTS - 1], f"{len(names) - MOST_TENANTS + 1} more"]
    )


def _slot(left: float, top: float, name: str) -> Iterator[str]:
    yield f'<rect x="{left}" y="{top}" width="{BOX}" height="52" rx="6" fill="currentColor" fill-opacity="0.07"/>'
    yield _text(left + 8, top + 22, name, weight="bold")
    yield _text(left + 8, top + 40, DOES[name], size=12)


def _arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    return f'<path d="M{x} {y}L{to_x - 2} {to_y}" marker-end="url(#tip)"/>'


def _text(x: float, y: float, text: str, *, size: int = 13, weight: str = "normal", opacity: float = 1) -> str:
    style = f'font-size="{size}" font-weight="{weight}" opacity="{opacity:g}"'
    return f'<text x="{x:g}" y="{y:g}" stroke="none" fill="currentColor" {style}>{html.escape(text)}</text>'
