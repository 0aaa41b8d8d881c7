"""Reading `metrics.jsonl`, one JSON object a line, also when a crash tore it. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


FILE_NAME = "metrics.jsonl"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return every record of a run in the order written; lines that a crash tore are left out."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return [record for line in file if (record := _parse(line)) is not None]


def without_superseded(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what a resume did again.

    A `start` at step s drops the earlier `step`, `eval` and `checkpoint` records after step s.
    """
    kept: list[dict[str, Any]] = []
    for record in records:
        if record["kind"] == "start":
            start_step = record.get("start_step", 0)
            kept = [r for r in kept if r["kind"] in ("start", "end") or r.get("step", 0) <= start_step]
        kept.append(record)
    return kept


def repair(path: Path) -> None:
    """Cut a last line that a crash left without its end, so that the next line starts fresh."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep = end
        while keep > 0:
            start = max(0, keep - 65_536)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None
