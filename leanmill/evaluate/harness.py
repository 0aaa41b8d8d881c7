"""Tasks of the LM Evaluation Harness, version 0.4, where it is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import torch

from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.evaluate.asking import Asked
from leanmill.evaluate.scores import Score
from leanmill.models.pretrained import one_line
from leanmill.recipe.evaluate import LmEval


_INSTALL = "type pip install 'leanmill[harness]'"


def check_installed() -> None:
    """Make sure that the harness is there, and of a version whose interface is known.

    Raises:
        ConfigError: It is not; the message says what to type.
    """
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"tasks: lm_eval needs the LM Evaluation Harness, which is not installed; {_INSTALL}, or remove the task"
        ) from None
    if not version.startswith("0.4."):
        raise ConfigError(f"tasks: lm_eval is known by its versions 0.4, and {version} is installed; {_INSTALL}")


def check_tasks(config: LmEval) -> None:
    """Make sure that the harness knows the tasks, before any model is loaded.

    Raises:
        ConfigError: It is not installed whole, or does not know one.
    """
    check_installed()
    manager = _manager(config)
    for name in config.tasks:
        if not manager.match_tasks([name]):
            raise ConfigError(f"tasks: lm_eval knows no task {name!r}; lm-eval ls tasks names those there are")


def ask(config: LmEval, seed: int, asked: Asked) -> list[Score]:
    """Run the tasks through the harness's own wrapper of transformers' models.

    Raises:
        ConfigError: Their data cannot be had.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    device = asked.ranks.device
    wrapped = HFLM(
        pretrained=asked.opened.model,
        tokenizer=asked.opened.tokenizer,
        batch_size=asked.rows_per_batch,
        device=str(device),
    )
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=asked.precision == "bf16"):
            results: Any = simple_evaluate(
                model=wrapped,
                tasks=config.tasks,
                num_fewshot=config.num_fewshot,
                limit=config.limit,
                task_manager=_manager(config),
                log_samples=False,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tasks: lm_eval cannot run {', '.join(config.tasks)}: {one_line(error)}; give tasks whose data is on this "
            f"machine, or run where the hub can be reached"
        ) from error
    return list(scores_of(results))


def scores_of(results: Mapping[str, Any]) -> Iterator[Score]:
    """Yield what the harness found: every metric of every task and group, but for errors of means."""
    better = results.get("higher_is_better", {})
    for task, metrics in results["results"].items():
        count = results.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            yield Score(
                task="lm_eval",
                group=task,
                metric=metric if chosen == "none" else f"{metric} ({chosen})",
                value=float(value),
                count=int(count),
                lower_is_better=better.get(task, {}).get(metric) is False,
            )


def _manager(config: LmEval) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"tasks: lm_eval is not installed whole ({one_line(error)}); {_INSTALL}") from error
    if config.include_path is None:
        return TaskManager()
    folder = expand_user(config.include_path)
    if not folder.is_dir():
        raise ConfigError(f"tasks: lm_eval.include_path={config.include_path!r} is no folder; give one with YAML files")
    return TaskManager(include_path=str(folder))
