"""Where tokens went in a mixture of experts: by layer, by domain, over time; from the tables of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leanmill.report.page.data import Record, RunData
from leanmill.report.page.heat import RELATIVE, Heat, draw_heat, thinned
from leanmill.report.page.section import Section


TABLE = "experts"
"""Key in `tables` of an evaluation: `layers`, their numbers, and `domains`, tokens by domain, layer and expert."""
_MOST_EVALUATIONS = 24
_UNIT = "tokens over the mean expert's"


def experts_section(run: RunData) -> Section | None:
    """Return the section; None where no evaluation counted experts."""
    found = _evaluations(run)
    if not found:
        return None
    last = found[-1]
    layers = last["tables"][TABLE]["layers"]
    load, by_layer = _by_layer(last), [(_domains(last, i), _over_time(found, i)) for i in range(len(layers))]
    options = "".join(f'<option value="{i}">{layer}</option>' for i, layer in enumerate(layers))
    content = (
        f'<p class="note">Held-out tokens that each expert got, over those of the mean expert of its layer, after '
        f"step {last['step']:,}. 1 is an even load.</p>"
        f'<div class="heats">{draw_heat(load)}</div>'
        f'<p class="controls"><label for="layer">Layer</label> <select id="layer">{options}</select></p>'
        f'<div class="heats of-2">{"".join(map(draw_heat, by_layer[0]))}</div>'
    )
    return Section(title="Experts", content=content, heats=(load, *by_layer[0]), by_layer=by_layer)


def _evaluations(run: RunData) -> Sequence[Record]:
    """Those that counted the experts that the last one did."""
    found = [record for record in run.evals if (record.get("tables") or {}).get(TABLE, {}).get("domains")]
    shape = [_shape(record) for record in found]
    return [record for record, one in zip(found, shape, strict=True) if one == shape[-1]]


def _shape(record: Record) -> Any:
    table = record["tables"][TABLE]
    return table["layers"], [len(experts) for experts in next(iter(table["domains"].values()))]


def _by_layer(record: Record) -> Heat:
    table = record["tables"][TABLE]
    loads = [_relative(_summed(table, index)) for index in range(len(table["layers"]))]
    width = max(map(len, loads))
    return Heat(
        id="load", title="Load by layer and expert", unit=_UNIT, colours=RELATIVE,
        cells=[[*row, *[None] * (width - len(row))] for row in loads],
        rows=[str(layer) for layer in table["layers"]], columns=[str(i) for i in range(width)],
        row_name="layer", column_name="expert",
    )  # fmt: skip


def _domains(record: Record, index: int) -> Heat:
    table = record["tables"][TABLE]
    loads = {name: _relative(layers[index]) for name, layers in table["domains"].items()}
    return Heat(
        id="domains", title="Load by domain and expert", unit=_UNIT, colours=RELATIVE, cells=list(loads.values()),
        rows=list(loads), columns=[str(i) for i in range(len(next(iter(loads.values()))))],
        row_name="domain", column_name="expert",
    )  # fmt: skip


def _over_time(records: Sequence[Record], index: int) -> Heat:
    kept = [records[i] for i in thinned(len(records), _MOST_EVALUATIONS)]
    loads = [_relative(_summed(record["tables"][TABLE], index)) for record in kept]
    return Heat(
        id="time", title="Load by expert over time", unit=_UNIT, colours=RELATIVE,
        cells=[list(row) for row in zip(*loads, strict=True)],
        rows=[str(i) for i in range(len(loads[0]))], columns=[f"{record['step']:,}" for record in kept],
        row_name="expert", column_name="step",
    )  # fmt: skip


def _summed(table: dict[str, Any], index: int) -> list[float]:
    return [sum(column) for column in zip(*(layers[index] for layers in table["domains"].values()), strict=True)]


def _relative(counts: Sequence[float]) -> list[float | None]:
    """Loads over their mean; a domain without tokens has none."""
    mean = sum(counts) / len(counts)
    return [count / mean if mean > 0 else None for count in counts]
