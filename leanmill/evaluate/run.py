"""Models through tasks, one model in memory at a time."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_eval_data
from leanmill.evaluate import completions, harness, retrieval, speculative
from leanmill.evaluate.asking import Asked
from leanmill.evaluate.models import open_for_evaluation
from leanmill.evaluate.scores import Difference, Score, as_json, beyond, differences, number
from leanmill.parallel.launch import finish, init_processes
from leanmill.parallel.precision import resolve_precision
from leanmill.recipe.evaluate import BitsPerByte, Completions, EvaluateRecipe, LmEval, Retrieval, Speculative
from leanmill.recipe.sections import ClusterConfig


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Scores of several models, and what they lost against the first."""

    scores: Mapping[Path, Sequence[Score]]
    """By model; the dense one, where there is one, is the first."""
    dense: Path | None
    bound: float | None

    def lost(self, model: Path) -> list[Difference]:
        """What a model lost against the dense one; nothing where there is none."""
        return [] if self.dense is None else differences(self.scores[model], self.scores[self.dense])

    def beyond_bound(self) -> dict[Path, list[Difference]]:
        """The groups of each model in which it lost more than allowed."""
        if self.bound is None:
            return {}
        found = {model: beyond(self.lost(model), self.bound) for model in self.scores if model != self.dense}
        return {model: groups for model, groups in found.items() if groups}

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "dense": None if self.dense is None else str(self.dense),
            "bound": self.bound,
            "models": {str(model): as_json(scores) for model, scores in self.scores.items()},
            "lost": {
                str(model): [_difference(one) for one in self.lost(model)]
                for model in self.scores
                if self.dense is not None and model != self.dense
            },
            "beyond_bound": {
                str(model): [list(one.score.key) for one in groups] for model, groups in self.beyond_bound().items()
            },
        }


def _difference(one: Difference) -> dict[str, Any]:
    task, group, metric = one.score.key
    return {
        "task": task,
        "group": group,
        "metric": metric,
        "lost": number(one.loss),
        "standard_error": number(one.standard_error),
        "changed": one.changed,
    }


def evaluate_models(
    recipe: EvaluateRecipe, models: Sequence[Path], *, dense: Path | None = None, bound: float | None = None
) -> Compared:
    """Put models to the tasks of a recipe, in one process.

    Args:
        recipe: The tasks.
        models: Checkpoints and folders, see `open_for_evaluation`.
        dense: What they are held against; it is put to the tasks first.
        bound: What a model may lose in any group, see `Difference.loss`.

    Raises:
        ConfigError: A task or a model does not fit; tasks are looked at before a model is loaded.
        RunError: A model is damaged.
    """
    if bound is not None and dense is None:
        raise ConfigError("--bound is held against a dense model; name it with --dense")
    paths = list(dict.fromkeys([*([] if dense is None else [dense]), *models]))
    if not paths:
        raise ConfigError("no model is named; type --model DIR, and --dense DIR for what it is held against")
    items = {
        index: completions.read_items(task) for index, task in enumerate(recipe.tasks) if isinstance(task, Completions)
    }
    for task in recipe.tasks:
        if isinstance(task, LmEval):
            harness.check_tasks(task)
    ranks = init_processes(recipe.device, ClusterConfig())
    try:
        if ranks.world_size > 1:
            raise ConfigError(
                f"an evaluation is one process, {ranks.world_size} were started; type `leanmill evaluate ...`"
            )
        precision = resolve_precision(recipe.precision, ranks.device.type)
        scores: dict[Path, list[Score]] = {}
        for path in paths:
            log.info("evaluating %s", path)
            asked = Asked(
                opened=open_for_evaluation(path, ranks.device, weights_gib=recipe.weights_gib),
                ranks=ranks,
                precision=precision,
                rows_per_batch=recipe.rows_per_batch,
            )
            scores[path] = _ask(recipe, asked, items)
            del asked
            gc.collect()  # a model is a circle of modules and hooks, and the next one needs its memory
    finally:
        finish()
    return Compared(scores=scores, dense=dense, bound=bound)


def _ask(recipe: EvaluateRecipe, asked: Asked, items: Mapping[int, Sequence[completions.Item]]) -> list[Score]:
    found: list[Score] = []
    for index, task in enumerate(recipe.tasks):
        if isinstance(task, BitsPerByte):
            found += _bits_per_byte(task, recipe, asked)
        elif isinstance(task, Completions):
            found += completions.ask(task, items[index], asked)
        elif isinstance(task, Retrieval):
            found += retrieval.ask(task, recipe.data, recipe.seed, asked)
        elif isinstance(task, Speculative):
            found += speculative.ask(task, recipe.data, recipe.seed, asked)
        else:
            found += harness.ask(task, recipe.seed, asked)
    return found


def _bits_per_byte(task: BitsPerByte, recipe: EvaluateRecipe, asked: Asked) -> list[Score]:
    longest = asked.opened.longest
    if longest is not None and recipe.data.sequence_length > longest:
        raise ConfigError(
            f"data.sequence_length={recipe.data.sequence_length} is more than the {longest} positions of a model; type "
            f"data.sequence_length={longest}"
        )
    domains = build_eval_data(recipe.data, asked.opened.tokenizer, tokens_per_domain=task.tokens_per_domain)
    if not domains:
        raise ConfigError("bits_per_byte scores held-out text, and data.source holds none out; set validation_fraction")
    scores = asked.score_text(domains).scores
    chosen = {name: one for name, one in scores.items() if name != "all" or len(domains) > 1}
    return [
        Score(
            task="bits_per_byte",
            group=name,
            metric="bits/byte",
            value=one.bits_per_byte,
            count=one.num_tokens,
            lower_is_better=True,
        )
        for name, one in chosen.items()
        if one.bits_per_byte is not None
    ]
