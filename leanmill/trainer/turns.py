"""Parameters that take turns: the engine is told before a step which train in it."""

from __future__ import annotations

from torch import nn

from leanmill.core.parameters import TrainableSchedule
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.sites import clean_name
from leanmill.parallel.engine import Engine
from leanmill.parallel.naming import state_parameters


class Turns(StepRule):
    """Applies a schedule to the parameters that may train.

    Args:
        schedule: Which train in a step.
        model: Prepared but not yet sharded, every parameter that may train requiring a gradient.
    """

    def __init__(self, schedule: TrainableSchedule, model: nn.Module) -> None:
        self.schedule, self.name = schedule, schedule.technique
        self.names = {clean_name(name): name for name, p in state_parameters(model) if p.requires_grad}
        """Of all that may train: name in the plain model -> name in states."""
        self._sizes = {clean_name(name): p.numel() for name, p in state_parameters(model) if p.requires_grad}
        self.engine: Engine | None = None
        self._turn = -1

    def heaviest(self) -> set[str]:
        """Names, as in states, of the largest set that trains at once."""
        return {self.names[name] for name in self.schedule.heaviest(self._sizes)}

    def begin_step(self, context: StepContext) -> None:
        assert self.engine is not None
        turn = context.step // self.schedule.every_steps
        if turn != self._turn:
            self._turn = turn
            self.engine.set_trainable({self.names[name] for name in self.schedule.trained(self.names, context.step)})
