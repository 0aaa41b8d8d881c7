"""Profile a recipe: real steps through the run's own path, watched."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.parallel.collectives import barrier, gather_objects
from leanmill.parallel.pulse import Pulse
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import micro_batches_of_step
from leanmill.report.observer import Observer, RunInfo
from leanmill.trainer.meter import peak_memory_bytes
from leanmill.trainer.processes import Processes, processes
from leanmill.trainer.profile.communication import Communication
from leanmill.trainer.profile.hooks import ModuleHooks
from leanmill.trainer.profile.result import PHASES, Profile, by_block, by_class, by_phase
from leanmill.trainer.profile.timeline import Owner, Phase, Timeline
from leanmill.trainer.run import Rehearsal, run_in


_OF_PULSE: dict[str, Phase] = {"reading data": "data", "forward and backward": "forward", "update": "update"}
"""Phases of the loop, by what it says that it does."""


def profile(recipe: Recipe, *, num_steps: int = 4, num_before: int = 2) -> Profile | None:
    """Train a few steps and return where their time and memory went; None on other ranks than the first.

    Under torchrun every rank calls this. Nothing is left of the steps: no checkpoint, no log, no evaluation.

    Args:
        recipe: What is trained, from its beginning.
        num_steps: Steps that are timed; one more is watched for communication and kept activations.
        num_before: Steps before them.

    Raises:
        ConfigError: The recipe has phases, is compiled or a pipeline, or cannot run here.
    """
    if recipe.phases:
        raise ConfigError("a profile is of one stretch of training, and the recipe has phases; give one of them")
    if recipe.train.compile:
        raise ConfigError(
            "train.compile=true leaves no modules to look into; set train.compile=false, or use torch.profiler"
        )
    if recipe.layout.pp > 1:
        raise ConfigError(
            f"layout.pp={recipe.layout.pp} gives ranks different blocks, and a profile is told beside what `plan` "
            f"counts for ranks that are alike; set layout.pp=1, or use torch.profiler"
        )
    folder = f"{recipe.run_dir}-profile"
    checkpoint = recipe.checkpoint.model_copy(update={"resume": "never", "remote": None})
    recipe = recipe.model_copy(update={"run_dir": folder, "checkpoint": checkpoint})
    watched = _Watch(num_before, num_steps)
    with processes(recipe, pulse=watched.pulse) as given:
        if given.ranks.rank == 0:
            shutil.rmtree(recipe.run_folder, ignore_errors=True)
        barrier()
        try:
            run_in(given, recipe, rehearsal=Rehearsal(num_steps=watched.num_all, observers=[watched]))
            found = watched.result(given)
        finally:
            watched.close()
            if given.ranks.rank == 0:
                shutil.rmtree(recipe.run_folder, ignore_errors=True)
    return found if given.ranks.rank == 0 else None


class _TellingPulse(Pulse):
    """A pulse that tells what begins, when it does."""

    def __init__(self, tell: Callable[[str, int | None], None]) -> None:
        super().__init__()
        self._tell = tell

    def enter(self, phase: str, step: int | None = None, *, patience_seconds: float = 0.0) -> None:
        super().enter(phase, step, patience_seconds=patience_seconds)
        self._tell(phase, step)


class _Watch(Observer):
    """Follows a run: steps before, steps that are timed, and one under torch's profiler."""

    def __init__(self, num_before: int, num_steps: int) -> None:
        self.num_before, self.num_steps = num_before, num_steps
        self.num_all = num_before + num_steps + 1
        self.pulse: Pulse = _TellingPulse(self._tell)
        self._hooks: ModuleHooks | None = None
        self._counting: AbstractContextManager[None] = nullcontext()
        self._totals: dict[Owner, float] = {}
        self._communication: dict[str, float] = {}
        self._step = 0

    def on_start(self, info: RunInfo) -> None:
        self._info, self._device = info, info.engine.device
        self._timeline = Timeline(self._device)
        self._root = info.engine.module
        self._hooks = ModuleHooks(self._root, self._timeline)
        self._watched = Communication(self._device)

    def _tell(self, phase: str, step: int | None) -> None:
        if self._hooks is None or phase not in _OF_PULSE:
            return
        if step is not None:
            self._begin_step(step)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # data and update are waited for where they are
        self._timeline.begin(Owner("", _OF_PULSE[phase]))
        if step is None and self._step == self.num_all and phase != "data":
            self._count(phase)

    def _begin_step(self, step: int) -> None:
        assert self._hooks is not None
        self._hooks.forget_step()
        self._step = step
        if step == self.num_before + 1:
            self._timeline.is_running = True
        if step == self.num_all:
            self._timeline.begin(Owner("", "data"))
            self._totals, self._timeline.is_running = self._timeline.totals(), False
            self._watched.start()
        elif step == self.num_all + 1:  # ranks on CUDA agree a step later that it is over
            self._communication = self._watched.stop()

    def _count(self, phase: str) -> None:
        """Count what the last step keeps for backward, while it goes forward and backward."""
        assert self._hooks is not None
        if phase == "forward and backward":
            self._counting = self._hooks.counting()
            self._counting.__enter__()
        elif phase == "update":
            self._counting.__exit__(None, None, None)

    def close(self) -> None:
        """Take everything off the model again."""
        if self._hooks is not None:
            self._hooks.remove()

    def result(self, given: Processes) -> Profile:
        """Return what was seen; a collective."""
        assert self._hooks is not None
        info, recipe = self._info, self._info.recipe
        if self._step == self.num_all:
            self._communication = self._watched.stop()
        modules = {clean_name(name): type(module).__name__ for name, module in self._root.named_modules()}
        blocks = _blocks(self._root)
        num_micro_batches = micro_batches_of_step(recipe, info.engine.data_size)
        kept = {path: size // num_micro_batches for path, size in self._hooks.kept.items()}
        phases = by_phase(self._totals, self.num_steps)
        mine = Profile(
            engine=info.engine.name,
            world_size=given.ranks.world_size,
            num_steps=self.num_steps,
            tokens_per_step=recipe.batch.tokens_per_step,
            flops_per_step=info.flops_per_token * recipe.batch.tokens_per_step,
            step_seconds=sum(phases.values()),
            phases=phases,
            communication=self._communication,
            classes=by_class(self._totals, kept, modules, self.num_steps),
            blocks=by_block(self._totals, kept, blocks, list(modules), self.num_steps),
            peak_bytes=peak_memory_bytes(self._device),
            kept_bytes=sum(kept.values()),
        )
        return replace(mine, over_ranks=_over_ranks(mine))


def _blocks(root: nn.Module) -> list[str]:
    found = {id(block) for block in decoder_blocks(root)}
    return [clean_name(name) for name, module in root.named_modules() if id(module) in found]


def _over_ranks(mine: Profile) -> dict[str, dict[str, float]]:
    own: dict[str, float] = {str(phase): mine.phases[phase] for phase in PHASES}
    own |= {
        "step": mine.step_seconds,
        "communication": mine.communication.get("any", 0.0),
        "peak_bytes": float(mine.peak_bytes),
    }
    every = gather_objects(own)
    return {
        key: {
            "least": min(one[key] for one in every),
            "median": statistics.median(one[key] for one in every),
            "most": max(one[key] for one in every),
        }
        for key in own
    }
