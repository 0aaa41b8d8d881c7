"""Gradual pruning by the curvature that the last gradients show: M-FAC in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from leanmill.core.rules import StepContext
from leanmill.core.site import Site
from leanmill.core.views import View
from leanmill.sparse.gradual_pruning.rule import PruneGradually
from leanmill.sparse.inverse_fisher import SharedInverse
from leanmill.sparse.schedule import GrowingSparsity
from leanmill.sparse.scores import CRITERIA
from leanmill.sparse.units import Scope, Scored, Unit


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Of which gradients, and among which weights."""

    num_gradients: int
    """Of the last steps, m."""
    block_size: int
    """See `SharedInverse`."""
    damping: float
    """See `SharedInverse`."""


class PruneByCurvature(PruneGradually):
    """Turns off the weights of least w^2 / [F^-1]_ii, and moves the others of their blocks to make up for them.

    F is the Fisher matrix of the gradients of the last m steps, each of its whole batch, kept in the optimizer's state.

    Args:
        model: Walked anew every step.
        schedule: When, and how much.
        scope: What is compared with what.
        curvature: How F is made.
    """

    def __init__(self, model: nn.Module, schedule: GrowingSparsity, scope: Scope, curvature: Curvature) -> None:
        super().__init__(model, schedule, CRITERIA["magnitude"], Unit("weight"), scope)
        self.curvature = curvature
        self._gradients: dict[str, Tensor] = {}
        """By site, from before to after the optimizer's step."""
        self._inverses: list[SharedInverse] = []

    def look(self, site: Site, weight: View, mask: View, gradient: Tensor, context: StepContext) -> None:
        self._gradients[site.site_name] = gradient.clone()

    def after_optimizer(self, context: StepContext) -> None:
        gradients, self._gradients = self._gradients, {}
        for site, weight, _ in self.views(context):
            oldest = weight.states().get(f"kept_{context.step % self.curvature.num_gradients}")
            if oldest is not None and site.site_name in gradients:
                assert context.skipped is not None
                oldest.copy_(torch.where(context.skipped, oldest, gradients[site.site_name]))
        super().after_optimizer(context)
        self._inverses = []

    def _scored(self, scores: dict[str, Tensor], context: StepContext) -> list[Scored]:
        found = []
        for _, weight, mask in self.views(context):
            states, m = weight.states(), self.curvature.num_gradients
            nothing = torch.zeros_like(weight.value)  # where nothing of the weight is here
            inverse = SharedInverse(
                weight,
                [states.get(f"kept_{number}", nothing) for number in range(m)],
                mask.value,
                block_size=self.curvature.block_size,
                damping=self.curvature.damping,
            )
            self._inverses.append(inverse)
            # [F^-1]_ii is m / ridge times the diagonal; the root keeps the order and does not underflow.
            score = weight.value.double().abs() * (inverse.ridge / m / inverse.diagonal()).sqrt()
            found.append(Scored(weight, mask, score.float()))
        return found

    def _write(self, layers: Sequence[Scored], masks: Sequence[Tensor], context: StepContext) -> None:
        for layer, moved, inverse in zip(layers, masks, self._inverses, strict=True):
            value = layer.weight.value
            lost = torch.where(layer.mask.value & ~moved, -value.double() / inverse.diagonal(), 0.0)
            value.copy_(torch.where(moved, value.double() + inverse.times(lost), 0.0))
        super()._write(layers, masks, context)
