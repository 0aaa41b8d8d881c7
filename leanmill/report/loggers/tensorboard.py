"""TensorBoard events."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanmill.core.errors import ConfigError
from leanmill.core.redact import redact
from leanmill.report.loggers.scalars import Scalars, of_evaluation
from leanmill.report.loggers.sites import SiteStatistics
from leanmill.report.observer import EvalRecord, Observer, RunInfo, StepRecord


if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLog(Observer):
    """Writes `run_dir/tensorboard`; a resume purges the steps it does again.

    Args:
        run_dir: The run's folder.
        statistics: Of weights, called before this at evaluations: its histograms are written too.
    """

    def __init__(self, run_dir: Path, statistics: SiteStatistics) -> None:
        self._folder = run_dir / "tensorboard"
        self._statistics = statistics
        self._scalars: Scalars | None = None
        self._writer: SummaryWriter | None = None

    def on_start(self, info: RunInfo) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard is on and the package tensorboard is missing; "
                "run `pip install tensorboard` or set log.tensorboard=false"
            ) from error
        purge = info.start_step + 1 if info.start_step else None
        self._scalars = Scalars(info)
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        from leanmill.recipe.io import resolved_yaml

        self._writer.add_text("recipe", f"```yaml\n{redact(resolved_yaml(info.recipe))}\n```", info.start_step)

    def on_step(self, record: StepRecord) -> None:
        assert self._scalars is not None, "on_start comes first"
        self._add(self._scalars.of_step(record), record.step)

    def on_eval(self, record: EvalRecord) -> None:
        self._add(of_evaluation(record), record.step)
        for site in self._statistics.sites:
            self._add_histogram(site, record.step)
        for index, sample in enumerate(record.samples):
            # Indented, so that Markdown leaves the text as it is.
            text = "".join(f"    {line}\n" for line in redact(sample.prompt + sample.text).splitlines())
            self._writer_of_run.add_text(f"samples/{index}", text, record.step)

    def on_end(self, status: str, message: str = "") -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, scalars: dict[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self._writer_of_run.add_scalar(tag, value, step)
        self._writer_of_run.flush()

    def _add_histogram(self, site: Mapping[str, Any], step: int) -> None:
        """Write a histogram that is counted already, of weights from `low` to `high` in equal bins."""
        counts, low, high = site["histogram"], site["low"], site["high"]
        width = (high - low) / len(counts)
        middles = [low + (index + 0.5) * width for index in range(len(counts))]
        self._writer_of_run.add_histogram_raw(
            f"weights/{site['name']}",
            min=low,
            max=high,
            num=sum(counts),
            sum=sum(n * middle for n, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(n * middle**2 for n, middle in zip(counts, middles, strict=True)),
            bucket_limits=[low + (index + 1) * width for index in range(len(counts))],
            bucket_counts=counts,
            global_step=step,
        )

    @property
    def _writer_of_run(self) -> SummaryWriter:
        assert self._writer is not None, "on_start comes first"
        return self._writer
