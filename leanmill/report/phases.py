"""What became of each phase of a run, in a table: its model's size and what held-out text cost it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leanmill.report.records import FILE_NAME, read_records, without_superseded


_HEAD = ("phase", "parameters", "held-out loss, nats", "bits/byte", "tokens")


def table_of_phases(folders: Sequence[Path]) -> list[str]:
    """Return a table of the phases that trained, a line each; none where fewer than two were evaluated.

    The loss is that of the end, behind what it was before the first step where that was measured
    (`eval.at_start: true`).

    Args:
        folders: Of the phases, in order.
    """
    rows = [row for folder in folders if (row := _row(folder)) is not None]
    if len(rows) < 2:
        return []
    widths = [max(len(row[column]) for row in (_HEAD, *rows)) for column in range(len(_HEAD))]
    return ["  ".join(_aligned(row, widths)).rstrip() for row in (_HEAD, *rows)]


def _row(folder: Path) -> tuple[str, ...] | None:
    if not (folder / FILE_NAME).is_file():
        return None
    records = without_superseded(read_records(folder / FILE_NAME))
    started = [record for record in records if record["kind"] == "start"]
    scored = [record for record in records if record["kind"] == "eval" and "all" in record["domains"]]
    if not started or not scored:
        return None
    first, last = scored[0]["domains"]["all"], scored[-1]["domains"]["all"]
    before = f"{first['loss']:.3f} -> " if scored[0]["step"] == 0 and len(scored) > 1 else ""
    return (
        folder.name,
        f"{started[-1]['num_parameters']:,}",
        f"{before}{last['loss']:.3f}",
        _number(last.get("bits_per_byte")),
        f"{scored[-1]['tokens']:,}",
    )


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "-"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    name, *numbers = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
    return [name.strip().ljust(widths[0]), *numbers]
