"""When subspaces are found anew, and what becomes of weights, coordinates and gradients then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanmill.core.noise import derive_seed
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.site import Site
from leanmill.core.sites import iter_stages
from leanmill.core.views import Views, part_of, whole_of
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.peft_ext.galore.natural import natural_gradient
from leanmill.peft_ext.galore.stage import OVERSAMPLE, GaLoreStage, Source, orthonormal
from leanmill.peft_ext.galore.watching import Watcher, in_subspace


class RefreshSubspaces(StepRule):
    """Finds the subspace of a weight anew every so many steps, and whenever the weight begins to train.

    What was trained in the last one becomes part of the weight, whose value does not change but for rounding. With
    `svd` that happens before the optimizer's step, which is then the first in the new subspace; else after it. Moments
    go on, as in the paper; a vector of the new subspace has the sign with which it is more like its predecessor.

    A weight whose gradient was not finite keeps its subspace and is tried again in the next step.

    Args:
        model: Walked anew every step.
        source: Of subspaces, see `GaLore`.
        every_steps: Steps between them.
        damping: Of the natural gradient.
        seed: Of what is drawn.
    """

    name = "galore"

    def __init__(self, model: nn.Module, *, source: Source, every_steps: int, damping: float, seed: int) -> None:
        self.model, self.source, self.every_steps = model, source, every_steps
        self.damping, self.seed = damping, seed
        self._settled: set[str] = set()
        """Sites whose subspace was found since they began to train."""
        self._watchers: dict[str, Watcher] = {}
        """By site, of what is due in this step."""
        self._share: float | None = None

    def begin_step(self, context: StepContext) -> None:
        training = {site.site_name for site, stage in self._stages() if stage.coordinates.requires_grad}
        self._settled &= set() if context.step % self.every_steps == 0 else training
        self._watchers = {}
        for site, stage in self._stages():
            stage.watcher.fill_(-1)
            if site.site_name in training - self._settled:
                watcher = Watcher(self._sketch(site, stage, context.step), is_left=stage.is_left)
                self._watchers[site.site_name] = watcher
                if self.source != "random":
                    stage.watcher.fill_(watcher.number)

    def before_optimizer(self, context: StepContext) -> None:
        assert context.views is not None
        if self.source == "svd":
            self._refresh(context)
        for _, stage in self._stages():
            if stage.past and stage.coordinates.requires_grad:
                coordinates = context.views.of(stage.coordinates)
                oldest = coordinates.beside(stage.past[context.step % len(stage.past)])
                others = [coordinates.beside(one) for one in stage.past]
                natural_gradient(coordinates, others, context.step % len(others), self.damping)
                context.views.publish([oldest])

    def after_optimizer(self, context: StepContext) -> None:
        if self.source != "svd" and not bool(context.skipped):
            self._refresh(context)
        self._watchers = {}

    def _refresh(self, context: StepContext) -> None:
        """Give what is due its new subspace; ranks share the work."""
        views = context.views
        assert views is not None
        shares: list[Tensor] = []
        for number, (site, stage) in enumerate(self._due()):
            watcher = self._watchers[site.site_name]
            seen = self._seen(watcher, stage)
            if seen is not None and not bool(torch.isfinite(seen).all()):
                continue
            coordinates, basis = views.of(stage.coordinates), views.of(stage.basis)
            old = whole_of(basis, basis.value)
            if seen is not None:  # which is where backward ran, while an engine may keep parameters in host memory
                old = old.to(seen.device)
            new = self._subspace(seen, stage, old, site, context.step, owner=number)
            self._take_up(views, site, stage, old, new)
            if seen is not None and self.source == "svd":
                gradient = in_subspace(seen, new, is_left=stage.is_left)
                if coordinates.grad is not None:
                    coordinates.grad.copy_(part_of(coordinates, gradient))
                shares.append(gradient.square().sum() / seen.square().sum().clamp(min=torch.finfo(seen.dtype).tiny))
            self._settled.add(site.site_name)
        if shares:
            self._share = float(torch.stack(shares).mean())

    def _take_up(self, views: Views, site: Site, stage: GaLoreStage, old: Tensor, new: Tensor) -> None:
        """Add what was trained to the weight, and begin in the new subspace."""
        weight, basis, coordinates = (views.of(p) for p in (site.raw_weight, stage.basis, stage.coordinates))  # type: ignore[arg-type]
        trained = whole_of(coordinates, coordinates.value).to(old.device)
        delta = stage.delta_added(torch.zeros(stage.shape, dtype=old.dtype, device=old.device), old, trained)
        weight.value.add_(part_of(weight, delta))
        basis.value.copy_(part_of(basis, new))
        coordinates.value.zero_()
        views.publish([weight, basis, coordinates])

    def _seen(self, watcher: Watcher, stage: GaLoreStage) -> Tensor | None:
        """The mean over ranks of what they have seen, as of gradients; None where nothing is watched."""
        if self.source == "random":
            return None
        total = watcher.total
        if total is None:  # no token of this rank came by
            *experts, num_out, num_in = stage.shape
            shape = (num_out, num_in)
            if watcher.sketch is not None:
                shape = (num_out if stage.is_left else num_in, watcher.sketch.shape[1])
            total = torch.zeros(*experts, *shape, dtype=stage.basis.dtype, device=stage.basis.device)
        watcher.total = None
        return sum_over_ranks(total) / num_ranks()

    def _subspace(
        self, seen: Tensor | None, stage: GaLoreStage, old: Tensor, site: Site, step: int, *, owner: int
    ) -> Tensor:
        """Return a new basis, the same on all ranks."""
        if seen is None:
            drawn = self._drawn(old.shape, "subspace", site, step).to(old)
            return aligned(orthonormal(drawn, is_left=stage.is_left), old, is_left=stage.is_left)
        new = torch.zeros_like(old)
        if owner % num_ranks() == rank():
            is_left = stage.is_left or self.source == "sketch"  # a sketch is of columns, or of rows as columns
            left, _, right = torch.linalg.svd(seen, full_matrices=False)
            found = left[..., : stage.rank] if is_left else right[..., : stage.rank, :]
            found = found if is_left == stage.is_left else found.mT
            new.copy_(aligned(found, old, is_left=stage.is_left))
        return sum_over_ranks(new)

    def _sketch(self, site: Site, stage: GaLoreStage, step: int) -> Tensor | None:
        if self.source != "sketch":
            return None
        num_out, num_in = stage.shape[-2:]
        columns = min(num_out, num_in, stage.rank + OVERSAMPLE)
        drawn = self._drawn((num_in if stage.is_left else num_out, columns), "sketch", site, step)
        return drawn.to(stage.basis.device, stage.basis.dtype)

    def _drawn(self, shape: Sequence[int], what: str, site: Site, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.name, what, site.site_name, step))
        return torch.randn(tuple(shape), generator=generator)

    def _due(self) -> Iterator[tuple[Site, GaLoreStage]]:
        for site, stage in self._stages():
            if site.site_name in self._watchers:
                yield site, stage

    def _stages(self) -> Iterator[tuple[Site, GaLoreStage]]:
        return iter_stages(self.model, GaLoreStage)

    def state_dict(self) -> dict[str, Any]:
        return {"settled": sorted(self._settled), "share": self._share}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._settled, self._share = set(state["settled"]), state["share"]

    def metrics(self) -> Mapping[str, float]:
        return {} if self._share is None else {"gradient_in_subspace": self._share}


def aligned(new: Tensor, old: Tensor, *, is_left: bool) -> Tensor:
    """Return a basis with the sign of each vector that gives it no negative product with its predecessor."""
    products = (new * old).sum(-2 if is_left else -1, keepdim=True)
    return torch.where(products < 0, -new, new)


def num_ranks() -> int:
    """Ranks of the run, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0
