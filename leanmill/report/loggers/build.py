"""The observers of a run, in the order they are called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from leanmill.report.loggers.jsonl import JsonlLog
from leanmill.report.loggers.progress import Progress
from leanmill.report.loggers.report import ReportLog
from leanmill.report.loggers.sites import SiteStatistics
from leanmill.report.loggers.tensorboard import TensorBoardLog
from leanmill.report.loggers.wandb import WandbLog
from leanmill.report.observer import Observer


if TYPE_CHECKING:
    from leanmill.recipe.root import Recipe


def build_observers(recipe: Recipe, run_dir: Path, rank: int) -> list[Observer]:
    """Return this rank's observers.

    Rank 0 writes everything; the other ranks only take part in gathering weights for the site
    statistics. The report comes after the files it is built from, and progress last, so that its
    closing line names a report that is there.

    Raises:
        ConfigError: A logger was asked for whose package is missing.
    """
    statistics = SiteStatistics(run_dir)
    if rank != 0:
        return [statistics]
    observers: list[Observer] = [JsonlLog(run_dir), statistics]
    if recipe.log.tensorboard:
        observers.append(TensorBoardLog(run_dir, statistics))
    if recipe.log.wandb:
        observers.append(WandbLog(run_dir, statistics))
    if recipe.log.report:
        observers.append(ReportLog(run_dir))
    observers.append(Progress(run_dir))
    return observers
