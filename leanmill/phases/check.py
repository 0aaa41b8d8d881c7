"""Whether every phase of a recipe can be done, found out before the first one begins."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError
from leanmill.core.passes import PassConfig
from leanmill.export.folding import check_mergeable
from leanmill.models.build import build_on_meta
from leanmill.parallel.naming import state_buffers, state_parameters
from leanmill.recipe.on_this_machine import local_model
from leanmill.recipe.phases import phase_names, source_of
from leanmill.recipe.root import Recipe
from leanmill.trainer.passes.run import check_pass
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
            models[index] = try_model(recipes[index])
        return models[index]

    for index, phase in enumerate(phases):
        if index in done:
            continue
        try:
            if phase.passes:
                _check_passes(recipe, phase.passes)
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


def _check_passes(recipe: Recipe, passes: Collection[PassConfig]) -> None:
    model_config = local_model(recipe.model)
    if model_config is None:
        return
    vocab_size = recipe.data.tokenizer.vocab_size if recipe.data.tokenizer.path is None else None
    model = build_on_meta(model_config, vocab_size=vocab_size, device_type="cpu", packed=False)
    shapes = dict(_linear_shapes(model))
    for config in passes:
        check_pass(config, shapes)


def _linear_shapes(model: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    names = {id(module): name for name, module in model.named_modules()}
    for block in decoder_blocks(model):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                yield names[id(module)], (module.out_features, module.in_features)


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
