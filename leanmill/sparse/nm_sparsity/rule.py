"""What happens once a step to N:M masks: their schedule, and their decay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from leanmill.core.rules import StepContext, StepRule
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot
from leanmill.sparse.nm_sparsity.stage import NMSparsityStage
from leanmill.sparse.schedule import Masking, MaskSchedule


class FollowSchedule(StepRule):
    """Gives every stage its mask of the step, and lets it add its decay once in it.

    The first backward that reaches a stage takes all of the decay, so it does not matter how many there are: one
    a micro-batch, a chunk of the loss, or a use of a block. Gradients of micro-batches are summed; those
    of ranks are averaged, and every rank adds the same decay.
    """

    name = "nm_sparsity"

    def __init__(self, model: nn.Module, schedule: MaskSchedule | None) -> None:
        self.model, self.schedule = model, schedule
        self._now: Masking | None = None

    def begin_step(self, context: StepContext) -> None:
        if self.schedule is not None:
            self._now = self.schedule.at(context.step, context.num_steps)
        for stage in self._stages():
            stage.start_step(context.step, context.num_steps)

    def _stages(self) -> Iterator[NMSparsityStage]:
        for _, site in iter_sites(self.model):
            stage = site.stage(Slot.MASK)
            if isinstance(stage, NMSparsityStage):
                yield stage

    def state_dict(self) -> dict[str, Any]:
        # The schedule needs none; a finished run that is only evaluated has no step to ask it for.
        return {} if self._now is None else {"masking": list(self._now)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.schedule is None:  # whatever the checkpoint had
            return
        self._now = Masking(*state["masking"])
        for stage in self._stages():
            if stage.schedule is self.schedule:
                stage.take(self._now)

    def metrics(self) -> Mapping[str, float]:
        return {} if self._now is None else self._now._asdict()
