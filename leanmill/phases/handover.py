"""What a phase begins with: the folder of a folded model, or the checkpoint of another phase."""

from __future__ import annotations

import logging
from pathlib import Path

from leanmill.checkpoint.finding import locate
from leanmill.checkpoint.folders import step_folder
from leanmill.checkpoint.group import SaveGroup
from leanmill.checkpoint.phases import DRAWN, MODEL, PASSED, SCORED, SOLVED
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.folders import clear_unfinished
from leanmill.core.noise import derive_seed
from leanmill.core.passes import PassConfig
from leanmill.evaluate.document_scores import model_folder
from leanmill.export import export_model
from leanmill.models.config import ModelConfig
from leanmill.recipe.phases import FRESH, OF_PHASE, place_of, places_asked_for, source_of, trained_before
from leanmill.recipe.root import Recipe
from leanmill.trainer.beginning import Start
from leanmill.trainer.passes.rewind import draw, rewind


log = logging.getLogger(__name__)


class Handover:
    """Finds what each phase of a recipe begins with; the methods that read or write folders are collective.

    Args:
        recipe: The recipe with phases.
        group: The ranks; an export by the first may take long.
    """

    def __init__(self, recipe: Recipe, group: SaveGroup) -> None:
        self.recipe, self.phases, self.group = recipe, recipe.phases, group
        self._recipes = [recipe.of_phase(i) if phase.trains else recipe for i, phase in enumerate(recipe.phases)]

    def folder(self, index: int) -> Path:
        """Return the folder of a phase, absolute, since checkpoints name what lies in it."""
        return self.recipe.folder_of_phase(index).absolute()

    def passed(self, index: int) -> Path:
        """Return where the passes of a phase write: its model, where it does nothing else."""
        return self.folder(index) / (PASSED if self.phases[index].trains else MODEL)

    def solved(self, index: int) -> Path:
        """Return where the passes themselves write: another folder where their result is rewound."""
        return self.folder(index) / SOLVED if self.phases[index].rewind_to else self.passed(index)

    def rewind(self, index: int) -> None:
        """Give what the passes of a phase left the weights of the earlier moment it names, where it names one."""
        place, out = self.phases[index].rewind_to, self.passed(index)
        if place is None:
            return
        earlier = self._drawn(index) if place == FRESH else self._folded(*place_of(self.phases, place))

        def write() -> None:
            clear_unfinished(out)
            rewind(self.solved(index), earlier, out)

        self.group.on_first_rank(write)

    def scored(self, index: int) -> Path:
        """Return where the scores of the documents of a phase's data are once they are whole."""
        return self.folder(index) / SCORED

    def models_to_score_with(self, index: int) -> dict[str, Path]:
        """Return the folders of the two models that score a phase's documents; what an earlier phase left is written.

        Raises:
            ConfigError: There is no such model.
        """
        score = self.phases[index].score
        assert score is not None, "asked of a phase that scores"
        for read in self.recipe.phases_read_by(index):
            self._folded(read, None)
        return {
            name: Path(self.recipe.model_of(path.removeprefix(OF_PHASE), index))
            if path.startswith(OF_PHASE)
            else model_folder(path, f"phases.{index}.score.{name}_model")
            for name, path in score.models.items()
        }

    def carries_state(self, index: int) -> bool:
        """Whether a phase begins with the checkpoint of another one itself."""
        return self.recipe.carries_state(index, self._recipes)

    def model_for_passes(self, index: int) -> ModelConfig:
        """Return the model that the passes of a phase read."""
        source, step = source_of(self.phases, index)
        return self.recipe.model if source is None else self._at(self._folded(source, step))

    def passes(self, index: int) -> list[PassConfig]:
        """Return the passes of a phase; models that they name as `phase:name` are written."""
        for read in self.recipe.phases_read_by(index):
            self._folded(read, None)
        return self.recipe.passes_of(index)

    def training(self, index: int) -> tuple[Recipe, Start | None]:
        """Return the recipe that a phase trains with, its model found, and what it takes from a checkpoint."""
        recipe, phase = self._recipes[index], self.phases[index]
        for read in self.recipe.phases_read_by(index):
            self._folded(read, None)
        model = self._model(index)
        tokenizer = recipe.data.tokenizer
        if tokenizer.path is None and (own := self._tokenizer(index)) is not None:
            tokenizer = tokenizer.model_copy(update={"path": str(own)})
        asked = recipe.checkpoint
        checkpoint = asked.model_copy(
            update={
                "resume": "auto",
                "keep_steps": sorted({*asked.keep_steps, *self._steps_asked_of(index)}),
                # Where an earlier phase's model lies is no choice of the user's: a run folder may be moved.
                "accept_changes": [*asked.accept_changes, *([] if model == recipe.model else ["model"])],
            }
        )
        data = recipe.data.model_copy(update={"tokenizer": tokenizer})
        recipe = recipe.model_copy(update={"model": model, "data": data, "checkpoint": checkpoint})
        carries = self.carries_state(index)
        if not carries and "data" not in phase.keep:
            return recipe, None
        source, step = trained_before(self.phases, index)
        assert source is not None, "checked when the recipe was parsed"
        return recipe, Start(
            checkpoint=self._checkpoint(source, step),
            model=carries,
            optimizer="optimizer" in phase.keep,
            data="data" in phase.keep,
        )

    def _steps_asked_of(self, index: int) -> set[int]:
        asked = [place for later in range(len(self.phases)) for place in places_asked_for(self.phases, later)]
        return {step for source, step in asked if source == index and step is not None}

    def _model(self, index: int) -> ModelConfig:
        """The section a phase trains with; one that goes on from a checkpoint has that one's."""
        source, step = source_of(self.phases, index)
        if self.phases[index].passes:
            return self._at(self.passed(index))
        if source is None:
            return self._recipes[index].model
        return self._model(source) if self.carries_state(index) else self._at(self._folded(source, step))

    def _tokenizer(self, index: int) -> Path | None:
        """The run's own tokenizer, which a phase with other data would train anew."""
        source, step = trained_before(self.phases, index)
        folder = self.passed(index) if source is None else self.folder(source) / "tokenizer"
        return folder if (folder / "tokenizer.json").is_file() else None

    def _at(self, folder: Path) -> ModelConfig:
        return self.recipe.model.model_copy(update={"path": str(folder), "config": None, "moe": None, "revision": None})

    def _checkpoint(self, index: int, step: int | None) -> Path:
        folder = self.folder(index)
        try:
            found = locate(folder if step is None else step_folder(folder / "checkpoints", step), self.group).path
        except ConfigError as error:
            raise ConfigError(
                f"{error}. A later phase starts from it; remove {folder} to do that phase again"
            ) from error
        if found is None:
            raise RunError(f"the checkpoints of {folder} were deleted while they were looked at; start again")
        return found

    def _drawn(self, index: int) -> Path:
        """A model of what the passes of a phase left, with weights of no training, drawn now where it is not there."""
        out, seed = self.folder(index) / DRAWN, derive_seed(self.recipe.seed, FRESH, index)
        if self.group.broadcast("there" if out.is_dir() else ""):
            return out

        def write() -> None:
            clear_unfinished(out)
            draw(self.solved(index), out, seed=seed, trust_remote_code=self.recipe.model.trust_remote_code)

        self.group.on_first_rank(write)
        return out

    def _folded(self, index: int, step: int | None) -> Path:
        """The model that a phase left, written now where it is not there."""
        out = self.folder(index) / (MODEL if step is None else f"{MODEL}-step-{step:08d}")
        if self.group.broadcast("there" if out.is_dir() else ""):
            return out
        checkpoint = self._checkpoint(index, step)

        def export() -> None:
            clear_unfinished(out)
            log.info("writing the model of %s to %s", checkpoint, out)
            log.info("%s", export_model(checkpoint, out, activations="float"))

        self.group.on_first_rank(export)
        return out
