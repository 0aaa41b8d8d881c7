"""Several runs on one page: figures side by side, curves over tokens and over time, what their recipes differ in."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml

from leanmill import __version__
from leanmill.core.errors import ConfigError
from leanmill.recipe.changes import side_by_side
from leanmill.report.files import write_atomically
from leanmill.report.page.charts import Axis, Chart, Series, chart_values, draw
from leanmill.report.page.data import RunData, keys, load_run, points
from leanmill.report.page.scale import Scale, smooth
from leanmill.report.page.section import Section, as_html
from leanmill.report.page.shell import document
from leanmill.report.units import count, duration, number, percent, size


MAX_RUNS = 12
"""More lines cannot be told apart."""
_NUM_COLOURS = 6
TOKENS = Axis("tokens", count, lambda x: f"{count(x)} tokens")
TIME = Axis("time", duration, duration)


@dataclass(frozen=True)
class Run:
    """One of the runs."""

    name: str
    """What tells it from the others."""
    data: RunData


def write_comparison(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write one page of several runs, finished or not; return its path.

    Args:
        run_dirs: Two to twelve folders.
        path: File to write.

    Raises:
        ConfigError: Too few or too many of them, or the same twice.
        RunError: The file cannot be written.
    """
    if len({folder.resolve() for folder in run_dirs}) != len(run_dirs):
        raise ConfigError("a run is named twice; name each folder once")
    if not 2 <= len(run_dirs) <= MAX_RUNS:
        raise ConfigError(f"{len(run_dirs)} runs cannot be compared on a page; name 2 to {MAX_RUNS} folders")
    write_atomically(path, render_comparison(_named(run_dirs)))
    return path


def _named(run_dirs: Sequence[Path]) -> list[Run]:
    """Runs of the same name go by their folders."""
    loaded = [(folder, load_run(folder)) for folder in run_dirs]
    names = [str(data.facts.get("name", folder.name)) for folder, data in loaded]
    return [
        Run(name if names.count(name) == 1 else str(folder), data)
        for name, (folder, data) in zip(names, loaded, strict=True)
    ]


def render_comparison(runs: Sequence[Run]) -> str:
    """Return the page. Every string of the runs is escaped."""
    over_tokens, over_time = _charts(runs, "tokens", TOKENS), _charts(runs, "elapsed", TIME)
    scales = {TOKENS.name: _scale(runs, "tokens"), TIME.name: _scale(runs, "elapsed")}
    charts = [*over_tokens, *over_time]
    sections = [
        Section(title="Figures", content=_figures(runs)),
        Section(title="Over tokens", content=_grid(over_tokens, scales)),
        Section(title="Over time", content=_grid(over_time, scales)),
        Section(title="What the recipes differ in", content=_recipes(runs)),
    ]
    title = f"{len(runs)} runs"
    named = " · ".join(escape(run.name) for run in runs)
    body = f"<header><h1>{title}</h1><p>{named}</p></header>\n<main>\n{''.join(map(as_html, sections))}\n</main>\n"
    values = {
        "charts": {chart.id: chart_values(chart, scales[chart.axis.name]) for chart in charts},
        "sites": [],
        "heats": {},
        "layers": [],
    }
    return document(title, body, values, version=__version__)


def _scale(runs: Sequence[Run], over: str) -> Scale:
    found = [float(record[over]) for run in runs for record in [*run.data.steps, *run.data.evals] if over in record]
    return Scale(0.0, max([*found, 1.0]))


def _grid(charts: Sequence[Chart], scales: dict[str, Scale]) -> str:
    drawn = "".join(draw(chart, scales[chart.axis.name]) for chart in charts)
    return f'<div class="grid of-{len(charts)}">{drawn}</div>'


def _charts(runs: Sequence[Run], over: str, axis: Axis) -> list[Chart]:
    """Losses of all runs over `over`; of each domain by itself where there are several."""
    domains = list(dict.fromkeys(name for run in runs for name in keys(run.data.evals, "domains")))
    named = [name for name in domains if name != "all"]
    shown = [*(["all"] if "all" in domains else []), *(named if len(named) > 1 or "all" not in domains else [])]
    charts = [
        Chart(
            id=f"{axis.name}-training", title="Training loss", unit="total, nats per token, moving average",
            series=_series(runs, lambda run: smooth(points(run.data.steps, "losses", "total", over=over))),
            format=number, axis=axis,
        )
    ]  # fmt: skip
    for index, name in enumerate(shown):
        values = _series(runs, lambda run, name=name: points(run.data.evals, "domains", name, "loss", over=over))  # type: ignore[misc]
        title = "Validation loss" if name == "all" else f"Validation loss, {name}"
        charts.append(
            Chart(
                id=f"{axis.name}-val-{index}", title=title, unit="nats per token", series=values, format=number,
                axis=axis,
            )
        )  # fmt: skip
    return charts


def _series(runs: Sequence[Run], values: Callable[[Run], list[tuple[float, float]]]) -> list[Series]:
    """One line a run, in the same colour in every chart; the seventh and later are dashed."""
    return [
        Series(
            label=run.name,
            points=values(run),
            color=index % _NUM_COLOURS + 1,
            dashed=index >= _NUM_COLOURS,
        )
        for index, run in enumerate(runs)
    ]


def _figures(runs: Sequence[Run]) -> str:
    rows = {name: [row(run.data) for run in runs] for name, row in _ROWS.items()}
    return _table(runs, {name: cells for name, cells in rows.items() if any(cell != "—" for cell in cells)})


def _last_score(run: RunData, field: str) -> str:
    value = run.evals[-1]["domains"].get("all", {}).get(field) if run.evals else None
    return "—" if value is None else f"{value:.4f}"


def _best_loss(run: RunData) -> str:
    found = [
        (loss, record["step"])
        for record in run.evals
        if (loss := record["domains"].get("all", {}).get("loss")) is not None  # one that was not finite is null
    ]
    return f"{min(found)[0]:.4f} at step {min(found)[1]:,}" if found else "—"


def _median(run: RunData, field: str, write: Callable[[float], str]) -> str:
    found = [record[field] for record in run.steps if record.get(field) is not None]
    return write(statistics.median(found)) if found else "—"


_ROWS: dict[str, Callable[[RunData], str]] = {
    "state": lambda run: run.status,
    "techniques": lambda run: " + ".join(run.facts.get("techniques", [])) or "none",
    "parameters": lambda run: count(run.facts["num_parameters"]) if "num_parameters" in run.facts else "—",
    "trainable": lambda run: count(run.facts["num_trainable"]) if "num_trainable" in run.facts else "—",
    "steps": lambda run: f"{run.steps[-1]['step']:,}" if run.steps else "—",
    "tokens": lambda run: count(run.steps[-1]["tokens"]) if run.steps else "—",
    "last validation loss": lambda run: _last_score(run, "loss"),
    "best validation loss": _best_loss,
    "bits per byte": lambda run: _last_score(run, "bits_per_byte"),
    "tokens a second, median": lambda run: _median(run, "tokens_per_second", count),
    "MFU, median": lambda run: _median(run, "mfu", percent),
    "peak memory, worst rank": lambda run: size(max((r.get("peak_memory_bytes") or 0 for r in run.steps), default=0)),
    "wall time": lambda run: duration(run.seconds),
}


def _recipes(runs: Sequence[Run]) -> str:
    """Keys whose values are not all alike."""
    loaded = [yaml.safe_load(run.data.recipe or "{}") for run in runs]
    rows = side_by_side([recipe if isinstance(recipe, dict) else {} for recipe in loaded])
    if not rows:
        return '<p class="empty">Nothing but where they lie.</p>'
    return _table(runs, rows)


def _table(runs: Sequence[Run], rows: dict[str, list[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, cells in rows.items()
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Comparison"><table><thead>'
        f'<tr><th scope="col"></th>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    )
