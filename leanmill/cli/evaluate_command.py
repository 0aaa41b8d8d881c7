"""`leanmill evaluate`: models on tasks beside one another, and what compression cost."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from leanmill.evaluate.run import Compared
    from leanmill.evaluate.scores import Difference, Score
    from leanmill.recipe.evaluate import EvaluateRecipe


def run(args: argparse.Namespace) -> int:
    """Print a table of all models; exit with 1 where one lost more than the bound."""
    from leanmill.cli.checkpoints import resolve_model
    from leanmill.core.errors import EXIT_RUN, ConfigError

    recipe = _recipe(args.recipe, args.overrides)
    dense = None if args.dense is None else resolve_model(args.dense)
    models = [resolve_model(given) for given in args.models]
    if args.out is not None and not Path(args.out).absolute().parent.is_dir():
        raise ConfigError(f"--out {args.out}: the folder of this file does not exist; make it, or name another")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("leanmill").setLevel(logging.INFO)
    from leanmill.evaluate.run import evaluate_models

    compared = evaluate_models(recipe, models, dense=dense, bound=args.bound)
    text = json.dumps(compared.as_json(), indent=2)
    print(text if args.json else "\n".join(_table(compared)))
    if args.out is not None:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    return EXIT_RUN if compared.beyond_bound() else 0


def _recipe(path: str | None, overrides: Sequence[str]) -> EvaluateRecipe:
    from leanmill.recipe.evaluate import EvaluateRecipe
    from leanmill.recipe.io import load_recipe, override_recipe, validate_recipe
    from leanmill.recipe.yaml_source import Lines

    if path is not None:
        return load_recipe(path, overrides, root=EvaluateRecipe)
    raw: dict[str, object] = {}
    lines: Lines = {}
    override_recipe(raw, overrides, lines)
    return validate_recipe(raw, source="the recipe of an evaluation", lines=lines, root=EvaluateRecipe)


def _table(compared: Compared) -> Iterator[str]:
    """A line a group: every model, and beside it what it lost against the dense one."""
    names = {
        f"model {number}": model for number, model in enumerate(compared.scores, 1 if compared.dense is None else 0)
    }
    if compared.dense is not None:
        names = {"dense" if model == compared.dense else name: model for name, model in names.items()}
    for name, model in names.items():
        yield f"{name}: {model}"
    lost = {model: {one.score.key: one for one in compared.lost(model)} for model in compared.scores}
    heads = "".join(
        f" {name:>10}" + ("" if compared.dense in (None, model) else f" {'lost':>16}") for name, model in names.items()
    )
    yield f"{'task':<14} {'group':<18} {'metric':<12}{heads}"
    known = {model: {score.key: score for score in scores} for model, scores in compared.scores.items()}
    for key in dict.fromkeys(score.key for scores in compared.scores.values() for score in scores):
        task, group, metric = key
        cells = "".join(
            _value(known[model].get(key))
            + ("" if compared.dense in (None, model) else f" {_lost(lost[model].get(key)):>16}")
            for model in compared.scores
        )
        yield f"{task:<14} {group:<18} {metric:<12}{cells}"
    if compared.bound is not None:
        yield from _verdict(compared, {model: name for name, model in names.items()})


def _value(score: Score | None) -> str:
    return f" {'-':>10}" if score is None else f" {score.value:>10.4f}"


def _lost(one: Difference | None) -> str:
    """Points of accuracy with their standard error, or the rise of a figure that should be low."""
    if one is None:
        return "-"
    if one.score.lower_is_better:
        return f"{one.loss:+.2%}"
    error = one.standard_error
    return f"{one.loss:+.4f}" + ("" if error is None else f" ± {error:.4f}")


def _verdict(compared: Compared, names: dict[Path, str]) -> Iterator[str]:
    found = compared.beyond_bound()
    if not found:
        yield f"no group lost more than {compared.bound}"
    for model, groups in found.items():
        worst = max(groups, key=lambda one: one.loss)
        yield (
            f"{names[model]} lost more than {compared.bound} in {len(groups)} groups, most in {worst.score.task} "
            f"{worst.score.group} ({_lost(worst)})"
        )
