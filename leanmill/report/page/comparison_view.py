"""The run beside other models (`leanmill evaluate --out RUN_DIR/evaluation.json`): what each lost, group by group."""

from __future__ import annotations

from html import escape
from typing import Any

from leanmill.report.page.data import Record, RunData
from leanmill.report.page.section import Section
from leanmill.report.units import number, percent


_Key = tuple[str, str, str]


def comparison_section(run: RunData) -> Section | None:
    """Return the section; None where no comparison of this form lies beside the run."""
    found = run.comparison
    models = found.get("models")
    if not isinstance(models, dict) or not models or not all(isinstance(scores, list) for scores in models.values()):
        return None
    dense, bound = found.get("dense"), found.get("bound")
    beyond = {model: {_key(group) for group in groups} for model, groups in (found.get("beyond_bound") or {}).items()}
    lost = {model: {_of(one): one for one in ones} for model, ones in (found.get("lost") or {}).items()}
    known = {model: {_of(score): score for score in scores} for model, scores in models.items()}
    keys = list(dict.fromkeys(_of(score) for scores in models.values() for score in scores))
    heads = "".join(_head(model, dense) for model in models)
    rows = "".join(
        f'<tr><th scope="row">{escape(" · ".join(key))}</th>'
        + "".join(
            _cells(known[model].get(key), lost.get(model, {}).get(key), key in beyond.get(model, set()), model == dense)
            for model in models
        )
        + "</tr>"
        for key in keys
    )
    return Section(
        title="Beside other models",
        content=(
            '<div class="scroll" tabindex="0" role="region" aria-label="Beside other models"><table>'
            f'<thead><tr><th scope="col">Task, group, metric</th>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
            f'<p class="note">{escape(_about(dense, bound, beyond))}</p>'
        ),
    )


def _head(model: str, dense: str | None) -> str:
    name = f'<th scope="col" class="num">{escape(model)}{" (dense)" if model == dense else ""}</th>'
    return name if dense is None or model == dense else f'{name}<th scope="col" class="num">lost</th>'


def _cells(score: Record | None, lost: Record | None, is_beyond: bool, is_dense: bool) -> str:
    value = None if score is None else score.get("value")
    cell = f'<td class="num">{"—" if value is None else escape(number(value))}</td>'
    if is_dense or lost is None:
        return cell
    share = lost.get("lost")
    text = "everything" if share is None else f"{'+' if share > 0 else ''}{percent(share)}"
    changed = lost.get("changed")
    more = "" if changed is None else f" ({percent(changed)} changed)"
    shown = f"{text}{more}{', beyond the bound' if is_beyond else ''}"
    return f'{cell}<td class="num">{f"<strong>{escape(shown)}</strong>" if is_beyond else escape(shown)}</td>'


def _about(dense: str | None, bound: float | None, beyond: dict[str, set[_Key]]) -> str:
    if dense is None:
        return "Scores of leanmill evaluate, no model being held against another."
    text = (
        "Lost against the dense model: of accuracies the fall in points of a hundred, and how many answers changed "
        "from right to wrong or back; of figures that should be low the rise as a share of the dense model's."
    )
    if bound is None:
        return text
    groups = sum(map(len, beyond.values()))
    return f"{text} The bound is {percent(bound)}; {groups or 'no'} group{'' if groups == 1 else 's'} lost more."


def _of(entry: Record) -> _Key:
    return _key([entry.get(part) for part in ("task", "group", "metric")])


def _key(parts: Any) -> _Key:
    task, group, metric = map(str, parts)
    return task, group, metric
