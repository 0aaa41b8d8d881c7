"""Line charts as HTML and SVG.

The drawing area is an SVG stretched over its box, with strokes that do not stretch; labels are HTML
placed in percent. So a chart is as wide as its column and its text as large as the page's, without
a script. `page.js` adds the cursor from the values in `chart_values`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from leanmill.report.page.data import Points
from leanmill.report.page.scale import Scale, fit, smooth, thin


_SIDE = 1000
_MOST_DIGITS = 12
"""Side of the stretched coordinate system."""


@dataclass(frozen=True)
class Axis:
    """What lies along the bottom of charts; those with the same one share a cursor."""

    name: str
    """Key of `place` in page.js, which writes it at the cursor."""
    label: Callable[[float], str]
    """Writes a tick."""
    place: Callable[[float], str]
    """Writes where a value stands, in words."""
    whole: bool = False
    """Whether only whole ticks mean something."""


STEPS = Axis("step", lambda x: f"{x:,.0f}", lambda x: f"step {x:,.0f}", whole=True)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line."""

    label: str
    points: Points
    color: int = 0
    """Index into the palette of page.css; 0 is the colour of text."""
    dashed: bool = False
    faint: bool = False
    """Drawn thin in the background."""
    in_legend: bool = True
    """Shown in the legend and at the cursor."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One figure, over optimizer steps unless it says otherwise."""

    id: str
    title: str
    unit: str
    series: Sequence[Series]
    format: Callable[[float], str]
    """Writes a value for the axis and the legend."""
    axis: Axis = STEPS
    style: str = "number"
    """How page.js writes a value at the cursor: `number`, `count`, `scientific` or `percent`."""
    from_zero: bool = False
    allow_log: bool = False
    note: str = ""
    events: Sequence[tuple[str, int]] = field(default=())
    """Pairs (`resume` or `skip`, step)."""


def with_smoothing(series: Series, min_points: int = 40) -> list[Series]:
    """The series smoothed, over the raw values in the background; short series as they are."""
    if len(series.points) < min_points:
        return [series]
    raw = Series(label=series.label, points=series.points, color=series.color, faint=True, in_legend=False)
    return [raw, Series(label=series.label, points=smooth(series.points), color=series.color)]


def draw(chart: Chart, x_scale: Scale) -> str:
    """Return the chart as a `figure`."""
    drawn = [series for series in chart.series if series.points]
    caption = f'<figcaption><h3>{escape(chart.title)}</h3><span class="unit">{escape(chart.unit)}</span></figcaption>'
    note = f'<p class="note">{escape(chart.note)}</p>'
    if not drawn:
        return f'<figure class="chart">{caption}<p class="empty">No values yet.</p></figure>'
    y_scale = _y_scale(chart)
    return (
        f'<figure class="chart" id="chart-{chart.id}" data-chart="{chart.id}">{caption}{_legend(chart, drawn)}'
        f'<div class="frame"><div class="y-labels" aria-hidden="true">{_y_labels(chart, y_scale)}</div>'
        f'<div class="plot" tabindex="0" role="img" aria-label="{escape(_summary(chart, drawn), quote=True)}">'
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" aria-hidden="true">'
        f"{_grid(y_scale)}{_events(chart, x_scale)}{''.join(_path(s, x_scale, y_scale) for s in drawn)}</svg>"
        f'<div class="cursor" hidden></div></div>'
        f'<div class="x-labels" aria-hidden="true">{_x_labels(x_scale, chart.axis)}</div></div>{note}</figure>'
    )


def chart_values(chart: Chart, x_scale: Scale) -> dict[str, Any]:
    """What page.js needs of a chart: its ranges and the points of its visible series."""
    y_scale = _y_scale(chart)
    return {
        "style": chart.style,
        "axis": chart.axis.name,
        "x": [x_scale.low, x_scale.high],
        "y": [y_scale.low, y_scale.high],
        "log": y_scale.log,
        "series": [
            {"x": [int(x) for x, _ in kept], "y": [float(f"{y:.6g}") for _, y in kept]}
            for series in chart.series
            if series.points and series.in_legend
            for kept in [thin(series.points)]
        ],
    }


def _y_scale(chart: Chart) -> Scale:
    values = [y for series in chart.series for _, y in series.points]
    return fit(values, from_zero=chart.from_zero, allow_log=chart.allow_log)


def _legend(chart: Chart, drawn: Sequence[Series]) -> str:
    visible = [series for series in drawn if series.in_legend]
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 18 8" aria-hidden="true"><path class="line c{s.color}{_dash(s)}" '
        f'd="M1 4H17"/></svg><span>{escape(s.label)}</span> '
        f"<output>{escape(chart.format(s.points[-1][1]))}</output></li>"
        for s in visible
    )
    return f'<ul class="legend">{items}<li class="at" aria-live="polite"></li></ul>'


def _dash(series: Series) -> str:
    return " dashed" if series.dashed else ""


def _path(series: Series, x_scale: Scale, y_scale: Scale) -> str:
    kept = thin(series.points)
    where = [(round(x_scale(x) * _SIDE, 1), round((1 - y_scale(y)) * _SIDE, 1)) for x, y in kept]
    if len(where) == 1:
        # A line of no length with round ends is a dot that does not stretch with the drawing area.
        return f'<path class="dot c{series.color}" d="M{where[0][0]} {where[0][1]}h0"/>'
    line = "M" + "L".join(f"{x} {y}" for x, y in where)
    faint = " faint" if series.faint else ""
    dots = ""
    if len(where) <= 30 and not (series.dashed or series.faint):
        dots = f'<path class="dot c{series.color}" d="{"".join(f"M{x} {y}h0" for x, y in where)}"/>'
    return f'<path class="line c{series.color}{_dash(series)}{faint}" d="{line}"/>{dots}'


def _grid(y_scale: Scale) -> str:
    lines = "".join(f"M0 {(1 - y_scale(tick)) * _SIDE:.1f}H{_SIDE}" for tick in y_scale.ticks())
    return f'<path class="grid" d="{lines}"/><path class="axis" d="M0 {_SIDE}H{_SIDE}"/>'


def _events(chart: Chart, x_scale: Scale) -> str:
    marks = ""
    for kind, step in chart.events:
        if x_scale.low <= step <= x_scale.high:
            x = round(x_scale(step) * _SIDE, 1)
            top = 0 if kind == "resume" else 0.9 * _SIDE
            marks += f'<path class="event {kind}" d="M{x} {top}V{_SIDE}"/>'
    return marks


def _y_labels(chart: Chart, y_scale: Scale) -> str:
    ticks = y_scale.ticks()
    return "".join(
        f'<span style="top:{100 * (1 - y_scale(tick)):.2f}%">{escape(label)}</span>'
        for tick, label in zip(ticks, _distinct(ticks, chart.format), strict=True)
    )


def _distinct(ticks: Sequence[float], write: Callable[[float], str]) -> list[str]:
    """Labels of ticks as the chart writes values; with the digits they have where that would write two alike."""
    labels = [write(tick) for tick in ticks]
    return labels if len({*labels}) == len(labels) else [f"{tick:.{_MOST_DIGITS}g}" for tick in ticks]


def _x_labels(x_scale: Scale, axis: Axis) -> str:
    return "".join(
        f'<span style="left:{100 * x_scale(tick):.2f}%">{escape(axis.label(tick))}</span>'
        for tick in x_scale.ticks(4)
        if not axis.whole or tick == int(tick)
    )


def _summary(chart: Chart, drawn: Sequence[Series]) -> str:
    """The chart in words, for those who do not see it."""
    parts = [
        f"{s.label} from {chart.format(s.points[0][1])} at {chart.axis.place(s.points[0][0])} "
        f"to {chart.format(s.points[-1][1])} at {chart.axis.place(s.points[-1][0])}"
        for s in drawn
        if s.in_legend
    ]
    return f"{chart.title}, {chart.unit}: {'; '.join(parts)}."
