"""Reads what a run wrote, in the shape the report shows it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanmill.checkpoint.finding import complete_checkpoints
from leanmill.report.records import FILE_NAME, read_records, without_superseded


Record = dict[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything the report is built from."""

    facts: Record
    """The newest `start` record; empty before the first."""
    steps: Sequence[Record]
    evals: Sequence[Record]
    checkpoints: Sequence[Record]
    on_disk: Sequence[str]
    """Names of the complete checkpoints that are there now, newest first: the order in which a resume tries them."""
    status: str
    """`finished`, `stopped`, `failed` or `running`; the last also after a kill, which writes nothing."""
    message: str
    resumed_at: Sequence[int]
    """Steps at which a session took over from an earlier one."""
    skipped_at: Sequence[int]
    """Steps of the records in which the number of skipped steps grew."""
    seconds: float
    """Wall time of all sessions together, work done again included."""
    sites: Record
    recipe: str
    study: Record
    """Of a mixture's routing, see `study_view.py`; empty without one."""
    comparison: Record
    """With other models, see `comparison_view.py`; empty without one."""


def load_run(run_dir: Path) -> RunData:
    """Read what a run and studies of it left: `metrics.jsonl`, `sites.json` and others; what is missing is empty."""
    everything = with_elapsed(read_records(run_dir / FILE_NAME))
    records = without_superseded(everything)
    starts = _of_kind(records, "start")
    steps = _of_kind(records, "step")
    last = everything[-1] if everything else {}
    ended = last if last.get("kind") == "end" else {}
    return RunData(
        facts=starts[-1] if starts else {},
        steps=steps,
        evals=_of_kind(records, "eval"),
        checkpoints=_of_kind(records, "checkpoint"),
        on_disk=[path.name for path, _ in complete_checkpoints(run_dir / "checkpoints")],
        status=ended.get("status", "running"),
        message=ended.get("message", ""),
        resumed_at=[start["start_step"] for start in starts[1:] if "start_step" in start],
        skipped_at=_skips(steps),
        seconds=_seconds(everything),
        sites=_read_json(run_dir / "sites.json"),
        recipe=_read_text(run_dir / "recipe.yaml"),
        study=_read_json(run_dir / "routing.json"),
        comparison=_read_json(run_dir / "evaluation.json"),
    )


def points(records: Sequence[Record], *path: str, over: str = "step") -> Points:
    """Pairs of the field `over` and of the one at `path`, where it is there and finite."""
    found: Points = []
    for record in records:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            found.append((float(record[over]), float(value)))
    return found


def keys(records: Sequence[Record], field: str) -> list[str]:
    """Keys of a mapping field over all records, in the order first seen."""
    return list(dict.fromkeys(key for record in records for key in record.get(field, {})))


def _of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _skips(steps: Sequence[Record]) -> list[int]:
    before, found = 0, []
    for record in steps:
        skipped = record.get("skipped_steps", 0)
        if skipped > before:
            found.append(record["step"])
        before = skipped
    return found


def with_elapsed(everything: Sequence[Record]) -> list[Record]:
    """Give each record `elapsed`: seconds of all sessions up to it, without the pauses between them."""
    before, started, last, found = 0.0, None, 0.0, []
    for record in everything:
        now = record.get("time")
        if record["kind"] == "start":
            before, started = before + last, now
        last = now - started if now is not None and started is not None else last
        found.append({**record, "elapsed": before + last})
    return found


def _seconds(everything: Sequence[Record]) -> float:
    total, started = 0.0, None
    for index, record in enumerate(everything):
        if record["kind"] == "start":
            started = record.get("time")
        ends_session = index + 1 == len(everything) or everything[index + 1]["kind"] == "start"
        if started is not None and ends_session:
            total += record.get("time", started) - started
    return total


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _read_json(path: Path) -> Record:
    try:
        value = json.loads(_read_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
