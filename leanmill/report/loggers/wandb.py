"""Weights & Biases; offline where no key is configured."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.redact import redact_tree
from leanmill.report.loggers.scalars import Scalars, of_evaluation
from leanmill.report.loggers.sites import SiteStatistics
from leanmill.report.observer import EvalRecord, Observer, RunInfo, StepRecord


class WandbLog(Observer):
    """Logs to a W&B run in `run_dir/wandb`; a resumed training continues the same W&B run.

    The key comes from where `wandb login` puts it, or from wandb's own environment variables.
    Without one the run is kept offline, a folder each start under one id, for `wandb sync` later. Command lines,
    console output, source code and git state are not sent: any of them can hold a credential.

    Args:
        run_dir: The run's folder.
        statistics: Of weights, called before this at evaluations: its histograms are logged too.
    """

    def __init__(self, run_dir: Path, statistics: SiteStatistics) -> None:
        # Said before the model is built, not after minutes of loading.
        if find_spec("wandb") is None:
            raise ConfigError(
                "log.wandb is on and the package wandb is missing; run `pip install wandb` or set log.wandb=false"
            )
        self._run_dir = run_dir
        self._statistics = statistics
        self._scalars: Scalars | None = None
        self._run: Any = None

    def on_start(self, info: RunInfo) -> None:
        import wandb

        from leanmill.report.loggers.facts import run_facts

        self._scalars = Scalars(info)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        has_key = wandb.login(prompt=False)
        self._run = wandb.init(
            project=info.recipe.log.wandb_project,
            name=info.recipe.name,
            id=self._run_id(),
            resume="allow",  # offline too: what is synced later is then one run
            dir=str(self._run_dir),
            # None leaves the choice to wandb's own settings (WANDB_MODE=offline, disabled).
            mode=None if has_key else "offline",
            config=redact_tree({"recipe": info.recipe.model_dump(mode="json"), "run": run_facts(info)}),
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                x_save_requirements=False,
                silent=True,
            ),
        )
        # Our own step: wandb's refuses to go back, which a resume from an older checkpoint does.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_step(self, record: StepRecord) -> None:
        assert self._scalars is not None, "on_start comes first"
        self._log(record.step, self._scalars.of_step(record))

    def on_eval(self, record: EvalRecord) -> None:
        values: dict[str, Any] = {**of_evaluation(record)}
        for site in self._statistics.sites:
            values[f"weights/{site['name']}"] = _histogram(site)
        if record.samples:
            values["samples"] = _table(record)
        self._log(record.step, values)

    def on_end(self, status: str, message: str = "") -> None:
        if self._run is None:
            return
        import wandb

        exit_code = 1 if status == "failed" else 0
        self._run.finish(exit_code=exit_code)
        # `finish` returns before wandb's own process has written its file, and a launcher that leaves
        # through os._exit would not wait for it either.
        wandb.teardown(exit_code=exit_code)
        self._run = None

    def _log(self, step: int, values: dict[str, Any]) -> None:
        assert self._run is not None, "on_start comes first"
        self._run.log({"step": step, **values})

    def _run_id(self) -> str:
        """The id kept in the run's folder, so that a resume finds its W&B run; new the first time."""
        path = self._run_dir / "wandb" / "run_id"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        return path.read_text(encoding="utf-8").strip()


def _histogram(site: Mapping[str, Any]) -> Any:
    """A histogram that is counted already, of weights from `low` to `high` in equal bins."""
    import numpy
    import wandb

    counts = numpy.asarray(site["histogram"])
    return wandb.Histogram(np_histogram=(counts, numpy.linspace(site["low"], site["high"], len(counts) + 1)))


def _table(record: EvalRecord) -> Any:
    import wandb

    rows = [[record.step, *redact_tree([sample.prompt, sample.text])] for sample in record.samples]
    return wandb.Table(columns=["step", "prompt", "text"], data=rows)
