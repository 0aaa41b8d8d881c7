"""Rewrites the HTML report while the run goes on."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path

from leanmill.core.errors import RunError
from leanmill.report.observer import EvalRecord, Observer, RunInfo
from leanmill.report.page.html import write_report


class ReportLog(Observer):
    """Writes `run_dir/report.html` at each evaluation and at the end, from the files other observers wrote."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._started = False

    def on_start(self, info: RunInfo) -> None:
        self._started = True

    def on_eval(self, record: EvalRecord) -> None:
        write_report(self._run_dir)

    def on_end(self, status: str, message: str = "") -> None:
        if not self._started:
            return
        # A failed run's own error must reach the user, not that of a full disk here.
        with suppress(RunError) if status == "failed" else nullcontext():
            write_report(self._run_dir)
