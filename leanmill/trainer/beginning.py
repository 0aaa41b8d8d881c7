"""What a run begins with: its own checkpoint, one of another run, or neither."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from leanmill.checkpoint.fingerprint import fingerprint_folder
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.checkpoint.reading import optimized_names, read_document
from leanmill.checkpoint.workers import Stateful
from leanmill.core.branches import branch_tensors
from leanmill.core.names import state_name
from leanmill.core.stage import is_added_tensor
from leanmill.data.train_data import TrainData
from leanmill.models.pretrained import local_folder
from leanmill.parallel.collectives import gather_objects, is_first_rank
from leanmill.parallel.engine import Engine
from leanmill.parallel.naming import state_buffers, state_parameters
from leanmill.recipe.changes import Change, changes, check_accepted
from leanmill.recipe.earlier import going_on
from leanmill.recipe.root import Recipe
from leanmill.trainer.prepare import Prepared
from leanmill.trainer.rewind import Back


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run that has no checkpoint of its own yet takes from one of another run."""

    checkpoint: Path
    model: bool = False
    """Whether the weights and what stages and step rules hold go on; the model must have the same of them."""
    optimizer: bool = False
    """Whether the moments go on as well."""
    data: bool = False
    """Whether the position in the data does."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What was found, before the model is prepared: `state` decides how it is."""

    manager: CheckpointManager
    data: TrainData
    start: Start | None
    path: Path | None = None
    """The checkpoint of this run that it goes on from."""
    state: dict[str, Any] = field(default_factory=dict)
    """That checkpoint's `train_state`."""
    changes: Sequence[Change] = ()
    """Accepted ones of the recipe since."""
    recipe: Recipe
    """That the run goes on with: what it leaves open is as the checkpoint has it."""
    back: Back | None = None
    """Why it is not the newest checkpoint, where it is a rewind."""

    @classmethod
    def find(
        cls,
        recipe: Recipe,
        manager: CheckpointManager,
        data: TrainData,
        start: Start | None,
        back: Back | None = None,
    ) -> Beginning:
        """Find what to resume, and refuse it where recipe or data are others.

        Args:
            recipe: Of the run.
            manager: Of its checkpoints.
            data: Of the run; other data may be why a model has another vocabulary.
            start: What the run begins with, where there is nothing to resume.
            back: Where a rewind goes, whatever there is to resume.
        """
        path = manager.find(recipe.checkpoint.resume) if back is None else back.path
        if path is None:
            return cls(manager=manager, data=data, start=start, recipe=recipe, back=back)
        saved = read_document(path, "recipe.json")
        changed = changes(saved, recipe)
        check_accepted(changed, recipe.checkpoint.accept_changes, str(path))
        state = manager.train_state(path)
        data.identity.check(state["data"]["identity"])
        return cls(
            manager=manager,
            data=data,
            start=start,
            path=path,
            state=state,
            changes=changed,
            recipe=going_on(saved, recipe),
            back=back,
        )

    @property
    def rule_states(self) -> dict[str, Any]:
        """What step rules go on from."""
        if self.state.get("rules") or self.start is None or not self.start.model:
            return self.state.get("rules", {})  # type: ignore[no-any-return]
        return self.manager.train_state(self.start.checkpoint).get("rules", {})  # type: ignore[no-any-return]

    def load(self, prepared: Prepared, engine: Engine, saved: dict[str, Any], state: Stateful) -> int:
        """Fill the model, its optimizer and the position in the data; return how many rows a rewind leaves out.

        Args:
            prepared: The model in `engine`.
            engine: The engine.
            saved: See `saved_part`.
            state: What is filled: the engine, or who stands for it.
        """
        if self.path is not None:
            if prepared.techniques.trainable_schedule is not None:
                # What trained in the step that was saved, and so has state; the next step may change it.
                engine.set_trainable(prepared.trained & optimized_names(self.path))
            self.manager.load(self.path, state, **saved)
            engine.load_state_dict(self.state.get("engine", {}))
            self.data.load_state_dict(self.state["data"])
        elif self.start is not None:
            self._load_other(self.start, state, saved)
        num_left_out = 0 if self.back is None else self.back.position_rows - self.data.position_rows
        self.data.skip_rows(num_left_out)
        return num_left_out

    def _load_other(self, start: Start, state: Stateful, saved: dict[str, Any]) -> None:
        if start.data:
            data = self.manager.train_state(start.checkpoint)["data"]
            self.data.identity.check(data["identity"])
            self.data.load_state_dict(data)
        if start.model:
            self.manager.load(start.checkpoint, state, optimizer=start.optimizer, **saved)

    @property
    def notes(self) -> list[str]:
        """Lines for the start of the log."""
        if self.back is not None:
            return [self.back.note]
        if self.path is None:
            return []
        changed = [f"changed since: {'; '.join(map(str, self.changes))}"] if self.changes else []
        return [f"resumed {self.path} at step {self.state['step']}", *changed]


def saved_part(recipe: Recipe, model: nn.Module, prepared: Prepared) -> dict[str, Any]:
    """What of the model a checkpoint holds: all of it, or only adapters and stages beside a named base.

    A frozen base that came from a checkpoint is not written again; its digest is, which the first rank takes for all:
    it reads the whole base. A collective.
    """
    names = saved_names(recipe, model, prepared.trained, freezes_base=prepared.techniques.freeze_base)
    if names is None:
        return {}
    assert recipe.model.path is not None
    folder = local_folder(recipe.model.path, recipe.model.revision)
    base, *_ = gather_objects(fingerprint_folder(folder) if is_first_rank() else None)
    return {"names": names, "base": base}


def saved_names(recipe: Recipe, model: nn.Module, trained: Collection[str], *, freezes_base: bool) -> set[str] | None:
    """Return the parameters and buffers that a checkpoint holds, None for all; the model may be on the meta device."""
    is_changed = any(technique.changes_base() for technique in recipe.techniques)
    if not (freezes_base and recipe.model.path) or is_changed:
        return None
    of_adapters = {state_name(path) for path, _, _ in branch_tensors(model)}
    parameters, buffers = ({name for name, _ in state(model)} for state in (state_parameters, state_buffers))
    brought = {name for name in parameters | buffers if is_added_tensor(name) or name in of_adapters}
    return brought | (parameters & set(trained))
