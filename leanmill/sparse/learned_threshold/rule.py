"""What pushes learned thresholds up, and how much they prune."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.rules import StepContext, StepRule, check_trained
from leanmill.core.site import Site
from leanmill.core.sites import iter_stages
from leanmill.core.views import View, Views
from leanmill.sparse.learned_threshold.stage import LearnedThreshold


class PushThresholds(StepRule):
    """Adds the gradient of push * sum of exp(-t) to that of the thresholds, once a step, before clipping.

    With a budget s* it is that times (s* - s) / s*, not below -1, s the share that is pruned in the step.

    Args:
        model: Walked anew every step.
        push: alpha.
        budget: s*; None pushes always as much.
    """

    name = "learned_threshold"

    def __init__(self, model: nn.Module, push: float, budget: float | None = None) -> None:
        self.model, self.push, self.budget = model, push, budget
        self._sparsity: float | None = None

    def check(self) -> None:
        for site, _ in self._stages():
            check_trained(self.name, site.site_name, site.raw_weight.requires_grad)

    def before_optimizer(self, context: StepContext) -> None:
        assert context.views is not None
        push = self.push
        if self.budget is not None:
            pruned = self._pruned(context.views) or 0.0
            push *= max(-1.0, (self.budget - pruned) / self.budget)
        for _, stage in self._stages():
            view = context.views.of(stage.threshold)
            gradient = view.grad
            if gradient is not None:
                gradient.sub_(torch.exp(-view.value), alpha=push)

    def after_optimizer(self, context: StepContext) -> None:
        if context.is_reported:
            assert context.views is not None
            self._sparsity = self._pruned(context.views)

    def _pruned(self, views: Views) -> float | None:
        """Return the share of all weights below their thresholds; None where there are no weights. A collective."""
        num_kept = num_weights = 0
        for site, stage in self._stages():
            weight = views.of(site.raw_weight)  # type: ignore[arg-type]
            num_kept += _num_kept(weight, _whole(stage.threshold, views))
            num_weights += weight.numel
        return 1 - num_kept / num_weights if num_weights else None

    def _stages(self) -> Iterator[tuple[Site, LearnedThreshold]]:
        return iter_stages(self.model, LearnedThreshold)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._sparsity is None else {"sparsity": self._sparsity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sparsity = state["sparsity"]

    def metrics(self) -> Mapping[str, float]:
        return {} if self._sparsity is None else {"sparsity": self._sparsity}


def _whole(threshold: nn.Parameter, views: Views) -> Tensor:
    """All thresholds of a weight, flat; a number a row at most, so that they may be summed over ranks."""
    view = views.of(threshold)
    whole = view.value.new_zeros(view.numel)
    whole[view.index().flatten()] = view.value.flatten()
    return view.reduce(whole, "sum")


def _num_kept(weight: View, thresholds: Tensor) -> int:
    """Return how many weights of the whole are not below their threshold, of each of which one is left at least."""
    sharing = weight.index().flatten() // (weight.numel // len(thresholds))
    is_kept = ~(weight.value.flatten().abs() < thresholds[sharing])
    counts = torch.zeros(len(thresholds), dtype=torch.int64, device=thresholds.device)
    counts.index_add_(0, sharing, is_kept.long())
    return int(weight.reduce(counts, "sum").clamp(min=1).sum())
