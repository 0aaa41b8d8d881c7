"""A section of the page with what its script must know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from leanmill.report.page.charts import Chart
from leanmill.report.page.heat import Heat


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section."""

    title: str
    content: str
    """HTML."""
    charts: Sequence[Chart] = ()
    """Those in the content."""
    heats: Sequence[Heat] = ()
    by_layer: Sequence[Sequence[Heat]] = ()
    """Heatmaps that the selector of layers puts in the place of those with the same id, by the layer's index."""


def as_html(section: Section) -> str:
    """Return the section with its heading."""
    return f"<section><h2>{escape(section.title)}</h2>{section.content}</section>\n"
