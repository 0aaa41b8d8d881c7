"""The HTML report: one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import statistics
import time
from collections.abc import Iterable
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from leanmill.trainer.loggers.redact import redact, redact_tree
from leanmill.trainer.report.charts import chart_values, draw
from leanmill.trainer.report.data import RunData, load_run
from leanmill.trainer.report.figures import domains, groups
from leanmill.trainer.report.files import write_atomically
from leanmill.trainer.report.scale import Scale
from leanmill.trainer.report.sites_view import draw_sites, site_values
from leanmill.trainer.report.units import count, duration, number, percent, plural, size


FILE_NAME = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from `recipe.yaml`, `metrics.jsonl` and `sites.json`; return its path.

    Whatever is missing is left out, so it can be written at any time and again after a resume.

    Raises:
        RunError: The file cannot be written.
    """
    path = Path(run_dir) / FILE_NAME
    write_atomically(path, render(load_run(Path(run_dir))))
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
        "tokensPerStep": run.facts.get("tokens_per_step"),
    }
    sections = [
        *(
            _section(group.title, f'<div class="grid">{"".join(draw(chart, x_scale) for chart in group.charts)}</div>')
            for group in chart_groups
        ),
        _section("Weights", draw_sites(run.sites)),
        _section("Evaluations", _evaluations(run)),
        _section("Run", _facts(run)),
        _recipe(run),
    ]
    # The policy lets only this script run and nothing be fetched, whatever a run's strings hold.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(name)} · Leanmill</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{_header(run, name)}\n<main>\n{_tiles(run)}\n{_events(run)}\n{''.join(sections)}\n</main>\n"
        f"<footer>Written by Leanmill {escape(_version(run))} on {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}.</footer>\n"
        f'<script type="application/json" id="values">{_json(redact_tree(values))}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _x_scale(run: RunData) -> Scale:
    """All charts share one axis of steps, so that one cursor serves them all."""
    last = max([record["step"] for record in [*run.steps, *run.evals]], default=1)
    return Scale(0.0, float(max(last, 1)))


def _header(run: RunData, name: str) -> str:
    facts = run.facts
    techniques = " + ".join(facts.get("techniques", [])) or "no techniques"
    parts = [facts.get("model"), techniques, _engine(facts)] if facts else ["no records yet"]
    line = " · ".join(escape(str(part)) for part in parts if part)
    message = f'<p class="message">{escape(redact(run.message))}</p>' if run.message else ""
    return (
        f'<header><h1>{escape(name)} <span class="status {escape(run.status)}">{escape(run.status)}</span></h1>'
        f"<p>{line}</p>{message}</header>"
    )


def _engine(facts: dict[str, Any]) -> str:
    ranks = plural(facts.get("world_size", 1), "rank")
    return f"{facts.get('engine', '')} on {ranks} of {facts.get('hardware', {}).get('device', 'unknown')}"


def _tiles(run: RunData) -> str:
    tiles: list[tuple[str, str, str]] = []
    last_eval = run.evals[-1]["domains"].get("all") if run.evals else None
    if last_eval:
        share = (
            last_eval["bits_per_byte"] / last_eval["order0_bits_per_byte"] if last_eval["order0_bits_per_byte"] else 0
        )
        tiles.append(("Bits per byte", number(last_eval["bits_per_byte"]), f"{percent(share)} of order-0"))
        tiles.append(("Validation loss", number(last_eval["loss"]), f"perplexity {number(last_eval['perplexity'])}"))
    if run.steps:
        last = run.steps[-1]
        tiles.append(
            ("Tokens", count(last["tokens"]), f"{plural(last['step'], 'step')} of {run.facts.get('num_steps', 0):,}")
        )
        tiles.append(("Throughput", f"{count(_median(run, 'tokens_per_second'))}/s", "tokens, median"))
        if last.get("mfu") is not None:
            tiles.append(("MFU", percent(_median(run, "mfu")), "median"))
        peak = max(record.get("peak_memory_bytes") or 0 for record in run.steps)
        tiles.append(("Peak memory", size(peak), "largest of all ranks"))
    if run.facts:
        sessions = plural(len(run.resumed_at) + 1, "session")
        tiles.append(("Wall time", duration(run.seconds), sessions))
    cells = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(detail)}</small></dd></div>"
        for label, value, detail in tiles
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def _median(run: RunData, field: str) -> float:
    return statistics.median([record[field] for record in run.steps if record.get(field) is not None] or [0.0])


def _events(run: RunData) -> str:
    items = []
    if run.resumed_at:
        steps = ", ".join(f"{step:,}" for step in run.resumed_at)
        items.append(f'<li><i class="event-key resume" aria-hidden="true"></i>Resumed at step {steps}</li>')
    if run.skipped_at:
        total = run.steps[-1].get("skipped_steps", 0)
        shown = ", ".join(f"{step:,}" for step in run.skipped_at[:12]) + (" …" if len(run.skipped_at) > 12 else "")
        items.append(
            f'<li><i class="event-key skip" aria-hidden="true"></i>{plural(total, "optimizer step")} skipped for '
            f"non-finite values, seen at step {shown}</li>"
        )
    return f'<ul class="events">{"".join(items)}</ul>' if items else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>\n"


def _evaluations(run: RunData) -> str:
    names = domains(run)
    if not run.evals:
        return '<p class="empty">No evaluation yet.</p>'
    best = min(run.evals, key=lambda record: record["domains"].get("all", {}).get("loss") or float("inf"))
    top = "".join(f'<th scope="colgroup" colspan="3">{escape(name)}</th>' for name in names)
    sub = '<th scope="col" class="num first">loss</th><th scope="col" class="num">ppl</th><th scope="col" class="num">bits/byte</th>'
    rows = "".join(_evaluation(record, names, record is best) for record in reversed(run.evals))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Evaluations"><table><thead>'
        f'<tr><th scope="col" rowspan="2">Step</th><th scope="col" rowspan="2" class="num">Tokens</th>{top}</tr>'
        f"<tr>{sub * len(names)}</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="note">Newest first. Lowest overall loss marked ★. Loss in nats per token, bits per byte of raw text.</p>'
    )


def _evaluation(record: dict[str, Any], names: Iterable[str], best: bool) -> str:
    cells = "".join(
        f'<td class="num{" first" if field == "loss" else ""}">{escape(_cell(record["domains"].get(name, {}).get(field)))}</td>'
        for name in names
        for field in ("loss", "perplexity", "bits_per_byte")
    )
    mark = ' <span title="lowest overall loss">★</span>' if best else ""
    return (
        f'<tr{" class=best" if best else ""}><th scope="row" class="num">{record["step"]:,}{mark}</th>'
        f'<td class="num">{count(record["tokens"])}</td>{cells}</tr>'
    )


def _cell(value: float | None) -> str:
    return "—" if value is None else number(value)


def _facts(run: RunData) -> str:
    facts = run.facts
    if not facts:
        return '<p class="empty">The run has not started.</p>'
    hardware = facts.get("hardware", {})
    rows = {
        "Engine": _engine(facts),
        "Why and how": facts.get("notes", []),
        "Hardware": [", ".join(_hardware(hardware))],
        "Parameters": f"{facts['num_parameters']:,}, of which {facts['num_trainable']:,} trainable",
        "Precision": facts.get("precision", ""),
        "Seed": str(facts.get("seed", "")),
        "Tokens per step": f"{facts.get('tokens_per_step', 0):,}",
        "FLOPs": _flops(facts),
        "Checkpoints": _checkpoints(run),
        "Versions": ", ".join(f"{package} {version}" for package, version in facts.get("versions", {}).items()),
    }
    cells = "".join(f"<dt>{escape(term)}</dt><dd>{_lines(value)}</dd>" for term, value in rows.items() if value)
    return f'<dl class="facts">{cells}</dl>'


def _hardware(hardware: dict[str, Any]) -> list[str]:
    return [
        size(v) if key == "memory_bytes" else f"CUDA {v}" if key == "cuda" else str(v) for key, v in hardware.items()
    ]


def _flops(facts: dict[str, Any]) -> list[str]:
    lines = [f"{facts.get('flops_per_token', 0):.4g} for one token, forward and backward, active parameters only"]
    peak = facts.get("peak_flops_per_second")
    if peak:
        lines.append(
            f"MFU = tokens/s × FLOPs per token / ({facts['world_size']} × {peak / 1e12:.4g} TFLOP/s), "
            f"recomputation not counted"
        )
    else:
        lines.append("MFU is not shown: the peak FLOP/s of this device is not known")
    return lines


def _checkpoints(run: RunData) -> str:
    if not run.checkpoints:
        return ""
    stalled = sum(record.get("seconds_stalled", 0.0) for record in run.checkpoints)
    last = run.checkpoints[-1]
    return f"{len(run.checkpoints)} written, last at step {last['step']:,}; the loop waited {stalled:.3g} s for them"


def _lines(value: str | list[str]) -> str:
    return "<br>".join(escape(line) for line in ([value] if isinstance(value, str) else value))


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
