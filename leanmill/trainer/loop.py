"""The training loop, on one screen."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leanmill.core.errors import RunError
from leanmill.core.technique import Batch, StepContext, StepRule
from leanmill.data.build import TrainData
from leanmill.optim.schedules import lr_factor
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.parallel.engine import Engine
from leanmill.recipe.root import Recipe
from leanmill.report.observer import Observer
from leanmill.trainer.meter import Meter
from leanmill.trainer.rng import seed_step
from leanmill.trainer.skipping import WINDOW_STEPS, SkipWatch, stuck


@dataclass(kw_only=True)
class Loop:
    """Everything one run's loop touches."""

    recipe: Recipe
    engine: Engine
    data: TrainData
    step_rules: Sequence[StepRule]
    observers: Sequence[Observer]
    num_steps: int
    num_micro_batches: int
    save: Callable[[int], None]
    """Write a checkpoint after this many steps."""
    evaluate: Callable[[int], None]
    """Evaluate after this many steps."""
    before_update: Callable[[], object] = lambda: None
    """Called once gradients are complete, before anything writes weights: a save may still be copying."""
    on_first_step: Callable[[], None] = lambda: None
    """Called once after the first step: long start-up time-outs end here."""
    step: int = 0
    """Steps done so far."""
    num_skipped: int = 0
    meter: Meter = field(init=False)

    def start(self) -> None:
        """Start the clock; `run` does it too."""
        self.meter = Meter(self.engine.device, self.num_skipped)

    def run(self) -> str:
        """Train to the end; return `finished`, or `stopped` when a signal asked for it."""
        self.start()
        recipe, first, skips = self.recipe, self.step, SkipWatch(self.step, self.num_skipped)
        is_stuck = False
        with _stop_signals() as stop_requested:
            while self.step < self.num_steps:
                stopping = self.train_step(torch.tensor(float(stop_requested())))
                self.step += 1
                if self.step == first + 1:
                    self.on_first_step()
                last = self.step == self.num_steps or stopping
                if last or self.step % recipe.log.every_steps == 0:
                    self._log()
                    is_stuck = skips.is_stuck(self.step, self.num_skipped)
                    last = last or is_stuck
                if self.step == self.num_steps or _due(self.step, recipe.eval.every_steps):
                    self._timed(self.evaluate)
                if last or _due(self.step, recipe.checkpoint.every_steps):
                    self._timed(self.save)
                if is_stuck:
                    raise stuck(self.step, self.num_skipped, f"of the last {WINDOW_STEPS} steps")
                if stopping:
                    return "stopped"
        if 2 * self.num_skipped > self.num_steps:
            raise stuck(self.step, self.num_skipped, "steps")
        return "finished"

    @torch.no_grad()
    def train_step(self, stop_requested: Tensor) -> bool:
        """Do one optimizer step on the next batch; return whether any rank asked to stop.

        Args:
            stop_requested: fp32 scalar, 1 where this rank asks to stop after the step.
        """
        recipe, engine = self.recipe, self.engine
        seed_step(recipe.seed, self.step, engine.data_rank)
        micro_batches, num_valid, stopping = self._next_batch(stop_requested)
        context = StepContext(step=self.step, num_steps=self.num_steps, num_micro_batches=len(micro_batches))
        for rule in self.step_rules:
            rule.begin_step(context)
        factor = lr_factor(recipe.schedule, self.step, self.num_steps)
        for group in engine.param_groups:
            group["lr"] = group["initial_lr"] * factor
        with torch.enable_grad():
            losses = engine.forward_backward(micro_batches, num_valid)
        self.before_update()
        for rule in self.step_rules:
            rule.before_optimizer(context)
        norm = engine.clip(recipe.train.max_grad_norm)
        skip = ~torch.isfinite(norm)
        engine.step(skip)
        for rule in self.step_rules:
            rule.after_optimizer(context)
        self.meter.update(losses, num_valid, norm, skip)
        if recipe.train.non_finite == "stop" and engine.device.type == "cpu" and skip:
            self._raise_non_finite()
        return stopping

    def _next_batch(self, stop_requested: Tensor) -> tuple[list[Batch], Tensor, bool]:
        """This rank's micro-batches, the global number of targets, and whether any rank must stop."""
        engine, recipe = self.engine, self.recipe
        num_rows = recipe.batch.tokens_per_step // recipe.data.sequence_length
        rows = self.data.next_rows(num_rows, rank=engine.data_rank, world_size=engine.data_size)
        counts = torch.stack([(rows["labels"] != -100).sum().float(), stop_requested]).to(engine.device)
        num_valid, num_stopping = sum_over_ranks(counts).unbind()
        on_device = {name: value.to(engine.device, non_blocking=True) for name, value in rows.items()}
        chunks = {name: value.chunk(self.num_micro_batches) for name, value in on_device.items()}
        micro_batches: list[Batch] = [
            {name: chunks[name][index] for name in chunks} for index in range(self.num_micro_batches)
        ]
        # On CUDA the flag is read only when a record is due anyway, since reading it waits.
        due = engine.device.type == "cpu" or (self.step + 1) % recipe.log.every_steps == 0
        return micro_batches, num_valid.clamp(min=1), due and bool(num_stopping > 0)

    def _log(self) -> None:
        group = self.engine.param_groups[0]
        tokens_per_step = self.recipe.batch.tokens_per_step
        skipped_before = self.num_skipped
        record = self.meter.record(
            step=self.step, tokens=self.data.position_tokens, lr=group["lr"], tokens_per_step=tokens_per_step
        )
        self.num_skipped = record.skipped_steps
        for observer in self.observers:
            observer.on_step(record)
        if self.recipe.train.non_finite == "stop" and self.num_skipped > skipped_before:
            self._raise_non_finite()

    def _raise_non_finite(self) -> None:
        raise RunError(
            f"non-finite loss or gradient in step {self.step + 1}; its update was not applied. Lower "
            f"optimizer.lr, look at the data, or set train.non_finite=skip to drop such steps"
        )

    def _timed(self, action: Callable[[int], None]) -> None:
        started = time.perf_counter()
        action(self.step)
        self.meter.pause(time.perf_counter() - started)


def _due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM and SIGUSR1 (pre-emption by a scheduler) into a request to stop after the step."""
    requested = False

    def request(*_: object) -> None:
        nonlocal requested
        requested = True

    previous = {sig: signal.signal(sig, request) for sig in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: requested
    finally:
        for sig, handler in previous.items():
            signal.signal(sig, handler)
