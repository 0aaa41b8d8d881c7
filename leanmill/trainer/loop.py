"""The training loop, on one screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.core.batches import Batch, BatchRule
from leanmill.core.ledger import ledger_of
from leanmill.core.rules import StepContext, StepRule, metrics_of
from leanmill.data.build import TrainData
from leanmill.optim.schedules import decays, lr_factor
from leanmill.parallel.collectives import among, max_over_ranks, sum_over_ranks
from leanmill.parallel.engine import Engine, Losses
from leanmill.parallel.low_comm.outer import OuterSteps
from leanmill.parallel.pulse import Pulse
from leanmill.parallel.slow_ranks import SlowRanks
from leanmill.recipe.root import Recipe
from leanmill.report.observer import Observer
from leanmill.trainer.meter import Meter
from leanmill.trainer.non_finite import source_of
from leanmill.trainer.rng import seed_step
from leanmill.trainer.scoring import Scores
from leanmill.trainer.skipping import WINDOW_STEPS, SkipWatch, stuck
from leanmill.trainer.spikes import SpikeWatch
from leanmill.trainer.stop import Stop, agreement_for
from leanmill.trainer.troubles import NON_FINITE, SPIKE, Action, Kind, Troubles, error_of


MAX_RECENT_BYTES = 64 << 20
"""What batches since the last record may take on the device, besides the last one."""


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
    outer: OuterSteps | None = None
    """What workers do together, where they step without each other; None where all ranks step together."""
    rows_per_epoch: int | None = None
    """Rows of a pass over the data; None where it is not known."""
    step: int = 0
    """Steps done so far."""
    pulse: Pulse = field(default_factory=Pulse)
    """Where what is being done is said, for ranks that wait for this one."""
    slow_ranks: SlowRanks | None = None
    """Who is slower than other ranks, where that is looked at."""
    num_skipped: int = 0
    meter: Meter = field(init=False)

    def __post_init__(self) -> None:
        self._scores = Scores(self.engine)
        spike, device = self.recipe.train.spike, self.engine.device
        self.spikes = None if spike is None else SpikeWatch(spike, device)
        actions: dict[Kind, Action] = {NON_FINITE: self.recipe.train.non_finite}
        self._troubles = Troubles(actions if spike is None else {**actions, SPIKE: spike.action}, device)
        # Of the steps since the last record: where one turns out not to be finite, it is looked at once more.
        self._recent: dict[int, tuple[Sequence[Batch], Tensor]] = {}

    def start(self) -> None:
        """Start the clock; `run` does it too."""
        ledger = ledger_of(self.engine.module)
        self.meter = Meter(self.engine.device, self.num_skipped, ledger, self.slow_ranks)

    def run(self, asked: Callable[[], Stop] = lambda: Stop.NOT_ASKED) -> Stop:
        """Train to the end, or until a rank is asked to stop: then its step is the last, and saved.

        Args:
            asked: What this rank was asked by now.

        Returns:
            What ended the run early, or NOT_ASKED at its end.
        """
        self.start()
        recipe, first, agreement = self.recipe, self.step, agreement_for(self.engine.device, self.outer)
        skips = SkipWatch(self.step, self.num_skipped)
        while self.step < self.num_steps:
            with among(self._step_group):
                self.train_step()
            self.step += 1
            self._outer_step()
            if self.step == first + 1:
                self.on_first_step()
            finished, stop, is_stuck = self.step == self.num_steps, Stop.NOT_ASKED, False
            if self._meets(self.step):
                stop = agreement.reached(asked())
            if stop or self._is_reported(self.step):
                self._log()
                is_stuck = skips.is_stuck(self.step, self.num_skipped)
            # Whoever asked to stop may not wait for long: an evaluation has time after the resume.
            if not stop and (finished or _due(self.step, recipe.eval.every_steps)):
                self._timed(self.evaluate, "evaluation")
                stop = stop if finished else agreement.reached(asked())
            is_kept = self.step in recipe.checkpoint.keep_steps
            if finished or stop or is_stuck or is_kept or _due(self.step, recipe.checkpoint.every_steps):
                self._timed(self.save, "checkpoint")
                stop = stop if finished else max(stop, agreement.reached(asked()))
            if is_stuck:
                raise stuck(self.step, self.num_skipped, f"of the last {WINDOW_STEPS} steps")
            if stop:
                return stop
        if 2 * self.num_skipped > self.num_steps:
            raise stuck(self.step, self.num_skipped, "steps")
        return Stop.NOT_ASKED

    @torch.no_grad()
    def train_step(self) -> None:
        """Do one optimizer step on the next batch."""
        recipe, engine = self.recipe, self.engine
        seed_step(recipe.seed, self.step, engine.data_rank)
        context = StepContext(
            step=self.step,
            num_steps=self.num_steps,
            num_micro_batches=self.num_micro_batches,
            views=engine.views,
            is_reported=self._is_reported(self.step + 1),
        )
        for rule in self.step_rules:
            rule.begin_step(context)
        self.pulse.enter("reading data", self.step + 1)
        micro_batches, num_valid = self._next_batch(context)
        self.pulse.enter("forward and backward")
        factor = lr_factor(recipe.schedule, self.step, self.num_steps)
        has_decay = decays(recipe.schedule, self.step, self.num_steps)
        for group in engine.param_groups:
            group["lr"] = group["initial_lr"] * factor
            group["weight_decay"] = group["initial_weight_decay"] if has_decay else 0.0
        with torch.enable_grad():
            losses = engine.forward_backward(micro_batches, num_valid)
        self.pulse.enter("update")
        self.before_update()
        for rule in self.step_rules:
            rule.before_optimizer(context)
        norm = engine.clip(recipe.train.max_grad_norm)
        flags: dict[Kind, Tensor] = {
            NON_FINITE: ~torch.isfinite(norm),
            SPIKE: self._stands_out(losses, num_valid, norm),
        }
        skip = flags[NON_FINITE] | flags[SPIKE]
        engine.step(skip | any(rule.replaces_optimizer(context) for rule in self.step_rules))
        for rule in self.step_rules:
            rule.after_optimizer(replace(context, skipped=skip))
        self.meter.update(losses, num_valid, norm, skip)
        if self._troubles.actions:
            self._keep(micro_batches, num_valid)
            self._troubles.see(self.step + 1, flags)
            if self._reads_at_once:
                self._look_for_trouble()

    @property
    def _step_group(self) -> dist.ProcessGroup | None:
        """The ranks that step together, where those are not all."""
        return None if self.outer is None else self.outer.layout.inside

    def _meets(self, step: int) -> bool:
        """Whether all ranks meet after `step` steps, so that a collective of all keeps none from stepping on."""
        return self.outer is None or step == self.num_steps or self.outer.meets(step)

    def _outer_step(self) -> None:
        """Let workers exchange what is due, which one may wait for longer than for anything within a step."""
        if self.outer is not None:
            self._enter_exchange(self.outer)
            self.outer.after_step(self.step, is_last=self.step == self.num_steps)

    def _enter_exchange(self, outer: OuterSteps) -> None:
        self.pulse.enter("exchange between workers", patience_seconds=outer.config.patience_seconds)

    def _is_reported(self, step: int) -> bool:
        """Whether a record is due after `step` steps, unless the run is asked to stop before."""
        return step == self.num_steps or step % self.recipe.log.every_steps == 0

    @property
    def _reads_at_once(self) -> bool:
        """Whether a tensor's value costs no waiting; on CUDA it is read when a record is due."""
        return self.engine.device.type == "cpu"

    def _next_batch(self, context: StepContext) -> tuple[Sequence[Batch], Tensor]:
        """This rank's micro-batches, as batch rules leave them, and the global number of their targets."""
        engine, recipe = self.engine, self.recipe
        num_rows = recipe.batch.tokens_per_step // recipe.data.sequence_length
        rows = self.data.next_rows(num_rows, rank=engine.data_rank, world_size=engine.data_size)
        on_device = {name: value.to(engine.device, non_blocking=True) for name, value in rows.items()}
        chunks = {name: value.chunk(self.num_micro_batches) for name, value in on_device.items()}
        micro_batches: Sequence[Batch] = [
            {name: chunks[name][index] for name in chunks} for index in range(self.num_micro_batches)
        ]
        for rule in self.step_rules:
            if isinstance(rule, BatchRule):
                micro_batches = rule.change_batches(micro_batches, context, self._scores)
        targets = [(batch["labels"] != -100).sum() for batch in micro_batches]
        return micro_batches, sum_over_ranks(torch.stack(targets).sum().float()).clamp(min=1)

    def _log(self) -> None:
        with among(self._step_group):
            self._record()

    def _record(self) -> None:
        group = self.engine.param_groups[0]
        tokens, tokens_per_step = self.data.position_tokens, self.recipe.batch.tokens_per_step
        record = self.meter.record(
            step=self.step,
            tokens=tokens,
            lr=group["lr"],
            tokens_per_step=tokens_per_step,
            metrics=metrics_of(self.step_rules) | ({} if self.outer is None else self.outer.metrics()),
            epoch=None
            if self.rows_per_epoch is None
            else tokens / self.recipe.data.sequence_length / self.rows_per_epoch,
        )
        self.num_skipped = record.skipped_steps
        for observer in self.observers:
            observer.on_step(record)
        self._look_for_trouble()

    def _stands_out(self, losses: Losses, num_valid: Tensor, norm: Tensor) -> Tensor:
        """Whether the step is a spike, bool scalar, equal on all ranks."""
        if self.spikes is None:
            return torch.zeros_like(norm, dtype=torch.bool)
        return self.spikes.stands_out(sum_over_ranks(losses["total"].detach()) / num_valid, norm)

    def _keep(self, micro_batches: Sequence[Batch], num_valid: Tensor) -> None:
        """Keep a step's batch until it is known to have been finite, as long as that takes little memory."""
        self._recent[self.step + 1] = micro_batches, num_valid
        size = sum(value.numel() * value.element_size() for batch in micro_batches for value in batch.values())
        while len(self._recent) * size > MAX_RECENT_BYTES and len(self._recent) > 1:
            self._recent.pop(min(self._recent))

    def _look_for_trouble(self) -> None:
        """End the loop where a step since the last look asks for it."""
        trouble = self._troubles.read()
        if trouble is not None:
            where = ""
            # What a rank keeps may depend on what its batches hold, and looking is a collective.
            is_lost = max_over_ranks(torch.tensor(float(trouble.step not in self._recent)))
            if trouble.kind == NON_FINITE and not is_lost:
                seed_step(self.recipe.seed, trouble.step - 1, self.engine.data_rank)
                where = f": {source_of(self.engine, *self._recent[trouble.step])}"
            raise error_of(trouble, where, self.data.position_tokens // self.recipe.data.sequence_length)
        self._recent.clear()

    def _timed(self, action: Callable[[int], None], phase: str) -> None:
        if self.outer is not None:
            # What follows waits for all ranks, and not long: workers that train on while something travels may be
            # apart by as many steps.
            self._enter_exchange(self.outer)
            self.outer.meet()
        self.pulse.enter(phase)
        started = time.perf_counter()
        action(self.step)
        self.meter.pause(time.perf_counter() - started)


def _due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0
