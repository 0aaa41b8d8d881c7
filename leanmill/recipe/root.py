"""The root of a recipe. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, field_validator, model_validator

from leanmill.checkpoint.phases import MODEL, SCORED, phase_folder
from leanmill.core.errors import ConfigError
from leanmill.core.near import near_names
from leanmill.core.passes import PassConfig
from leanmill.core.registry import parse_pass
from leanmill.data.config import Prepared
from leanmill.recipe.errors import describe
from leanmill.recipe.phase_rules import phase_problems
from leanmill.recipe.phases import (
    OF_PHASE,
    carries_state,
    merged,
    phase_names,
    places_asked_for,
    source_of,
    trained_before,
    with_models_of_phases,
)
from leanmill.recipe.rules import LENGTHS, known_steps, problems
from leanmill.recipe.sections import Sections


class Recipe(Sections):
    """One run: a model, data, an engine and any number of techniques."""

    @field_validator("optimizer", mode="before")
    @classmethod
    def _default_optimizer(cls, value: Any) -> Any:
        # `optimizer.lr=1e-3` on a recipe that leaves the optimizer to its default means that default.
        return {"type": "adamw", **value} if isinstance(value, dict) else value

    @field_validator("engine", mode="before")
    @classmethod
    def _expand_engine(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        found = [*phase_problems(self), *problems(self)]
        found = found or list(self._problems_in_phases())
        if found:
            raise ConfigError("\n".join(found))
        return self

    def folder_of_phase(self, index: int) -> Path:
        """Return the folder of a phase, by its index from 0."""
        run_dir = self.run_folder
        return phase_folder(run_dir, index, phase_names(self.phases)[index])

    def of_phase(self, index: int) -> Recipe:
        """Return the recipe that a phase trains with, by its index.

        Its model is still that of the whole recipe, but for a phase with one of its own.

        Raises:
            ConfigError: The phase's overrides do not make a recipe.
        """
        phase, name = self.phases[index], phase_names(self.phases)[index]
        raw, changes = self.model_dump(mode="json", exclude={"phases"}), phase.overrides or {}
        if any(key in LENGTHS for key in changes.get("train") or ()):
            raw["train"] |= dict.fromkeys(LENGTHS)  # a phase of another length, in whatever unit
        folder = str(self.folder_of_phase(index)).replace("{", "{{").replace("}", "}}")
        raw = {**merged(raw, changes), "name": f"{self.name}-{name}", "run_dir": folder}
        raw["techniques"] = with_models_of_phases(raw["techniques"], lambda earlier: self.model_of(earlier, index))
        if phase.score is not None and raw["data"]["source"]["type"] == "prepared":
            chosen = {"scores": str(self.folder_of_phase(index) / SCORED), "kept_share": phase.score.kept_share}
            raw["data"]["source"] = {**raw["data"]["source"], **chosen}
        try:
            return Recipe.model_validate(raw)
        except ValidationError as error:
            # `from None`: the chain would print inputs, and an input may be a credential.
            where = f"phases.{index} ({name})"
            raise ConfigError("\n".join(describe(error, Recipe, raw, where, {}))) from None

    def model_of(self, earlier: str, index: int) -> str:
        """Return the folder of what the phase `earlier` leaves, as the phase at `index` names it.

        Raises:
            ConfigError: It is no earlier phase.
        """
        return str(self.folder_of_phase(self._earlier(earlier, index)) / MODEL)

    def passes_of(self, index: int) -> list[PassConfig]:
        """Return the passes of a phase, with every `phase:name` in them replaced by the folder of its model."""
        raw = [one.model_dump(mode="json") for one in self.phases[index].passes]
        return [parse_pass(one) for one in with_models_of_phases(raw, lambda earlier: self.model_of(earlier, index))]

    def phases_read_by(self, index: int) -> list[int]:
        """Return the phases whose models one names as `phase:name`, wherever it does, by their indices."""
        found: list[int] = []
        techniques = [config.model_dump(mode="json") for config in self.techniques]
        raw = merged({"techniques": techniques}, self.phases[index].overrides or {})["techniques"]

        def note(name: str) -> str:
            found.append(self._earlier(name, index))
            return name

        with_models_of_phases(raw, note)
        with_models_of_phases([one.model_dump(mode="json") for one in self.phases[index].passes], note)
        with_models_of_phases({} if (score := self.phases[index].score) is None else score.models, note)
        return list(dict.fromkeys(found))

    def _earlier(self, name: str, index: int) -> int:
        """Return the index of the phase `name`, which must come before another."""
        names = phase_names(self.phases)
        if name in names[:index]:
            return names.index(name)
        near = near_names(name, names[:index])
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names[:index]) or 'none'}"
        raise ConfigError(
            f"phases.{index} ({names[index]}): {OF_PHASE}{name} must name a phase before this one, whose model it "
            f"is; {hint}"
        )

    def training_phases(self) -> list[Recipe]:
        """Return the recipe of each phase that trains, in order."""
        return [self.of_phase(index) for index, phase in enumerate(self.phases) if phase.trains]

    def _problems_in_phases(self) -> Iterator[str]:
        recipes: list[Recipe] = []
        for index, phase in enumerate(self.phases):
            where = f"phases.{index} ({phase_names(self.phases)[index]})"
            try:
                recipes.append(self.of_phase(index) if phase.trains else self)
            except ConfigError as error:
                yield str(error)
                return
            yield from (f"{where}: {line}" for line in self._steps_past_an_end(index, recipes))
            yield from (f"{where}: {line}" for line in self._not_scored(index, recipes[index]))
            yield from (f"{where}: {line}" for line in self._unknown_phases(index))
            source, _ = trained_before(self.phases, index)
            if source is not None:
                before, carries = recipes[source], self.carries_state(index, recipes)
                for line in _handover_problems(before, recipes[index], phase.keep, carries_state=carries):
                    yield f"{where}: {line}"

    def _not_scored(self, index: int, recipe: Recipe) -> Iterator[str]:
        phase = self.phases[index]
        if phase.score is None:
            return
        given = merged(self.data.model_dump(mode="json"), (phase.overrides or {}).get("data", {}))["source"]
        if given.get("scores") is not None or given.get("kept_share") is not None:
            yield "score writes the scores that it trains by; remove data.source.scores and data.source.kept_share"
        if not isinstance(recipe.data.source, Prepared) or recipe.data.task not in phase.score.tasks:
            yield (
                f"score needs prepared text, and data.source is {recipe.data.source.type} and data.task "
                f"{recipe.data.task}; run `leanmill data prepare` and type data.source={{type: prepared, path: DIR}}"
            )

    def _unknown_phases(self, index: int) -> Iterator[str]:
        try:
            self.phases_read_by(index)
        except ConfigError as error:
            yield str(error).partition(": ")[2]

    def _steps_past_an_end(self, index: int, recipes: Sequence[Recipe]) -> Iterator[str]:
        for place, step in places_asked_for(self.phases, index):
            if place is None or step is None:
                continue
            length = known_steps(recipes[place])
            if length is not None and step > length:
                yield f"{phase_names(self.phases)[place]}@{step} is past its {length} steps; give fewer"

    def carries_state(self, index: int, recipes: Sequence[Recipe]) -> bool:
        """Whether a phase begins with an earlier one's checkpoint itself; `recipes` are those of the phases so far."""
        source, _ = source_of(self.phases, index)
        same = source is not None and _by_type(recipes[source]) == _by_type(recipes[index])
        return carries_state(self.phases, index, same_techniques=same)


def _by_type(recipe: Recipe) -> list[Any]:
    """The techniques as they are installed: in the order of their types."""
    return sorted(recipe.techniques, key=lambda technique: technique.type)  # type: ignore[attr-defined]


def _handover_problems(source: Recipe, recipe: Recipe, keep: list[Any], *, carries_state: bool) -> Iterator[str]:
    """Yield what does not fit between a phase and the training it comes from."""
    compared = any(config.num_compared() for config in source.techniques)
    for config in recipe.techniques:
        if carries_state and not compared and config.num_compared() and not config.frozen_models():
            name: str = config.type  # type: ignore[attr-defined]
            yield (
                f"carry: state brings adapters that were trained before, and {name}.reference is not given, so the "
                f"reference would be the model without them; type carry: weights, or set {name}.reference"
            )
    if "optimizer" in keep and not carries_state:
        yield "keep: [optimizer] needs the weights its moments belong to, and techniques differ; type carry: state"
    if "optimizer" in keep and source.optimizer.type != recipe.optimizer.type:
        yield (
            f"keep: [optimizer] needs the optimizer that the moments are of, {source.optimizer.type}, and this phase "
            f"has {recipe.optimizer.type}; remove one of the two"
        )
    if "data" in keep and source.data != recipe.data:
        yield "keep: [data] is a position in the data of before, and this phase overrides data; remove one of the two"
    if "data" in keep and recipe.train.steps is None:
        length = known_steps(recipe)
        example = "N" if length is None else length
        yield f"keep: [data] counts on from earlier tokens; give the phase's length as train.steps={example}"
