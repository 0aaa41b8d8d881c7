"""What must hold of the phases of a recipe, before their settings are looked at. Imports no torch.

Each rule yields one line: what was given, what is allowed, what to type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from leanmill.core.near import near_names
from leanmill.core.surgery import lost_further
from leanmill.recipe.phases import (
    BASE,
    FRESH,
    OF_PHASE,
    has_own_model,
    phase_names,
    place_of,
    source_of,
    trained_before,
)


if TYPE_CHECKING:
    from leanmill.recipe.sections import Sections


_WHOLE_RECIPE = "it holds for all phases: set it once for the whole recipe, or make the phase a recipe of its own"
_REFUSED = {
    "engine": f"all phases share one set of processes, so {_WHOLE_RECIPE} with model.path at the model this one leaves",
    "layout": _WHOLE_RECIPE,
    "device": _WHOLE_RECIPE,
    "cluster": _WHOLE_RECIPE,
    "plugins": _WHOLE_RECIPE,
    "seed": _WHOLE_RECIPE,
    "run_dir": "a phase has its folder inside the run's; type phases.{index}.name to name it",
    "name": "it names the run; type phases.{index}.name for the phase",
    "model": "its model is what an earlier one or its passes left; type phases.{index}.start_from to choose which, or "
    "base, without passes, for a model of its own",
    "phases": "phases hold no phases; list them one after another",
    "checkpoint.resume": "phases continue by themselves; remove it",
    "checkpoint.accept_changes": "give it on the command line of the resume, for the whole recipe",
}
"""Keys that no phase overrides, with what to do instead."""


def phase_problems(recipe: Sections) -> Iterator[str]:
    """Yield what is wrong with the phases themselves; what their overrides make of the recipe is looked at after it."""
    names = phase_names(recipe.phases)
    named = [(i, *pair) for i, one in enumerate(recipe.techniques) for pair in one.frozen_models().items()]
    for place, key, path in named if not recipe.phases else ():
        if path.startswith(OF_PHASE):
            yield f"techniques.{place}.{key}={path} names a phase, and the recipe has none; give a folder or a hub name"
    for index, phase in enumerate(recipe.phases):
        found = list(_problems(recipe, names, index))
        yield from (f"phases.{index} ({names[index]}): {line}" for line in found)
        own = {"model"} if not found and has_own_model(recipe.phases, index) else set()
        for key in (key for key in _refused(phase.overrides or {}) if key not in own):
            advice = _REFUSED[key].format(index=index)
            yield f"phases.{index}.overrides.{key} is nothing a phase changes: {advice}"
    if recipe.phases and recipe.checkpoint.resume not in ("auto", "never"):
        yield (
            f"checkpoint.resume={recipe.checkpoint.resume} names one checkpoint, and each phase has its own; type "
            f"checkpoint.resume=auto, and model.path for a model to begin with"
        )
    if recipe.phases and recipe.checkpoint.remote is not None:
        yield (
            "checkpoint.remote holds checkpoints, and phases hand on folders of models beside them; remove it, and put "
            "run_dir on storage that outlives the machine"
        )


def _problems(recipe: Sections, names: Sequence[str], index: int) -> Iterator[str]:
    phases, phase = recipe.phases, recipe.phases[index]
    if names.index(names[index]) < index:
        yield f"the name {names[index]!r} is an earlier phase's; give another"
        return
    problem = _start_problem(names, index, phase.start_from) or _rewind_problem(recipe, names, index)
    if problem:
        yield problem
        return
    source, step = source_of(phases, index)
    trained = source is not None and phases[source].trains
    if phase.score is not None and phase.passes:
        yield "score is for a phase that only trains, and it has passes; give them a phase of their own"
    if lost := lost_further(phase.passes):
        yield lost
    if phase.passes and source is None and recipe.model.path is None:
        yield "its passes need a model that exists; set model.path, or train one in a phase before"
    if step is not None and not trained:
        yield f"start_from: {phase.start_from} names a step, and that phase does not train; remove @{step}"
    if phase.carry == "state" and (phase.passes or not phase.trains or not trained):
        yield "carry: state is for training that goes on from training, with no pass between; remove it"
    if phase.keep and (trained_before(phases, index)[0] is None or not phase.trains):
        yield "keep is for training that comes after training; remove it"
    if phase.carry == "weights" and "optimizer" in phase.keep:
        yield "keep: [optimizer] needs the weights its moments belong to; type carry: state, or remove it"
    if "optimizer" in phase.keep and (phase.passes or not trained):
        yield "keep: [optimizer] has no meaning for weights that passes changed; remove it"


def _rewind_problem(recipe: Sections, names: Sequence[str], index: int) -> str:
    phase = recipe.phases[index]
    if phase.rewind_to is None:
        return ""
    if not phase.passes:
        return "rewind_to is for a phase with passes, whose zeros stay; add passes, or type start_from instead"
    if any(config.changes_architecture for config in phase.passes):
        return "rewind_to needs the tensors of the earlier model, and its passes make others; remove one of the two"
    if phase.rewind_to == FRESH:
        return ""
    problem = _start_problem(names, index, phase.rewind_to, key="rewind_to")
    if problem or phase.rewind_to == BASE:
        return problem or f"rewind_to must name a phase that trains; type e.g. rewind_to: {names[0]}@100"
    earlier, _ = place_of(recipe.phases, phase.rewind_to)
    return "" if recipe.phases[earlier].trains else f"rewind_to: {phase.rewind_to} does not train; name one that does"


def _start_problem(names: Sequence[str], index: int, start: str | None, key: str = "start_from") -> str:
    name, at, step = (start or BASE).partition("@")
    if at and not (step.isdecimal() and int(step) > 0):
        return f"{key}: {start} must end in a number of steps; type e.g. {key}: {name}@100"
    earlier = names[:index]
    if name == BASE and not at or name in earlier:
        return ""
    near = near_names(name, earlier)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join([BASE, *earlier])}"
    what = "comes later" if name in names[index + 1 :] else "is this phase" if name == names[index] else "is unknown"
    return f"{key}: {start} must name an earlier phase, and {name!r} {what}; {hint}"


def _refused(overrides: Mapping[str, Any]) -> Iterator[str]:
    for key in _REFUSED:
        node: Any = overrides
        for part in key.split("."):
            node = node.get(part, ...) if isinstance(node, Mapping) else ...
        if node is not ...:
            yield key
