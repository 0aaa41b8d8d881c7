"""Heatmaps as HTML and SVG: one path a colour, stretched over its box; `page.js` reads cells out and redraws."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from leanmill.report.units import number


Cells = Sequence[Sequence[float | None]]
_MAX_LABELS = 12
_GAPLESS = 64
"""From so many columns on, cells touch: gaps between them would be most of what is drawn."""


@dataclass(frozen=True, kw_only=True)
class Colours:
    """Which colour a value has: the class of index i holds values below edges[i], the last one all others."""

    palette: str
    """Prefix of the classes in page.css: `r` (relative, around 1) or `q` (a quantity)."""
    edges: tuple[float, ...]
    low: str
    high: str
    """What the key says at its ends."""
    lone: str = ""
    """What the first class is called where it stands apart in the key."""

    def index(self, value: float) -> int:
        """Return the class of `value`."""
        return bisect.bisect_right(self.edges, value)


RELATIVE = Colours(
    palette="r",
    edges=(1e-9, 0.25, 0.5, 0.7071, 0.8909, 1.1225, 1.4142, 2.0, 4.0),
    low="below ¼",
    high="above 4",
    lone="none",
)
"""A load over the mean load: even within 12 %, then in factors of the square root of 2, 2 and 4."""
_NUM_LEVELS = 7


def levels(values: Sequence[float], write: Callable[[float], str] = number) -> Colours:
    """Return equal steps from the smallest to the largest of `values`."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    step = (high - low) / _NUM_LEVELS
    edges = tuple(low + step * (i + 1) for i in range(_NUM_LEVELS - 1)) if step > 0 else ()
    return Colours(palette="q", edges=edges, low=write(low), high=write(high) if edges else "")


@dataclass(frozen=True, kw_only=True)
class Heat:
    """One heatmap."""

    id: str
    title: str
    unit: str
    cells: Cells
    """By row; None where there is no value."""
    rows: Sequence[str]
    columns: Sequence[str]
    row_name: str
    column_name: str
    """What a row and a column are, for the axes and the read-out, e.g. `layer`."""
    colours: Colours
    note: str = ""


def draw_heat(heat: Heat) -> str:
    """Return the heatmap as a `figure`."""
    caption = f'<figcaption><h3>{escape(heat.title)}</h3><span class="unit">{escape(heat.unit)}</span></figcaption>'
    note = f'<p class="note">{escape(heat.note)}</p>' if heat.note else ""
    return (
        f'<figure class="chart heat" id="heat-{heat.id}" data-heat="{heat.id}">{caption}{_key(heat.colours)}'
        f'<div class="frame" style="grid-template:{_height(len(heat.rows))}rem 2.75rem/{_margin(heat.rows)}rem 1fr">'
        f'<div class="y-labels" aria-hidden="true">{_row_labels(heat.rows)}</div>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{escape(_summary(heat), quote=True)}">'
        f'<svg viewBox="0 0 {max(len(heat.columns), 1)} {max(len(heat.rows), 1)}" preserveAspectRatio="none" '
        f'aria-hidden="true">{paths(heat.cells, heat.colours)}</svg><div class="cell" hidden></div></div>'
        f'<div class="x-labels" aria-hidden="true">{_column_labels(heat.columns)}'
        f"<b>{escape(heat.column_name)}</b></div></div>"
        f'<p class="read-out" aria-live="polite">{escape(_summary(heat))}</p>{note}</figure>'
    )


def heat_values(heat: Heat) -> dict[str, Any]:
    """What page.js needs of a heatmap."""
    return {
        "cells": [[None if value is None else float(f"{value:.3g}") for value in row] for row in heat.cells],
        "rows": list(heat.rows),
        "columns": list(heat.columns),
        "names": [heat.row_name, heat.column_name],
        "edges": list(heat.colours.edges),
        "palette": heat.colours.palette,
    }


def paths(cells: Cells, colours: Colours) -> str:
    """Return one path a colour, of cells one unit wide and high."""
    width = 1 if max(map(len, cells), default=0) > _GAPLESS else 0.94
    found: dict[int, list[str]] = {}
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if value is not None:
                found.setdefault(colours.index(value), []).append(f"M{x} {y}h{width}v0.94h-{width}z")
    return "".join(f'<path class="{colours.palette}{i}" d="{"".join(found[i])}"/>' for i in sorted(found))


def thinned(length: int, most: int) -> list[int]:
    """Return the indices of at most `most` of `length` entries, evenly spread, the last among them."""
    if length <= most:
        return list(range(length))
    return sorted({round(length - 1 - i * (length - 1) / (most - 1)) for i in range(most)})


def _key(colours: Colours) -> str:
    """The colours in a row between the names of its ends."""
    swatches = [f'<i class="{colours.palette}{i}"></i>' for i in range(len(colours.edges) + 1)]
    lone = f"{swatches.pop(0)}<span>{escape(colours.lone)}</span>" if colours.lone else ""
    strip = f"<span>{escape(colours.low)}</span>{''.join(swatches)}<span>{escape(colours.high)}</span>"
    return f'<p class="colours" aria-hidden="true">{lone}{strip}</p>'


def _height(num_rows: int) -> float:
    return min(max(1.5 * num_rows, 4.5), 26)


def _margin(names: Sequence[str]) -> float:
    """Room for the longest label, by its letters."""
    return min(max(0.44 * max(map(len, names), default=0) + 0.75, 2), 10)


def _row_labels(names: Sequence[str]) -> str:
    return _labels(names, "top", 2 * _MAX_LABELS)


def _column_labels(names: Sequence[str]) -> str:
    return _labels(names, "left", _MAX_LABELS)


def _labels(names: Sequence[str], side: str, most: int) -> str:
    """Labels at the middle of their cells, as many as there is room for."""
    every = -(-len(names) // most) or 1
    return "".join(
        f'<span style="{side}:{100 * (i + 0.5) / len(names):.2f}%">{escape(name)}</span>'
        for i, name in enumerate(names)
        if i % every == 0
    )


def _summary(heat: Heat) -> str:
    """Where the extremes are, for those who do not see it and under the figure."""
    found = [
        (value, row, column)
        for row, values in zip(heat.rows, heat.cells, strict=True)
        for column, value in zip(heat.columns, values, strict=True)
        if value is not None
    ]
    if not found:
        return "no values yet"
    low, high = min(found, key=lambda cell: cell[0]), max(found, key=lambda cell: cell[0])
    where = [f"{number(v)} at {heat.row_name} {r}, {heat.column_name} {c}" for v, r, c in (low, high)]
    return f"smallest {where[0]}; largest {where[1]}"
