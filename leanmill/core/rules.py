"""Step rules: what happens exactly once an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step rule may know about the optimizer step it runs in."""

    step: int
    """Index of the optimizer step, from 0."""
    num_steps: int
    """Optimizer steps of the whole run."""
    num_micro_batches: int
    """Backward passes that this rank adds up in this step."""


class StepRule:
    """Work done exactly once an optimizer step, under no_grad, on every rank.

    Rules write tensors (never Python numbers that a compiled block would specialise on) and walk
    live modules (never cached parameters, which sharding replaces).
    """

    def begin_step(self, context: StepContext) -> None:
        """Run before the first forward of the step: write schedules into buffers."""

    def before_optimizer(self, context: StepContext) -> None:
        """Run after the last backward and before clipping."""

    def after_optimizer(self, context: StepContext) -> None:
        """Run after the optimizer has written the weights."""
