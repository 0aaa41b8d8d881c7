"""TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from leanmill.core.errors import ConfigError
from leanmill.core.redact import redact
from leanmill.report.observer import EvalRecord, Observer, RunInfo, StepRecord


if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLog(Observer):
    """Writes `run_dir/tensorboard`; a resume purges the steps it does again."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "tensorboard"
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
        self._writer = SummaryWriter(str(self._folder), purge_step=purge)
        from leanmill.recipe.io import resolved_yaml

        self._writer.add_text("recipe", f"```yaml\n{redact(resolved_yaml(info.recipe))}\n```", info.start_step)

    def on_step(self, record: StepRecord) -> None:
        scalars = {f"loss/{name}": value for name, value in record.losses.items()} | {
            "train/grad_norm": record.grad_norm,
            "train/lr": record.lr,
            "train/skipped_steps": float(record.skipped_steps),
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/step_seconds": record.step_seconds,
            "memory/peak_gib": record.peak_memory_bytes / 2**30,
            **{f"rules/{name}": value for name, value in record.metrics.items()},
        }
        self._add(scalars, record.step)

    def on_eval(self, record: EvalRecord) -> None:
        for domain, score in record.domains.items():
            scalars = {
                f"eval_loss/{domain}": score.loss,
                f"eval_bits_per_byte/{domain}": score.bits_per_byte,
                f"eval_perplexity/{domain}": score.perplexity,
            }
            self._add(scalars, record.step)
        self._add({f"eval_probes/{name}": value for name, value in record.metrics.items()}, record.step)
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

    @property
    def _writer_of_run(self) -> SummaryWriter:
        assert self._writer is not None, "on_start comes first"
        return self._writer
