from __future__ import annotations

from pathlib import Path

from leanmill.report.loggers.build import build_observers
from leanmill.report.loggers.jsonl import JsonlLog
from leanmill.report.loggers.progress import Progress
from leanmill.report.loggers.report import ReportLog
from leanmill.report.loggers.sites import SiteStatistics
from leanmill.report.loggers.tensorboard import TensorBoardLog
from tests.trainer.fake_run import fake_recipe


def _kinds(tmp_path: Path, rank: int, **log) -> list[type]:
    return [type(observer) for observer in build_observers(fake_recipe(tmp_path, **log), tmp_path, rank)]


def test_rank_0_writes_in_an_order_where_each_finds_what_it_needs(tmp_path: Path) -> None:
    kinds = _kinds(tmp_path, 0, tensorboard=True)
    assert kinds == [JsonlLog, SiteStatistics, TensorBoardLog, ReportLog, Progress]


def test_what_is_switched_off_is_left_out(tmp_path: Path) -> None:
    assert _kinds(tmp_path, 0, tensorboard=False, report=False) == [JsonlLog, SiteStatistics, Progress]


def test_other_ranks_only_take_part_in_gathering(tmp_path: Path) -> None:
    assert _kinds(tmp_path, 1) == [SiteStatistics]
