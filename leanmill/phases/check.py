"""Whether every phase of a recipe can be done, found out before the first one begins."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.export.folding import check_mergeable
from leanmill.parallel.naming import state_buffers, state_parameters
from leanmill.phases.models import model_after
from leanmill.recipe.phases import phase_names, source_of
from leanmill.recipe.root import Recipe
from leanmill.trainer.trial import try_model


def check_phases(recipe: Recipe, done: Collection[int] = ()) -> None:
    """Build the model of each phase on the meta device and look at what is handed over; no weight is read.

    Args:
        recipe: The recipe.
        done: Indices of phases that are finished and need no look.

    Raises:
        ConfigError: What a phase would raise once the phases before it have taken their time.
    """
    phases, names = recipe.phases, phase_names(recipe.phases)
    recipes = [recipe.of_phase(index) if phase.trains else recipe for index, phase in enumerate(phases)]
    models: dict[int, nn.Module | None] = {}

    def model_of(index: int) -> nn.Module | None:
        if index not in models:
            section = model_after(recipe, index)
            here = recipes[index].model_copy(update={"model": section})
            models[index] = None if section is None else try_model(here)
        return models[index]

    for index, phase in enumerate(phases):
        if index in done:
            continue
        try:
            if phase.passes:
                model_after(recipe, index)
            mine = model_of(index) if phase.trains else None
            source, _ = source_of(phases, index)
            if source is None or not phases[source].trains or (theirs := model_of(source)) is None:
                continue
            if recipe.carries_state(index, recipes):
                _check_same_state(theirs, mine, names[source])
            elif source not in done:
                check_mergeable(theirs)
        except ConfigError as error:
            lines = "\n".join(f"phases.{index} ({names[index]}): {line}" for line in str(error).splitlines())
            raise ConfigError(lines) from error


def _check_same_state(before: nn.Module, now: nn.Module | None, name: str) -> None:
    if now is None:
        return
    theirs, mine = ({n for n, _ in (*state_parameters(m), *state_buffers(m))} for m in (before, now))
    if theirs != mine:
        differing = sorted(theirs ^ mine)
        raise ConfigError(
            f"carry: state takes over {name!r} tensor by tensor, and {len(differing)} are in one of the two only "
            f"({differing[0]}), since their techniques differ; type carry: weights"
        )
