"""Leanmill from one's own code or a notebook: the verbs of the command line as functions.

    from leanmill import api

    recipe = api.load_recipe("recipe.yaml", "train.steps=200")
    result = api.train(recipe)
    api.evaluate(result.run_dir)
    api.export(result.run_dir, "model")

Importing this imports no torch; a function imports what it needs when it is called. They raise `ConfigError` and
`RunError` (`leanmill.core.errors`), whose message says what to change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from leanmill.export.report import ExportReport
    from leanmill.peft_ext.lego.folders import MergeReport
    from leanmill.plan.plan import Plan
    from leanmill.recipe.root import Recipe
    from leanmill.trainer.evaluate_checkpoint import Evaluated
    from leanmill.trainer.run import RunResult


def load_recipe(recipe: Recipe | str | Path | Mapping[str, Any], *overrides: str) -> Recipe:
    """Return a validated recipe.

    Args:
        recipe: A YAML file, its content as a mapping, or a recipe.
        *overrides: `a.b=c` each, as on the command line.

    Raises:
        ConfigError: Every contradiction, a line each.
    """
    from leanmill.recipe.io import load_recipe as from_file
    from leanmill.recipe.io import override_recipe, validate_recipe
    from leanmill.recipe.root import Recipe
    from leanmill.recipe.yaml_source import Lines

    if isinstance(recipe, str | Path):
        return from_file(recipe, overrides)
    if isinstance(recipe, Recipe) and not overrides:
        return recipe
    raw = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else _copied(recipe)
    lines: Lines = {}
    override_recipe(raw, overrides, lines)
    return validate_recipe(raw, lines=lines)


def train(recipe: Recipe | str | Path | Mapping[str, Any], *overrides: str) -> RunResult:
    """Train a recipe to its end, all phases, going on where its run_dir has a checkpoint.

    In one process; under torchrun every rank calls it. Another `run_dir` or `checkpoint.resume=never` begins anew.

    Args:
        recipe: See `load_recipe`.
        *overrides: See `load_recipe`.

    Raises:
        ConfigError: The recipe asks for something impossible here.
        RunError: Something failed on the way; the newest checkpoint is where it continues.
    """
    from leanmill.core.quiet import quiet_libraries
    from leanmill.recipe.local_files import check_files

    quiet_libraries()
    loaded = load_recipe(recipe, *overrides)
    check_files(loaded)
    if loaded.phases:
        from leanmill.phases.run import run as run_phases

        return run_phases(loaded)
    from leanmill.trainer.run import run

    return run(loaded)


def evaluate(model: str | Path, *overrides: str, recipe: str | Path | None = None) -> Evaluated:
    """Score a run (its newest checkpoint), a checkpoint or a Hugging Face folder on held-out text.

    Args:
        model: The folder.
        *overrides: Of the recipe's `data`, `eval`, `batch`, `device` and `train.precision`.
        recipe: Says what a Hugging Face folder is scored on; without it text of this machine.

    Raises:
        ConfigError: No such folder, an override of something else, or a recipe for a checkpoint, which has its own.
        RunError: The checkpoint is damaged.
    """
    from leanmill.cli.checkpoints import is_model_folder, resolve_checkpoint
    from leanmill.core.errors import ConfigError
    from leanmill.core.quiet import quiet_libraries
    from leanmill.trainer.evaluate_checkpoint import evaluate_checkpoint, evaluate_folder

    quiet_libraries()
    if is_model_folder(Path(model)):
        return evaluate_folder(Path(model), overrides, None if recipe is None else str(recipe))
    if recipe is not None:
        raise ConfigError(f"recipe={str(recipe)!r} is for Hugging Face folders; {model} has its own, give overrides")
    return evaluate_checkpoint(resolve_checkpoint(str(model)), overrides)


def export(checkpoint: str | Path, out: str | Path, *, to: str = "hf", packing: str = "none") -> ExportReport:
    """Write a run's newest checkpoint, or a checkpoint, as a folder others load; it is loaded back and compared.

    Args:
        checkpoint: A run_dir or a checkpoint.
        out: A new folder.
        to: Format, as `leanmill export --to`.
        packing: Of weights in `hf`, as `leanmill export --packing`.

    Raises:
        ConfigError: It cannot be exported this way, or `out` is there.
        RunError: What was loaded back differs; `out` is not created.
    """
    from leanmill.cli.checkpoints import resolve_checkpoint
    from leanmill.core.folders import check_is_new
    from leanmill.export import export_model

    check_is_new(Path(out))
    return export_model(resolve_checkpoint(str(checkpoint)), Path(out), to=to, packing=packing)


def merge_adapters(
    folders: Sequence[str | Path], out: str | Path, *, rank: int | None = None, seed: int = 0
) -> MergeReport:
    """Merge LoRA adapters of one base into one, as `leanmill merge`.

    Args:
        folders: Two or more, written by PEFT or by `export`.
        out: A new folder.
        rank: Of the merged adapter; None takes the adapters' largest.
        seed: Of the first centres of groups.

    Raises:
        ConfigError: A folder is no LoRA adapter, bases or shapes differ, or `out` is there.
        RunError: `out` cannot be written.
    """
    from leanmill.peft_ext.lego.folders import merge_adapters as merge

    return merge(folders, out, rank=rank, seed=seed)


def plan(
    recipe: Recipe | str | Path | Mapping[str, Any],
    *overrides: str,
    world_size: int = 1,
    gpus_per_node: int | None = None,
    rank_memory_gib: float = 80,
) -> Plan:
    """Predict parameters, memory of a rank and FLOPs of a recipe without phases, touching no device.

    Args:
        recipe: See `load_recipe`.
        *overrides: See `load_recipe`.
        world_size: Ranks of the run.
        gpus_per_node: Ranks of a machine; None puts all on one.
        rank_memory_gib: Memory of a rank, GiB.

    Raises:
        ConfigError: The recipe cannot run on these ranks, or has phases, which are planned one by one.
    """
    from leanmill.core.errors import ConfigError
    from leanmill.plan.plan import plan as plan_of

    loaded = load_recipe(recipe, *overrides)
    if loaded.phases:
        raise ConfigError("a recipe with phases is several runs; plan each of recipe.training_phases()")
    return plan_of(loaded, world_size, gpus_per_node, rank_memory_gib=rank_memory_gib)


def _copied(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with sections of its own: overrides write into them."""
    import copy

    return copy.deepcopy(dict(raw))
