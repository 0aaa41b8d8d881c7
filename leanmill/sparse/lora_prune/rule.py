"""Importance from the gradients of adapters, and masks by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.site import Site
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot
from leanmill.core.views import View, Views, part_of, whole_of
from leanmill.sparse.lora_prune.stage import StructureMask
from leanmill.sparse.schedule import GrowingSparsity


Masked = tuple[Site, StructureMask]
_TINY = 1e-8
"""Added to the norm of a matrix's importances, as the authors do."""


class PruneByAdapters(StepRule):
    """Averages the importance of structures over steps, and masks the least of every layer, more and more.

    Importance is looked at before the optimizer's step and kept after it. What is due in a step whose gradients are
    not finite is done in the next one.

    Args:
        model: Walked anew every step.
        schedule: When, and how much.
        smoothing: What the old importance counts for.
    """

    name = "lora_prune"

    def __init__(self, model: nn.Module, schedule: GrowingSparsity, smoothing: float) -> None:
        self.model, self.schedule, self.smoothing = model, schedule, smoothing
        self._found: list[Tensor] = []
        """Importance of the step's gradients, of each half, from before to after the optimizer's step."""
        self._is_owed = False
        self._metrics: dict[str, float] = {}

    def check(self) -> None:
        for half in self._halves():
            for site, _ in half:
                if len(list(_factors(site))) != 1:
                    raise ConfigError(
                        f"lora_prune reads the gradients of one adapter in the weight of {site.site_name}, which has "
                        f"{len(list(_factors(site)))}; add {{type: lora}} with where: weight and without targets, once"
                    )
                if site.stage(Slot.COMPACT) is not None:
                    raise ConfigError(
                        f"lora_prune reads the frozen weight of {site.site_name}, which is kept in fewer bytes; leave "
                        f"out what keeps it so"
                    )

    def _halves(self) -> list[list[Masked]]:
        """The masks of each attention and each MLP."""
        found: dict[tuple[int, str], list[Masked]] = {}
        for _, site in iter_sites(self.model):
            stage = site.stage(Slot.MASK)
            if isinstance(stage, StructureMask):
                found.setdefault((stage.layer, stage.part), []).append((site, stage))
        return [found[key] for key in sorted(found)]

    def before_optimizer(self, context: StepContext) -> None:
        assert context.views is not None
        views = context.views
        self._found = [sum(_importance(views, *of) for of in half) for half in self._halves()]  # type: ignore[misc]

    def after_optimizer(self, context: StepContext) -> None:
        assert context.views is not None
        assert context.skipped is not None
        found, self._found = self._found, []
        is_due = self._is_owed or self.schedule.is_due(context.step, context.num_steps)
        self._is_owed = is_due and bool(context.skipped)
        is_due = is_due and not self._is_owed
        sparsity = self.schedule.sparsity(context.step, context.num_steps)
        written: list[View] = []
        num_left: dict[str, list[int]] = {"heads": [], "neurons": []}
        for half, step in zip(self._halves(), found, strict=True):
            (holder,) = (stage for _, stage in half if stage.importance is not None)
            mean = context.views.of(holder.importance)  # type: ignore[arg-type]
            old = whole_of(mean, mean.value)
            new = self.smoothing * old + (1 - self.smoothing) * step
            new = torch.where(context.skipped | ~torch.isfinite(new).all(), old, new)
            mean.value.copy_(part_of(mean, new))
            written.append(mean)
            if is_due:
                kept_view = context.views.of(holder.kept)
                kept = still_kept(new, whole_of(kept_view, kept_view.value) > 0, sparsity)
                masks = [context.views.of(stage.kept) for _, stage in half]
                for mask in masks:
                    mask.value.copy_(part_of(mask, kept))
                written += masks
                num_left[holder.part] += [int(kept.sum()), holder.count]
        context.views.publish(written)
        if is_due:
            self._metrics = {
                f"masked_{part}": 1 - sum(numbers[::2]) / sum(numbers[1::2])
                for part, numbers in num_left.items()
                if numbers
            }

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"metrics": self._metrics} if self._metrics else {}
        return state | ({"is_owed": True} if self._is_owed else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._metrics, self._is_owed = dict(state.get("metrics", {})), bool(state.get("is_owed"))

    def metrics(self) -> Mapping[str, float]:
        return self._metrics


def adapter_gradient(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor) -> Tensor:
    """Return what the gradients of the factors of B A say of that of their product: dB A + B dA - dB dA [out, in].

    LoRAPrune's eq. 7: by how much B A changes in a step of gradient descent, to its sign.
    """
    return grad_b @ a + b @ grad_a - grad_b @ grad_a


def still_kept(importance: Tensor, kept: Tensor, sparsity: float) -> Tensor:
    """Return which structures [n] stay once the share `sparsity`, rounded down, is masked; what is masked stays so."""
    number = int(len(importance) * sparsity + 1e-6)  # 0.29 of 100 are 28.999... in floating point
    # Below what may be the least: importance is not negative.
    order = torch.where(kept, importance, -1.0).argsort(stable=True)
    found = kept.clone()
    found[order[:number]] = False
    return found


def _importance(views: Views, site: Site, stage: StructureMask) -> Tensor:
    """Sums over structures of |gradient x (W + s B A)|, as a share of their norm [count] fp32. A collective."""
    weight = views.of(site.raw_weight)  # type: ignore[arg-type]
    ((a, b, scaling),) = _factors(site)
    view_a, view_b = views.of(a), views.of(b)
    whole_a, whole_b = whole_of(view_a, view_a.value), whole_of(view_b, view_b.value)
    gradient = adapter_gradient(whole_a, whole_b, whole_of(view_a, view_a.grad), whole_of(view_b, view_b.grad))
    delta = scaling * whole_b @ whole_a
    index = weight.index()
    here = (gradient.flatten()[index] * (weight.value.float() + delta.flatten()[index])).abs()
    numbers = stage.numbers(weight.piece.shape, index)
    sums = torch.zeros(stage.count, dtype=torch.float64, device=here.device)
    sums = weight.reduce(sums.index_add_(0, numbers.flatten(), here.flatten().double()), "sum").float()
    return sums / (sums.norm() + _TINY)


def _factors(site: Site) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
    for stage in site.weight_stages():
        factors = stage.trained_factors()
        if factors is not None:
            yield factors
