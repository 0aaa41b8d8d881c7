"""A study of a mixture's routing (`leanmill eval --routing`): what decides an expert, since when, who is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from leanmill.report.page.charts import Chart, Series, draw
from leanmill.report.page.data import Record, RunData
from leanmill.report.page.heat import Heat, draw_heat, levels
from leanmill.report.page.scale import Scale
from leanmill.report.page.section import Section
from leanmill.report.units import count, percent


FILE_NAME = "routing.json"
_SHARES = {
    "token": "Token id",
    "previous_token": "Token before",
    "position": "Position",
}


def study_section(run: RunData, x_scale: Scale) -> Section | None:
    """Return the section; None where no study of this form lies beside the run."""
    study = run.study
    if not all(key in study for key in ("step", "layers", "dependence", "drops")):
        return None
    early, late = _learning(study), _drops(study)
    figures = (draw(early, x_scale) if early else "") + draw_heat(late)
    return Section(
        title=f"Routing of the checkpoint at step {study['step']:,}",
        content=f'{_dependence(study)}<div class="heats of-2">{figures}</div>',
        charts=(early,) if early else (),
        heats=(late,),
    )


def _dependence(study: Record) -> str:
    """The table of what predicts the experts of each layer."""
    found = study["dependence"]
    heads = "".join(f'<th scope="col">{title}</th>' for title in (*_SHARES.values(), "Same expert for an id"))
    rows = "".join(
        f'<tr><th scope="row">{layer}</th>{"".join(_bar(found[key][i]) for key in _SHARES)}'
        f"{_bar(found['agreement'][i], found['agreement_by_chance'][i])}</tr>"
        for i, layer in enumerate(study["layers"])
    )
    return (
        '<div class="scroll dependence" tabindex="0" role="region" aria-label="What decides an expert"><table>'
        f'<thead><tr><th scope="col">Layer</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="note">{escape(_about_dependence(study))}</p>'
    )


def _about_dependence(study: Record) -> str:
    looked_at = max((n or 0 for n in study["dependence"]["num_tokens"]), default=0)
    return (
        f"How far a token's id, the token before it and its position in the row predict its experts: 0% is no better "
        f"than the experts' frequencies, 100% exact; on {count(looked_at)} held-out tokens, from other rows. Last "
        f"column: share of tokens that go to the favourite expert of their id, and of all tokens to one overall."
    )


def _bar(share: float | None, beside: float | None = None) -> str:
    if share is None:
        return "<td>—</td>"
    text = percent(share) + ("" if beside is None else f" ({percent(beside)})")
    return (
        f'<td class="bar-cell"><span class="bar" aria-hidden="true"><i style="width:{100 * share:.1f}%"></i></span>'
        f'<span class="bar-value">{escape(text)}</span></td>'
    )


def _learning(study: Record) -> Chart | None:
    """The chart of how much of the last checkpoint's routing earlier ones had; None with one checkpoint."""
    earlier: Sequence[Record] = study.get("learning") or []
    if not earlier:
        return None
    last = (float(study["step"]), 1.0)
    shares = [(float(one["step"]), _mean(one["share"])) for one in earlier]
    chance = [(float(one["step"]), _mean(one["by_chance"])) for one in earlier]
    return Chart(
        id="learning", title="Early learning", unit="of the last checkpoint's experts", format=percent,
        style="percent", from_zero=True,
        series=[
            Series(label="chosen at the step", points=[*shares, last], color=1),
            Series(label="by chance", points=chance, color=2, dashed=True),
        ],
        note="Held-out tokens, mean over layers. By chance: two routers of these loads that share nothing.",
    )  # fmt: skip


def _drops(study: Record) -> Heat:
    """The heatmap of drops by position."""
    found = study["drops"]
    rows = dict(found["by_capacity"])
    if found.get("as_run"):
        rows = {"as run": found["as_run"], **rows}
    width = len(next(iter(rows.values())))
    length, every = found["sequence_length"], [rate for rates in rows.values() for rate in rates]
    return Heat(
        id="drops", title="Drops towards the end", unit="share of choices dropped, by position",
        cells=list(rows.values()), rows=list(rows), columns=[f"{i * length // width:,}" for i in range(width)],
        row_name="capacity", column_name="position", colours=levels(every, percent),
        note="If an expert took only so many times its even share of a row's choices, in the order of the tokens.",
    )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
