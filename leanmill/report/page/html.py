"""The HTML report: one file that needs nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path

from leanmill.core.errors import ConfigError
from leanmill.core.redact import redact
from leanmill.report.files import write_atomically
from leanmill.report.page.charts import chart_values, draw
from leanmill.report.page.comparison_view import comparison_section
from leanmill.report.page.data import RunData, load_run
from leanmill.report.page.experts_view import experts_section
from leanmill.report.page.figures import Group, groups
from leanmill.report.page.heat import heat_values
from leanmill.report.page.layers_view import layers_section
from leanmill.report.page.parts import evaluations, events, header, run_facts, tiles
from leanmill.report.page.samples_view import samples_section
from leanmill.report.page.scale import Scale
from leanmill.report.page.section import Section, as_html
from leanmill.report.page.shell import document
from leanmill.report.page.sites_view import draw_sites, site_values
from leanmill.report.page.study_view import study_section
from leanmill.report.page.weights_view import weights_section


FILE_NAME = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from the files that a run and studies of it left there; return its path.

    Whatever is missing is left out, so it can be written at any time and again after a resume.

    Raises:
        ConfigError: There is no such folder.
        RunError: The file cannot be written.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is no folder; give the run_dir of a run, e.g. runs/quickstart")
    path = run_dir / FILE_NAME
    write_atomically(path, render(load_run(run_dir)))
    return path


def render(run: RunData) -> str:
    """Return the page. Every string of the run is escaped."""
    name = str(run.facts.get("name", "run"))
    x_scale = _x_scale(run)
    sections = _sections(run, x_scale)
    charts = [chart for section in sections for chart in section.charts]
    heats = [heat for section in sections for heat in section.heats]
    values = {
        "charts": {chart.id: chart_values(chart, x_scale) for chart in charts},
        "sites": site_values(run.sites),
        "heats": {heat.id: heat_values(heat) for heat in heats},
        "layers": [{h.id: heat_values(h) for h in one} for section in sections for one in section.by_layer],
    }
    body = (
        f"{header(run, name)}\n<main>\n{tiles(run)}\n{events(run)}\n"
        f"{''.join(map(as_html, sections))}{_recipe(run)}\n</main>\n"
    )
    return document(name, body, values, version=_version(run))


def _x_scale(run: RunData) -> Scale:
    """All charts share one axis of steps, so that one cursor serves them all."""
    last = max([record["step"] for record in [*run.steps, *run.evals]], default=1)
    return Scale(0.0, float(max(last, 1)))


def _sections(run: RunData, x_scale: Scale) -> list[Section]:
    """All sections in the order of the page."""
    found = [
        *(_grid(group, x_scale) for group in groups(run)),
        layers_section(run),
        experts_section(run),
        study_section(run, x_scale),
        Section(title="Weights", content=draw_sites(run.sites)),
        weights_section(run),
        Section(title="Evaluations", content=evaluations(run)),
        comparison_section(run),
        samples_section(run),
        Section(title="Run", content=run_facts(run)),
    ]
    return [section for section in found if section is not None]


def _grid(group: Group, x_scale: Scale) -> Section:
    drawn = "".join(draw(chart, x_scale) for chart in group.charts)
    content = f'<div class="grid of-{len(group.charts)}">{drawn}</div>'
    return Section(title=group.title, content=content, charts=group.charts)


def _recipe(run: RunData) -> str:
    if not run.recipe:
        return ""
    return f"<details><summary>Resolved recipe</summary><pre>{escape(redact(run.recipe))}</pre></details>"


def _version(run: RunData) -> str:
    return str(run.facts.get("versions", {}).get("leanmill", ""))
