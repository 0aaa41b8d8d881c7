"""Step rules: what happens exactly once an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leanmill.core.errors import ConfigError


if TYPE_CHECKING:
    from torch import Tensor

    from leanmill.core.views import Views


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step rule may know about the optimizer step it runs in."""

    step: int
    """Index of the optimizer step, from 0."""
    num_steps: int
    """Optimizer steps of the whole run."""
    num_micro_batches: int
    """Backward passes that this rank adds up in this step."""
    is_replayed: bool = False
    """Whether nothing trains: an export or an evaluation asks for what is scheduled."""
    views: Views | None = None
    """This rank's pieces of weights, gradients and optimizer state; None where nothing trains (an export)."""
    is_reported: bool = True
    """Whether metrics are read after this step, as far as is known before it: who counts for them alone need not
    where they are not."""
    skipped: Tensor | None = None
    """In `after_optimizer`: bool scalar on the device, equal on all ranks, whether the update was kept back (gradients
    were not finite, or stood out), so that weights and optimizer state are as they were. Reading its value waits for
    the device."""


class StepRule:
    """Work done exactly once an optimizer step, under no_grad, on every rank.

    Rules write tensors (never Python numbers that a compiled block would specialise on) and walk
    live modules (never cached parameters, which sharding replaces).
    """

    name: str = "rule"
    """What its state and metrics go by, usually the technique's; a second rule of one name is `name_2`."""

    def check(self) -> None:
        """Refuse a model that the rule cannot work on; called once all techniques are installed.

        Raises:
            ConfigError: For example, a weight to be moved is frozen (see `check_trained`).
        """

    def begin_step(self, context: StepContext) -> None:
        """Run before the first forward of the step: write schedules into buffers.

        A save may still be copying trained parameters and optimizer state here, so it may not write those.
        """

    def before_optimizer(self, context: StepContext) -> None:
        """Run after the last backward and before clipping: gradients are complete, and may be written."""

    def replaces_optimizer(self, context: StepContext) -> bool:
        """Whether the optimizer takes no step this time, for any parameter; the same on all ranks."""
        return False

    def after_optimizer(self, context: StepContext) -> None:
        """Run after the optimizer has written the weights, or has been kept from it (`StepContext.skipped`)."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know beside tensors of the model: JSON-able, equal on all ranks."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned, while the model is still on the meta device."""

    def metrics(self) -> Mapping[str, float]:
        """Return numbers to log beside the losses; equal on all ranks, no collective. Read when a record is due.

        Where a run is asked to stop, also after a step that was not `StepContext.is_reported`: what was not counted
        is left out.
        """
        return {}


def named_rules(rules: Sequence[StepRule]) -> Iterator[tuple[str, StepRule]]:
    """Yield every rule with the name that its state and metrics go by."""
    seen: dict[str, int] = {}
    for rule in rules:
        seen[rule.name] = number = seen.get(rule.name, 0) + 1
        yield rule.name if number == 1 else f"{rule.name}_{number}", rule


def state_of(rules: Sequence[StepRule]) -> dict[str, dict[str, Any]]:
    """Return the state of every rule that has one, by name."""
    states = {name: rule.state_dict() for name, rule in named_rules(rules)}
    return {name: state for name, state in states.items() if state}


def load_state(rules: Sequence[StepRule], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Give every rule what `state_of` returned for it.

    A rule without one starts anew: its technique was added since.

    Raises:
        ConfigError: There is state of a rule that the run has not.
    """
    known = dict(named_rules(rules))
    unknown = [name for name in states if name not in known]
    if unknown:
        raise ConfigError(
            f"the checkpoint holds state of the rule {unknown[0]!r}, which this run has not; add the technique of "
            f"that name to `techniques` again, or give another run_dir"
        )
    for name, state in states.items():
        known[name].load_state_dict(state)


def metrics_of(rules: Sequence[StepRule]) -> dict[str, float]:
    """Return every metric of every rule as `rule/metric`."""
    return {f"{name}/{key}": value for name, rule in named_rules(rules) for key, value in rule.metrics().items()}


def check_trained(technique: str, name: str, is_trained: bool) -> None:
    """Refuse a weight that has no gradient because something froze it.

    Raises:
        ConfigError: See above.
    """
    if not is_trained:
        raise ConfigError(
            f"{technique} moves {name}, but another technique freezes it, so it has no gradient; remove the technique "
            f"that freezes (such as lora), or add {name!r} to {technique}.exclude"
        )
