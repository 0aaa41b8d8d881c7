"""When more is pruned, and what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.rules import StepContext
from leanmill.core.site import Site
from leanmill.core.views import View
from leanmill.sparse.gradual_pruning.stage import GradualMask
from leanmill.sparse.held import HeldMask, HeldMaskRule, write_mask
from leanmill.sparse.schedule import GrowingSparsity
from leanmill.sparse.scores import Criterion
from leanmill.sparse.units import Scope, Scored, Unit, choose


class PruneGradually(HeldMaskRule):
    """Turns off the weights that matter least, more of them every so many steps.

    Masks are written after the optimizer's step. What is due in a step whose gradients are not finite is done in the
    next one.

    Args:
        model: Walked anew every step.
        schedule: When, and how much.
        criterion: Which matter least.
        unit: What is pruned as one.
        scope: What is compared with what.
    """

    name = "gradual_pruning"
    stage_type: ClassVar[type[HeldMask]] = GradualMask

    def __init__(
        self, model: nn.Module, schedule: GrowingSparsity, criterion: Criterion, unit: Unit, scope: Scope
    ) -> None:
        super().__init__(model)
        self.schedule, self.criterion, self.unit, self.scope = schedule, criterion, unit, scope
        self._scores: dict[str, Tensor] = {}
        """By site, from before to after the optimizer's step."""
        self._is_owed = False
        self._metrics: dict[str, float] = {}

    def look(self, site: Site, weight: View, mask: View, gradient: Tensor, context: StepContext) -> None:
        if self.criterion.adds_up or (self.criterion.reads_gradient and self._is_due(context)):
            self._scores[site.site_name] = self.criterion.score(weight)

    def _is_due(self, context: StepContext) -> bool:
        return self._is_owed or self.schedule.is_due(context.step, context.num_steps)

    def after_optimizer(self, context: StepContext) -> None:
        scores, self._scores = self._scores, {}
        if self.criterion.adds_up:
            scores = self._added_up(scores, context)
        if not self._is_due(context):
            return
        self._is_owed = bool(context.skipped)
        if self._is_owed:
            return
        layers = self._scored(scores, context)
        sparsity = self.schedule.sparsity(context.step, context.num_steps)
        masks = choose(layers, self.unit, sparsity, self.scope, is_signed=self.criterion.is_signed)
        self._write(layers, masks, context)

    def _scored(self, scores: dict[str, Tensor], context: StepContext) -> list[Scored]:
        """Return the layers that may lose weights; `scores` are those from before the optimizer's step, by site."""
        layers = []
        for site, weight, mask in self.views(context):
            score = scores.pop(site.site_name, None)
            if score is None and self.criterion.reads_gradient:  # a layer that does not train in this step
                continue
            layers.append(Scored(weight, mask, self.criterion.score(weight) if score is None else score))
        return layers

    def _added_up(self, scores: dict[str, Tensor], context: StepContext) -> dict[str, Tensor]:
        """Add those of the step to the sums in the optimizer's state, and return these."""
        assert context.skipped is not None
        sums = {}
        for site, weight, _ in self.views(context):
            total = weight.states().get("kept_0")
            if total is None:  # nothing of the weight is here
                total = weight.value.float()
            elif site.site_name in scores:
                total.add_(torch.where(context.skipped, 0.0, scores[site.site_name]))
            sums[site.site_name] = total
        return sums

    def _write(self, layers: Sequence[Scored], masks: Sequence[Tensor], context: StepContext) -> None:
        num_active = 0
        for layer, moved in zip(layers, masks, strict=True):
            active, _ = write_mask(layer.weight, layer.mask, moved)
            num_active += int(layer.weight.reduce(active, "sum"))
        assert context.views is not None
        context.views.publish([view for layer in layers for view in (layer.weight, layer.mask)])
        total = sum(layer.weight.numel for layer in layers)
        if total:
            self._metrics = {"sparsity": 1 - num_active / total}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"metrics": self._metrics} if self._metrics else {}
        return state | ({"is_owed": True} if self._is_owed else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._metrics, self._is_owed = dict(state.get("metrics", {})), bool(state.get("is_owed"))

    def metrics(self) -> Mapping[str, float]:
        return self._metrics
