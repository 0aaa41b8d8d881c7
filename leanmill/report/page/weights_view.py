"""What evaluations found of each site's weights, over the run: one heatmap each, sites x evaluations."""

from __future__ import annotations

from typing import Any

from leanmill.report.page.data import RunData
from leanmill.report.page.heat import Heat, draw_heat, levels, thinned
from leanmill.report.page.section import Section


_SHOWN = {
    "zero_fraction": ("Zeros", "share of the effective weight"),
    "num_levels": ("Levels", "distinct values, counted up to 256"),
    "norm": ("Norm", "Euclidean, of the effective weight"),
    "pq_index": ("PQ index", "how unequal magnitudes are, 0 to 1"),
}
_MOST_EVALUATIONS = 96


def weights_section(run: RunData) -> Section | None:
    """Return the section; None before the second evaluation, and where nothing has changed since the first."""
    history = run.sites.get("history") or []
    kept = [history[index] for index in thinned(len(history), _MOST_EVALUATIONS)]
    heats = [heat for key in _SHOWN if (heat := _heat(key, kept)) is not None] if len(kept) > 1 else []
    content = f'<div class="heats of-2">{"".join(map(draw_heat, heats))}</div>'
    return Section(title="Weights over time", content=content, heats=heats) if heats else None


def _heat(key: str, history: list[dict[str, Any]]) -> Heat | None:
    names = list(history[-1]["sites"])
    cells = [[one["sites"].get(name, {}).get(key) for one in history] for name in names]
    if all(len({value for value in row if value is not None}) <= 1 for row in cells):
        return None
    title, unit = _SHOWN[key]
    return Heat(
        id=f"weights-{key}", title=title, unit=unit, cells=cells, rows=names,
        columns=[f"{one['step']:,}" for one in history], row_name="site", column_name="step",
        colours=levels([value for row in cells for value in row if value is not None]),
    )  # fmt: skip
