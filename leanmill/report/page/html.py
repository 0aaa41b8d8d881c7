"""The HTML report: one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.redact import redact, redact_tree
from leanmill.report.files import write_atomically
from leanmill.report.page.charts import chart_values, draw
from leanmill.report.page.data import RunData, load_run
from leanmill.report.page.figures import Group, groups
from leanmill.report.page.parts import evaluations, events, header, run_facts, tiles
from leanmill.report.page.scale import Scale
from leanmill.report.page.sites_view import draw_sites, site_values


FILE_NAME = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from `recipe.yaml`, `metrics.jsonl` and `sites.json`; return its path.

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
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    script = resources.files(__package__).joinpath("page.js").read_text(encoding="utf-8")
    name = str(run.facts.get("name", "run"))
    x_scale = _x_scale(run)
    chart_groups = groups(run)
    values = {
        "charts": {chart.id: chart_values(chart, x_scale) for group in chart_groups for chart in group.charts},
        "sites": site_values(run.sites),
    }
    sections = [
        *(_section(group.title, _grid(group, x_scale)) for group in chart_groups),
        _section("Weights", draw_sites(run.sites)),
        _section("Evaluations", evaluations(run)),
        _section("Run", run_facts(run)),
        _recipe(run),
    ]
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    # The policy lets only this script run and nothing be fetched, whatever a run's strings hold.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(name)} · Leanmill</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{header(run, name)}\n<main>\n{tiles(run)}\n{events(run)}\n{''.join(sections)}\n</main>\n"
        f"<footer>Written by Leanmill {escape(_version(run))} on {written}.</footer>\n"
        f'<script type="application/json" id="values">{_json(redact_tree(values))}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _x_scale(run: RunData) -> Scale:
    """All charts share one axis of steps, so that one cursor serves them all."""
    last = max([record["step"] for record in [*run.steps, *run.evals]], default=1)
    return Scale(0.0, float(max(last, 1)))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n"


def _grid(group: Group, x_scale: Scale) -> str:
    return f'<div class="grid of-{len(group.charts)}">{"".join(draw(chart, x_scale) for chart in group.charts)}</div>'


def _recipe(run: RunData) -> str:
    if not run.recipe:
        return ""
    return f"<details><summary>Resolved recipe</summary><pre>{escape(redact(run.recipe))}</pre></details>"


def _version(run: RunData) -> str:
    return str(run.facts.get("versions", {}).get("leanmill", ""))


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
