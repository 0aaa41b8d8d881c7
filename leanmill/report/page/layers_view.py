"""Metrics that step rules report by layer (`rule/metric/layer`): one heatmap each, layers x steps."""

from __future__ import annotations

from collections.abc import Sequence

from leanmill.report.page.data import RunData, keys
from leanmill.report.page.heat import Heat, draw_heat, levels, thinned
from leanmill.report.page.section import Section


_MOST_RECORDS = 96


def layers_section(run: RunData) -> Section | None:
    """Return the section; None where no metric has a value a layer."""
    places: dict[str, list[str]] = {}
    for name in keys(run.steps, "metrics"):
        metric, separator, place = name.rpartition("/")
        if separator and "/" in metric:
            places.setdefault(metric, []).append(place)
    drawn = [_heat(run, index, metric, layers) for index, (metric, layers) in enumerate(places.items())]
    # What is 0 everywhere, such as drops where nothing drops, its chart says.
    heats = [heat for heat in drawn if any(value for row in heat.cells for value in row)]
    content = f'<div class="heats of-2">{"".join(map(draw_heat, heats))}</div>'
    return Section(title="By layer", content=content, heats=heats) if heats else None


def _heat(run: RunData, index: int, metric: str, layers: Sequence[str]) -> Heat:
    records = [record for record in run.steps if record.get("metrics")]
    kept = [records[i] for i in thinned(len(records), _MOST_RECORDS)]
    cells = [[record["metrics"].get(f"{metric}/{layer}") for record in kept] for layer in layers]
    return Heat(
        id=f"layer-{index}", title=metric.replace("/", ": ").replace("_", " "), unit="at the step logged",
        cells=cells, rows=list(layers), columns=[f"{record['step']:,}" for record in kept], row_name="layer",
        column_name="step", colours=levels([v for row in cells for v in row if v is not None]),
    )  # fmt: skip
