"""When masks move, and what is dropped and grown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from leanmill.core.noise import derive_seed, uniform
from leanmill.core.rules import StepContext
from leanmill.core.selection import largest, largest_of_all
from leanmill.core.site import Site
from leanmill.core.stage import Slot
from leanmill.core.views import View
from leanmill.sparse.held import HeldMask, HeldMaskRule, write_mask
from leanmill.sparse.rigl.stage import MovingMask
from leanmill.sparse.units import Scope


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The paper's f_decay(t; alpha, T_end), and when it is asked."""

    every_steps: int
    """Steps between updates (Delta T)."""
    drop_fraction: float
    """Share of the active weights dropped in the first update (alpha)."""
    until: float
    """Share of the run after which masks rest (T_end / steps)."""

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether masks move in `step`; never in the first one, whose weights have not trained."""
        return self.drop_fraction > 0 and step > 0 and step % self.every_steps == 0 and step < self.until * num_steps

    def fraction(self, step: int, num_steps: int) -> float:
        """Return alpha / 2 (1 + cos(pi t / T_end))."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * step / (self.until * num_steps)))


class MoveMasks(HeldMaskRule):
    """Keeps masked weights at rest, and moves masks now and then.

    `rigl` grows where the dense gradient is largest and takes the optimizer's place in that step, as in the
    paper; `set` moves masks after the optimizer's step and grows at random. A step whose gradients are not
    finite moves nothing.

    Args:
        model: Walked anew every step.
        method: See above.
        schedule: When, and how much.
        seed: Of the random growth of `set`.
        scope: What is compared: the weights of each layer, or all of them.
    """

    name = "rigl"
    stage_type: ClassVar[type[HeldMask]] = MovingMask

    def __init__(
        self,
        model: nn.Module,
        method: Literal["rigl", "set"],
        schedule: Schedule,
        *,
        seed: int,
        scope: Scope = "layer",
    ) -> None:
        super().__init__(model)
        self.method, self.schedule, self.seed, self.scope = method, schedule, seed, scope
        self._grown: dict[str, Tensor] = {}
        """By site, until it is known whether the step counts: masks found from gradients, or with `global` these."""
        self._metrics: dict[str, float] = {}

    def look(self, site: Site, weight: View, mask: View, gradient: Tensor, context: StepContext) -> None:
        if self.replaces_optimizer(context):
            growth = gradient.abs()
            is_whole = self.scope == "global"
            self._grown[site.site_name] = growth if is_whole else self._moved(site, weight, mask, growth, context)

    def replaces_optimizer(self, context: StepContext) -> bool:
        return self.method == "rigl" and self.schedule.is_due(context.step, context.num_steps)

    def after_optimizer(self, context: StepContext) -> None:
        grown, self._grown = self._grown, {}
        if not self.schedule.is_due(context.step, context.num_steps) or bool(context.skipped):
            return
        if self.scope == "global":
            grown = self._moved_together(grown, context)
        written: list[View] = []
        num_active = num_new = num_weights = 0
        for site, weight, mask in self.views(context):
            if self.method == "set" and self.scope == "layer" and site.raw_weight.requires_grad:
                grown[site.site_name] = self._moved(site, weight, mask, self._noise(site, weight, context), context)
            if site.site_name not in grown:  # a layer that does not train in this step
                continue
            counts = torch.stack(write_mask(weight, mask, grown[site.site_name]))
            active, new = weight.reduce(counts, "sum").tolist()
            num_active, num_new, num_weights = num_active + active, num_new + new, num_weights + weight.numel
            written += [weight, mask]
        assert context.views is not None
        context.views.publish(written)
        if num_weights:
            self._metrics = {"density": num_active / num_weights, "num_moved": float(num_new)}

    def _moved(self, site: Site, weight: View, mask: View, growth: Tensor, context: StepContext) -> Tensor:
        """Return the mask after dropping the smallest active weights and growing where `growth` is largest."""
        stage = site.stage(Slot.MASK)
        assert isinstance(stage, MovingMask)
        active = min(int(weight.reduce(mask.value.sum(), "sum")), stage.num_active)
        num_kept = active - int(self.schedule.fraction(context.step, context.num_steps) * active)
        kept = largest(weight.value.float(), num_kept, among=mask.value, view=weight)
        return kept | largest(growth.float(), stage.num_active - num_kept, among=~kept, view=weight)

    def _moved_together(self, growth: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Return masks by site, of all weights together what `_moved` is of one's."""
        layers = list(self.views(context))
        if self.method == "set":
            trained = [layer for layer in layers if layer[0].raw_weight.requires_grad]
            growth = {site.site_name: self._noise(site, weight, context) for site, weight, _ in trained}
        layers = [layer for layer in layers if layer[0].site_name in growth]
        views, masks = [weight for _, weight, _ in layers], [mask.value for _, _, mask in layers]
        active = sum(int(weight.reduce(mask.sum(), "sum")) for weight, mask in zip(views, masks, strict=True))
        num_kept = active - int(self.schedule.fraction(context.step, context.num_steps) * active)
        kept = largest_of_all([view.value.float() for view in views], num_kept, among=masks, views=views)
        scores = [growth[site.site_name].float() for site, _, _ in layers]
        free = [~mask for mask in kept]
        grown = largest_of_all(scores, active - num_kept, among=free, views=views)
        return {layer[0].site_name: a | b for layer, a, b in zip(layers, kept, grown, strict=True)}

    def _noise(self, site: Site, weight: View, context: StepContext) -> Tensor:
        key = derive_seed(self.seed, self.name, site.site_name, context.step)
        return uniform(torch.tensor([key], device=weight.value.device), weight.index())

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self._metrics} if self._metrics else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._metrics = dict(state["metrics"])

    def metrics(self) -> Mapping[str, float]:
        return self._metrics
