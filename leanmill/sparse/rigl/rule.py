"""When masks move, and what is dropped and grown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.noise import derive_seed, uniform
from leanmill.core.rules import StepContext, StepRule, check_trained
from leanmill.core.selection import largest
from leanmill.core.site import Site
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot
from leanmill.core.views import View
from leanmill.sparse.rigl.stage import MovingMask


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


class MoveMasks(StepRule):
    """Keeps masked weights at rest, and moves masks now and then.

    Every step gradients of masked weights are zeroed before clipping, so neither the norm nor the optimizer
    sees them. As their value and moments are 0 too, no element-wise optimizer moves them.

    `rigl` grows where the dense gradient is largest and takes the optimizer's place in that step, as in the
    paper; `set` moves masks after the optimizer's step and grows at random. A step whose gradients are not
    finite moves nothing.

    Args:
        model: Walked anew every step.
        method: See above.
        schedule: When, and how much.
        seed: Of the random growth of `set`.
    """

    name = "rigl"

    def __init__(self, model: nn.Module, method: Literal["rigl", "set"], schedule: Schedule, *, seed: int) -> None:
        self.model, self.method, self.schedule, self.seed = model, method, schedule, seed
        self._grown: dict[str, Tensor] = {}
        """By site: masks found from gradients, until it is known whether the step counts."""
        self._metrics: dict[str, float] = {}

    def check(self) -> None:
        for site, _ in self._masks():
            check_trained(self.name, site.site_name, site.raw_weight.requires_grad)
            before = [stage.technique for stage in site.weight_stages() if stage.slot < Slot.MASK]
            if before:
                raise ConfigError(
                    f"rigl drops and grows entries of {site.site_name}, which {before[0]!r} changes before the mask; "
                    f"remove one of the two techniques, or add {site.site_name!r} to rigl.exclude"
                )

    def before_optimizer(self, context: StepContext) -> None:
        grows = self.replaces_optimizer(context)
        for site, weight, mask in self._views(context):
            if context.step == 0:
                weight.value.masked_fill_(~mask.value, 0)
            gradient = weight.grad
            if gradient is None:
                continue
            if grows:
                self._grown[site.site_name] = self._moved(site, weight, mask, gradient.abs(), context)
            # A product, not a fill: what is not finite stays so, and the step is skipped.
            gradient.mul_(mask.value)

    def replaces_optimizer(self, context: StepContext) -> bool:
        return self.method == "rigl" and self.schedule.is_due(context.step, context.num_steps)

    def after_optimizer(self, context: StepContext) -> None:
        grown, self._grown = self._grown, {}
        if not self.schedule.is_due(context.step, context.num_steps) or bool(context.skipped):
            return
        written: list[View] = []
        num_active = num_new = num_weights = 0
        for site, weight, mask in self._views(context):
            if self.method == "set" and site.raw_weight.requires_grad:
                grown[site.site_name] = self._moved(site, weight, mask, self._noise(site, weight, context), context)
            if site.site_name not in grown:  # a layer that does not train in this step
                continue
            counts = torch.stack(_apply(weight, mask, grown[site.site_name]))
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

    def _noise(self, site: Site, weight: View, context: StepContext) -> Tensor:
        key = derive_seed(self.seed, self.name, site.site_name, context.step)
        return uniform(torch.tensor([key], device=weight.value.device), weight.index())

    def _masks(self) -> Iterator[tuple[Site, MovingMask]]:
        seen: set[int] = set()
        for _, site in iter_sites(self.model):
            stage = site.stage(Slot.MASK)
            if isinstance(stage, MovingMask) and id(stage) not in seen:  # tied weights share theirs
                seen.add(id(stage))
                yield site, stage

    def _views(self, context: StepContext) -> Iterator[tuple[Site, View, View]]:
        assert context.views is not None
        for site, stage in self._masks():
            weight = context.views.of(site.raw_weight)  # type: ignore[arg-type]
            yield site, weight, weight.beside(stage.mask)

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self._metrics} if self._metrics else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._metrics = dict(state["metrics"])

    def metrics(self) -> Mapping[str, float]:
        return self._metrics


def _apply(weight: View, mask: View, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Write a new mask; what is not on before and after gets value and optimizer state 0.

    Returns:
        How many of the piece are on, and how many of them were not before.
    """
    stays = moved & mask.value
    for tensor in (weight.value, *weight.states().values()):
        tensor.masked_fill_(~stays, 0)
    mask.value.copy_(moved)
    num_active = moved.sum()
    return num_active, num_active - stays.sum()
