from __future__ import annotations

from pathlib import Path

import pytest

from leanmill.core.errors import RunError
from leanmill.report.loggers import report
from leanmill.report.loggers.jsonl import JsonlLog
from leanmill.report.loggers.report import ReportLog
from tests.trainer.fake_run import fake_eval, fake_info, fake_recipe, play


def test_report_is_there_after_the_first_evaluation_and_complete_at_the_end(tmp_path: Path) -> None:
    observers = [JsonlLog(tmp_path), ReportLog(tmp_path)]
    info = fake_info(fake_recipe(tmp_path), tmp_path)
    play(observers, info, until=50, status=None)
    assert 'status running">running' in (tmp_path / "report.html").read_text()
    for observer in observers:
        observer.on_end("finished")
    assert 'status finished">finished' in (tmp_path / "report.html").read_text()


def test_a_run_that_never_started_writes_nothing(tmp_path: Path) -> None:
    ReportLog(tmp_path).on_end("failed", "no such model")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_run_keeps_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(run_dir: Path) -> Path:
        raise RunError("cannot write")

    monkeypatch.setattr(report, "write_report", fail)
    observer = ReportLog(tmp_path)
    observer.on_start(fake_info(fake_recipe(tmp_path), tmp_path))
    observer.on_end("failed", "the disk is full")
    with pytest.raises(RunError):
        observer.on_eval(fake_eval(1))
