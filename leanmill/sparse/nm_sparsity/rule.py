"""What happens once a step to N:M masks: their schedule, their decay, and how many of their bits flip."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext, StepRule, check_trained
from leanmill.core.site import Site
from leanmill.core.sites import changed_before, iter_sites
from leanmill.core.stage import Slot
from leanmill.core.views import View
from leanmill.sparse.groups import PieceMasks
from leanmill.sparse.nm_sparsity.stage import NMSparsityStage
from leanmill.sparse.schedule import Masking, MaskSchedule, WarmedUp


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
        for _, stage in self._stages():
            stage.start_step(context.step, context.num_steps)

    def _stages(self) -> Iterator[tuple[Site, NMSparsityStage]]:
        for _, site in iter_sites(self.model):
            stage = site.stage(Slot.MASK)
            if isinstance(stage, NMSparsityStage):
                yield site, stage

    def state_dict(self) -> dict[str, Any]:
        # The schedule needs none; a finished run that is only evaluated has no step to ask it for.
        return {} if self._now is None else {"masking": list(self._now)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.schedule is None or "masking" not in state:  # whatever the checkpoint had
            return
        self._now = Masking(*state["masking"])
        for _, stage in self._stages():
            if stage.schedule is self.schedule:
                stage.take(self._now)

    def metrics(self) -> Mapping[str, float]:
        return {} if self._now is None else self._now._asdict()


class FollowMasks(FollowSchedule):
    """Knows the masks of the weights that the optimizer writes: pulls pruned weights, and counts what flips.

    Where fp32 masters are cut anywhere, groups are put together from their parts; no weight is gathered.

    Args:
        model: Walked anew every step.
        schedule: As above.
        names: Of the sites whose masks these are.
        pull: What pruned weights are multiplied with to be the `pull` of the optimizer; None pulls none.
        counts_flips: Whether metrics have the share of mask bits that the last step changed.
        transposable: The mask is that of `nm_mask(..., transposable=True)`.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: MaskSchedule | None,
        *,
        names: Collection[str],
        pull: WarmedUp | None,
        counts_flips: bool,
        transposable: bool = False,
    ) -> None:
        super().__init__(model, schedule)
        self.names, self.pull, self.counts_flips = frozenset(names), pull, counts_flips
        self._masks = PieceMasks(transposable=transposable)
        self._before: dict[str, Tensor] = {}
        """By site, in a step whose flips are counted: the mask that its forward had."""
        self._flip_rate: float | None = None

    def check(self) -> None:
        for site, _ in self._own():
            check_trained(self.name, site.site_name, site.raw_weight.requires_grad)
            before = changed_before(site, Slot.MASK)
            if before is not None:
                raise ConfigError(
                    f"nm_sparsity looks at the mask of {site.site_name} beside the optimizer, and {before!r} "
                    f"changes the weight before the mask; set nm_sparsity.decay_on: gradient and log_flips: false, or "
                    f"remove one of the two techniques"
                )

    def before_optimizer(self, context: StepContext) -> None:
        counts = self.counts_flips and context.is_reported
        if self.pull is None and not counts:
            return
        for site, stage, weight in self._views(context):
            mask = self._mask_of(site, stage, weight)
            if counts:
                self._before[site.site_name] = mask
            if self.pull is not None and (pull := weight.states().get("pull")) is not None:
                strength = self.pull.at(context.step, context.num_steps)
                is_dense = stage.masking[2] == 1
                pull.copy_(torch.where(mask, 0.0, 0.0 if is_dense else weight.value * strength))

    def after_optimizer(self, context: StepContext) -> None:
        before, self._before = self._before, {}
        if not before:
            return
        num_flips = num_weights = 0
        for site, stage, weight in self._views(context):
            flips = (self._mask_of(site, stage, weight) != before[site.site_name]).sum()
            num_flips += int(weight.reduce(flips, "sum"))
            num_weights += weight.numel
        self._flip_rate = num_flips / num_weights

    def _own(self) -> Iterator[tuple[Site, NMSparsityStage]]:
        seen: set[int] = set()
        for site, stage in self._stages():
            if site.site_name in self.names and id(stage) not in seen:  # tied weights share theirs
                seen.add(id(stage))
                yield site, stage

    def _views(self, context: StepContext) -> Iterator[tuple[Site, NMSparsityStage, View]]:
        assert context.views is not None
        for site, stage in self._own():
            yield site, stage, context.views.of(site.raw_weight)  # type: ignore[arg-type]

    def _mask_of(self, site: Site, stage: NMSparsityStage, weight: View) -> Tensor:
        num_kept, group_size, _ = stage.masking.tolist()
        # Of what the model holds: a bf16 copy of an fp32 master under ZeRO.
        return self._masks.of(weight, int(num_kept), int(group_size), site.raw_weight.dtype)

    def metrics(self) -> Mapping[str, float]:
        told = dict(super().metrics())
        return told if self._flip_rate is None else told | {"flip_rate": self._flip_rate}

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return state if self._flip_rate is None else state | {"flip_rate": self._flip_rate}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._flip_rate = state.get("flip_rate")
        super().load_state_dict(state)
