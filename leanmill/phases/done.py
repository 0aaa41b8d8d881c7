"""What a finished phase was asked for, and how that differs from what a recipe asks for now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from leanmill.core.redact import redact_tree
from leanmill.recipe.changes import changes, is_accepted
from leanmill.recipe.phases import phase_names, source_of
from leanmill.recipe.root import Recipe


_FIXED = (
    "train.steps", "train.total_tokens", "train.epochs", "data.source", "data.sequence_length", "data.task", "seed",
)  # fmt: skip
"""What a run that goes on may change, and a finished phase may not: later phases have begun with its result."""


def asked_of(recipe: Recipe, index: int) -> dict[str, Any]:
    """Return everything that decides what a phase makes, as JSON holds it."""
    phase, names = recipe.phases[index], phase_names(recipe.phases)
    source, step = source_of(recipe.phases, index)
    trained = recipe.of_phase(index) if phase.trains else None
    data = (trained or recipe).data
    return redact_tree(  # type: ignore[no-any-return]
        {
            "start_from": None if source is None else f"{names[source]}{'' if step is None else f'@{step}'}",
            "carry": phase.carry,
            "rewind_to": phase.rewind_to,
            "keep": sorted(phase.keep),
            "score": None if phase.score is None else phase.score.model_dump(mode="json"),
            "passes": [config.model_dump(mode="json") for config in phase.passes],
            "calibration": _calibration(recipe, index, data.model_dump(mode="json")) if phase.passes else None,
            "recipe": None if trained is None else trained.model_dump(mode="json"),
        }
    )


def _calibration(recipe: Recipe, index: int, data: Mapping[str, Any]) -> dict[str, Any]:
    rows = {key: data[key] for key in ("source", "sequence_length", "task")}
    return {**recipe.phases[index].calibration.model_dump(mode="json"), "seed": recipe.seed, "data": rows}


def differences(saved: Mapping[str, Any], recipe: Recipe, index: int) -> list[str]:
    """Return in words what a finished phase was asked for that this recipe asks otherwise, less what it accepts.

    Args:
        saved: What `asked_of` returned when the phase was finished.
        recipe: The recipe now.
        index: Which phase.
    """
    now = asked_of(recipe, index)
    found = [f"{key} {saved.get(key)} -> {now[key]}" for key in now if key != "recipe" and saved.get(key) != now[key]]
    return [*found, *_of_training(saved.get("recipe"), recipe, index)]


def _of_training(saved: Mapping[str, Any] | None, recipe: Recipe, index: int) -> Iterator[str]:
    trains = recipe.phases[index].trains
    if saved is None or not trains:
        if trains or saved is not None:
            yield "it trained" if saved is not None else "it did not train"
        return
    accepted = recipe.checkpoint.accept_changes
    for change in changes(saved, recipe.of_phase(index)):
        if change.key == "data.source.scores":  # where they lie; what they are of stands in `score`
            continue
        if not is_accepted(change, accepted) or is_accepted(change, _FIXED, free=()):
            yield str(change)
