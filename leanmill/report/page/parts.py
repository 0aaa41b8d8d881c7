"""The parts of a report that are not charts: header, figures, evaluations, facts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from html import escape
from typing import Any

from leanmill.core.redact import redact
from leanmill.report.page.data import RunData
from leanmill.report.page.figures import domains
from leanmill.report.units import count, duration, number, percent, plural, scientific, size


_SCORE_HEADINGS = (
    '<th scope="col" class="num first">loss</th><th scope="col" class="num">ppl</th>'
    '<th scope="col" class="num">bits/byte</th>'
)


def header(run: RunData, name: str) -> str:
    """Name, state, and the run in one line."""
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


def tiles(run: RunData) -> str:
    """The figures people ask for first."""
    found: list[tuple[str, str, str]] = []
    last_eval = run.evals[-1]["domains"].get("all") if run.evals else None
    if last_eval and last_eval.get("perplexity") is None:
        found.append(("Validation loss", number(last_eval["loss"]), f"{last_eval['num_tokens']:,} pairs of texts"))
    elif last_eval:
        share = (
            last_eval["bits_per_byte"] / last_eval["order0_bits_per_byte"] if last_eval["order0_bits_per_byte"] else 0
        )
        found.append(("Bits per byte", number(last_eval["bits_per_byte"]), f"{percent(share)} of order-0"))
        found.append(("Validation loss", number(last_eval["loss"]), f"perplexity {number(last_eval['perplexity'])}"))
    if run.steps:
        last = run.steps[-1]
        found.append(
            ("Tokens", count(last["tokens"]), f"{plural(last['step'], 'step')} of {run.facts.get('num_steps', 0):,}")
        )
        found.append(("Throughput", f"{count(_median(run, 'tokens_per_second'))}/s", "tokens, median"))
        if last.get("mfu") is not None:
            found.append(("MFU", percent(_median(run, "mfu")), "median"))
        peak = max(record.get("peak_memory_bytes") or 0 for record in run.steps)
        found.append(("Peak memory", size(peak), "worst rank"))
    if run.facts:
        sessions = plural(len(run.resumed_at) + 1, "session")
        found.append(("Wall time", duration(run.seconds), sessions))
    cells = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(value)}<small>{escape(detail)}</small></dd></div>"
        for label, value, detail in found
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def _median(run: RunData, field: str) -> float:
    return statistics.median([record[field] for record in run.steps if record.get(field) is not None] or [0.0])


def events(run: RunData) -> str:
    """What interrupted the run, with the marks that charts use for it."""
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


def evaluations(run: RunData) -> str:
    """The table of evaluations, newest first."""
    names = domains(run)
    if not run.evals:
        return '<p class="empty">No evaluation yet.</p>'
    best = min(run.evals, key=lambda record: record["domains"].get("all", {}).get("loss") or float("inf"))
    top = "".join(f'<th scope="colgroup" colspan="3">{escape(name)}</th>' for name in names)
    sub = _SCORE_HEADINGS * len(names)
    rows = "".join(_evaluation(record, names, record is best) for record in reversed(run.evals))
    return (
        '<div class="scroll evaluations" tabindex="0" role="region" aria-label="Evaluations"><table><thead>'
        f'<tr><th scope="col" rowspan="2">Step</th><th scope="col" rowspan="2" class="num">Tokens</th>{top}</tr>'
        f"<tr>{sub}</tr></thead><tbody>{rows}</tbody></table></div>"
        '<p class="note">★ lowest overall loss. Loss in nats per token, bits per byte of raw text.</p>'
    )


def _evaluation(record: dict[str, Any], names: Iterable[str], best: bool) -> str:
    cells = "".join(
        f'<td class="num{" first" if field == "loss" else ""}">{escape(_cell(record, name, field))}</td>'
        for name in names
        for field in ("loss", "perplexity", "bits_per_byte")
    )
    mark = ' <span title="lowest overall loss">★</span>' if best else ""
    return (
        f'<tr{" class=best" if best else ""}><th scope="row" class="num">{record["step"]:,}{mark}</th>'
        f'<td class="num">{count(record["tokens"])}</td>{cells}</tr>'
    )


def _cell(record: dict[str, Any], name: str, field: str) -> str:
    value = record["domains"].get(name, {}).get(field)
    if value is None:
        return "—"
    # One number of decimals down a column, so that digits stand under digits.
    return f"{value:.3f}" if field != "perplexity" else f"{value:,.2f}" if value < 1e6 else scientific(value)


def run_facts(run: RunData) -> str:
    """What was run, on what, with which versions."""
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
        if "cuda" not in facts.get("hardware", {}):
            lines.append("the peak of a rank is that of matrix products timed at the start of the run")
    else:
        lines.append("MFU is not shown: the peak FLOP/s of this device is not known")
    return lines


def _checkpoints(run: RunData) -> str:
    if not run.checkpoints:
        return ""
    stalled = sum(record.get("seconds_stalled", 0.0) for record in run.checkpoints)
    last = run.checkpoints[-1]
    written = f"{len(run.checkpoints)} written, last at step {last['step']:,}; the loop waited {stalled:.3g} s for them"
    return f"{written}; on disk, newest first: {', '.join(run.on_disk) or 'none'}"


def _lines(value: str | list[str]) -> str:
    return "<br>".join(escape(line) for line in ([value] if isinstance(value, str) else value))
