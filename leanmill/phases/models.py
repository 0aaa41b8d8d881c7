"""The model that each phase begins with, as far as configurations tell before the first one has begun."""

from __future__ import annotations

from leanmill.checkpoint.phases import MODEL
from leanmill.models.config import ModelConfig
from leanmill.recipe.on_this_machine import local_model
from leanmill.recipe.phases import has_own_model, source_of
from leanmill.recipe.root import Recipe
from leanmill.trainer.passes.foresight import after_passes


def model_before(recipe: Recipe, index: int) -> ModelConfig | None:
    """Return the section that describes what a phase's passes, or its training, begin with.

    Where no pass changed the architecture it is the recipe's own, or that of the phase;
    None where that model is not on this machine.

    Raises:
        ConfigError: A pass of an earlier phase does not fit its model.
    """
    source, _ = source_of(recipe.phases, index)
    if source is not None:
        return model_after(recipe, source)
    return local_model(recipe.of_phase(index).model if has_own_model(recipe.phases, index) else recipe.model)


def model_after(recipe: Recipe, index: int) -> ModelConfig | None:
    """Return the section that describes what a phase's passes leave, and so what it trains.

    Raises:
        ConfigError: A pass does not fit the model.
    """
    before = model_before(recipe, index)
    if before is None:
        return None
    return after_passes(
        before, recipe.phases[index].passes, seed=recipe.seed, vocab_size=recipe.data.trained_vocab_size
    )


def models_to_come(recipe: Recipe) -> dict[str, ModelConfig]:
    """Return the section that describes what each phase will leave, by its folder, where that is not there yet."""
    found = {}
    for index in range(len(recipe.phases)):
        folder = recipe.folder_of_phase(index) / MODEL
        if not folder.is_dir() and (model := model_after(recipe, index)) is not None:
            found[str(folder)] = model
    return found


def training_recipes(recipe: Recipe) -> list[Recipe]:
    """Return the recipe of every phase that trains, with the model it will train as far as that is known."""
    found = []
    for index, phase in enumerate(recipe.phases):
        if phase.trains:
            model = model_after(recipe, index)
            one = recipe.of_phase(index)
            found.append(one if model is None else one.model_copy(update={"model": model}))
    return found
