"""Runs that a recipe names as models: the newest checkpoint, written once as a model folder. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from leanmill.checkpoint.finding import is_run, locate
from leanmill.core.errors import RunError
from leanmill.core.paths import expand_user
from leanmill.data.cache import cached_folder
from leanmill.export import export_model
from leanmill.export.formats import Activations
from leanmill.recipe.phases import merged, nested
from leanmill.recipe.root import Recipe


MODELS = "models"
"""Folder of a run that holds what was written of it for other runs."""


def with_models_of_runs(recipe: Recipe) -> Recipe:
    """Return the recipe with every run folder or checkpoint that it names as a model replaced by a model folder.

    `model.path` gets the weights as the next training wants them (`activations="float"`), and the run's tokenizer
    where the recipe names none; a teacher stays what it was trained to be. Safe on all ranks at once: one writes, the
    others wait. Models that phases override are left alone.

    Raises:
        ConfigError: A run without a checkpoint, or one whose export no format has.
        RunError: Its checkpoints are damaged, or its folder cannot be written.
    """
    raw: dict[str, Any] = {}
    if recipe.model.path is not None and is_run(expand_user(recipe.model.path)):
        folder = str(_model_of(recipe.model.path, "float"))
        raw["model"] = recipe.model.model_dump(mode="json") | {"path": folder}
        if recipe.data.tokenizer.path is None and (Path(folder) / "tokenizer.json").is_file():
            tokenizer = recipe.data.tokenizer.model_dump(mode="json") | {"path": folder}
            raw["data"] = recipe.data.model_dump(mode="json") | {"tokenizer": tokenizer}
    techniques = [technique.model_dump(mode="json") for technique in recipe.techniques]
    for index, technique in enumerate(recipe.techniques):
        for key, path in {**technique.frozen_models(), **technique.read_models()}.items():
            if is_run(expand_user(path)):
                folder = str(_model_of(path, "trained"))
                techniques[index] = merged(techniques[index], nested({key: folder}))
                raw["techniques"] = techniques
    return Recipe.model_validate({**recipe.model_dump(mode="json"), **raw}) if raw else recipe


def _model_of(run: str, activations: Activations) -> Path:
    checkpoint = locate(expand_user(run)).path
    if checkpoint is None:
        raise RunError(f"the checkpoints of {run} were deleted while they were looked at; run the command again")
    name = checkpoint.name + ("-float" if activations == "float" else "")
    home = checkpoint.absolute().parent.parent
    try:
        return cached_folder(home, MODELS, name, lambda folder: _write(checkpoint, folder, activations))
    except RunError as error:
        raise RunError(
            f"{run} is named as a model, and its checkpoint cannot be written as one to {home / MODELS / name} "
            f"({error}); type leanmill export --checkpoint {run} --to hf --out DIR, and name DIR"
        ) from error


def _write(checkpoint: Path, folder: Path, activations: Activations) -> None:
    export_model(checkpoint, folder, activations=activations)
