"""Moving the ranks of `rank_lora` adapters: growth by importance (IncreLoRA), nested ranks drawn anew (DyLoRA)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leanmill.core.branches import branched_layers
from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.core.noise import derive_seed
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.technique import Installation
from leanmill.core.views import View, Views, part_of, whole_of
from leanmill.parallel.collectives import sum_over_ranks


if TYPE_CHECKING:
    from leanmill.peft_ext.tuners.rank_lora import RankLoraLayer

ADAPTER = "default"
"""Under this name layers hold the adapter that trains."""


def with_moving_ranks(
    installation: Installation, options: Mapping[str, Any], model: nn.Module, seed: int
) -> Installation:
    """Return the installation of `method: rank_lora` with the rule that moves its ranks.

    Args:
        installation: Which wraps the layers.
        options: Of the method.
        model: Of the run.
        seed: Of the run, for what is drawn.
    """
    from leanmill.peft_ext.tuners.rank_lora import RankLoraConfig

    config = RankLoraConfig(**options)
    rule: StepRule = RankGrowth(model, config) if config.variant == "increlora" else NestedRanks(model, config, seed)
    return replace(installation, step_rules=(rule,))


class NestedRanks(StepRule):
    """Draws how many ranks a step uses, from `least_r` to `r`, the same in every layer and on every rank of the run.

    Between steps the adapters use what their configuration says.

    Args:
        model: Walked anew every time.
        config: The adapters'.
        seed: Of what is drawn.
    """

    name = "dylora"

    def __init__(self, model: nn.Module, config: Any, seed: int) -> None:
        self.model, self.config, self.seed = model, config, seed

    def begin_step(self, context: StepContext) -> None:
        if context.is_replayed:
            self._use(self.config.used_r or self.config.r)
            return
        least, most = self.config.least_r, self.config.r
        self._use(least + derive_seed(self.seed, self.name, context.step) % (most - least + 1))

    def after_optimizer(self, context: StepContext) -> None:
        self._use(self.config.used_r or self.config.r)

    def _use(self, rank: int) -> None:
        for _, layer in layers_of(self.model):
            layer.use_rank(rank, ADAPTER)


class RankGrowth(StepRule):
    """Gives ranks to the layers that are most important, until the budget is spent, and keeps factors orthogonal.

    A layer's importance in a step is sum |dW x dL/d(dW)| / sqrt(size of dW), with the gradient of the whole step. Its
    score is the running mean of that, sensitivity, times the running mean of how far importance is from it,
    uncertainty. With `score: factors` importance is read off the gradients of the factors, as AdaLoRA reads that of a
    rank: sum |E dE| + sum |A dA| / in + sum |B dB| / out. With `product` every layer holds a gradient of its weight,
    fp32, summed over ranks, while there is something to give.

    The penalty, `orthogonality` x mean over factors of ||A A^T - I|| and ||B^T B - I|| of what is used or in reserve,
    is not in the loss: its gradient is added to the step's once, before clipping.

    Args:
        model: Walked anew every time.
        config: The adapters'.
    """

    name = "increlora"

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model, self.config = model, config
        self._averages: dict[str, list[float]] = {}
        """Sensitivity and uncertainty, by layer."""
        self._ranks: dict[str, int] = {}
        """Ranks that are used, by layer; as in the layers' buffers."""
        self._penalty: float | None = None

    def begin_step(self, context: StepContext) -> None:
        if not self._ranks:
            self._ranks = {name: int(layer.rank_lora_count[ADAPTER][0]) for name, layer in layers_of(self.model)}
            self._check_budget(context)
        if self.config.score == "product":
            for _, layer in layers_of(self.model):
                layer.collect(self.budget_left > 0 and context.views is not None)

    @property
    def budget(self) -> int:
        """Ranks of all layers in the end."""
        return round(self.config.target_r * len(self._ranks))

    @property
    def budget_left(self) -> int:
        """Ranks that are still to be given."""
        return self.budget - sum(self._ranks.values())

    def before_optimizer(self, context: StepContext) -> None:
        if context.views is None:
            return
        if self.budget_left > 0:
            self._average({name: self._importance(context.views, layer) for name, layer in layers_of(self.model)})
        if self.config.orthogonality > 0:
            self._penalise(context)

    def after_optimizer(self, context: StepContext) -> None:
        done = context.step + 1
        if context.views is not None and done > self.config.grow_after and done % self.config.grow_every == 0:
            self._grow()

    def _grow(self) -> None:
        scores = {name: sensitivity * uncertainty for name, (sensitivity, uncertainty) in self._averages.items()}
        able = [name for name in scores if self._ranks[name] < self.config.r]
        chosen = sorted(able, key=lambda name: (-scores[name], name))[: self.config.grow_layers]
        for name in chosen:
            self._ranks[name] += min(self.config.grow_r, self.config.r - self._ranks[name], self.budget_left)
        for name, layer in layers_of(self.model):
            spare = min(self.config.grow_r, self.config.r - self._ranks[name]) if self.budget_left > 0 else 0
            layer.rank_lora_count[ADAPTER].copy_(torch.tensor([self._ranks[name], spare]))

    def _importance(self, views: Views, layer: RankLoraLayer) -> Tensor:
        """A scalar, fp32, the same on all ranks. A collective."""
        own = [views.of(parameter) for parameter in _factors_of(layer)]
        if self.config.score == "factors":
            sizes = layer.in_features, layer.out_features, 1
            found = [view.reduce(_moved(view) / size, "sum") for view, size in zip(own, sizes, strict=True)]
            return torch.stack(found).sum()
        gradient = sum_over_ranks(layer.collected())
        layer.collect(False)
        whole_a, whole_b, whole_e = (whole_of(view, view.value).to(gradient.device) for view in own)
        delta = layer.product(whole_a, whole_b, whole_e, ADAPTER)
        return (delta * gradient).abs().sum() / math.sqrt(gradient.numel())

    def _average(self, found: Mapping[str, Tensor]) -> None:
        values = torch.stack(list(found.values())).tolist()
        if not all(map(math.isfinite, values)):
            return
        for name, value in zip(found, values, strict=True):
            sensitivity, uncertainty = self._averages.get(name, (0.0, 0.0))
            sensitivity += (1 - self.config.sensitivity_decay) * (value - sensitivity)
            uncertainty += (1 - self.config.uncertainty_decay) * (abs(value - sensitivity) - uncertainty)
            self._averages[name] = [sensitivity, uncertainty]

    def _penalise(self, context: StepContext) -> None:
        assert context.views is not None
        penalties: list[Tensor] = []
        found = list(layers_of(self.model))
        for name, layer in found:
            used = self._ranks[name]
            spare = min(self.config.grow_r, self.config.r - used) if self.budget_left > 0 else 0
            a, b, _ = (context.views.of(parameter) for parameter in _factors_of(layer))
            for view, is_a in ((a, True), (b, False)):
                rows = whole_of(view, view.value)
                rows = rows if is_a else rows.t()
                penalty, gradient = orthogonality(rows, used + spare)
                penalties.append(penalty)
                _add(view, (gradient if is_a else gradient.t()) * (self.config.orthogonality / (2 * len(found))))
        if context.is_reported:
            self._penalty = float(torch.stack(penalties).mean())

    def _check_budget(self, context: StepContext) -> None:
        config, count = self.config, len(self._ranks)
        first = max(config.grow_after + 1, context.step + 1)
        growths = context.num_steps // config.grow_every - (first - 1) // config.grow_every
        possible = growths * min(config.grow_layers, count) * config.grow_r
        if context.views is not None and possible < self.budget_left:
            raise ConfigError(
                f"peft.target_r={config.target_r} asks for {self.budget_left} more ranks in {count} layers, and "
                f"{context.num_steps} steps give {possible}; lower peft.grow_every or grow_after, raise grow_layers or "
                f"grow_r, or train.steps"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"averages": self._averages} if self._averages else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averages = {name: list(values) for name, values in state["averages"].items()}

    def metrics(self) -> Mapping[str, float]:
        ranks = list(self._ranks.values())
        found = {"mean_rank": sum(ranks) / len(ranks), "largest_rank": float(max(ranks))} if ranks else {}
        return found if self._penalty is None else {**found, "orthogonality": self._penalty}


def layers_of(model: nn.Module) -> Iterator[tuple[str, RankLoraLayer]]:
    """Yield the layers with such adapters and their names in the plain model."""
    from leanmill.peft_ext.tuners.rank_lora import RankLoraLayer

    for path, layer in branched_layers(model):
        if isinstance(layer, RankLoraLayer):
            yield clean_name(path), layer


def orthogonality(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return ||A A^T - I|| (Frobenius) of the first `count` rows A of a matrix, and its gradient, 0 for other rows."""
    own = rows[:count]
    apart = own @ own.t() - torch.eye(count, dtype=own.dtype, device=own.device)
    norm = apart.norm()
    gradient = torch.zeros_like(rows)
    gradient[:count] = 2 * apart @ own / norm.clamp(min=torch.finfo(own.dtype).tiny)
    return norm, gradient


def _factors_of(layer: RankLoraLayer) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """A, B and E."""
    return layer.rank_lora_A[ADAPTER], layer.rank_lora_B[ADAPTER], layer.rank_lora_E[ADAPTER]  # type: ignore[return-value]


def _moved(view: View) -> Tensor:
    """Return sum |value x gradient| over this rank's piece, a scalar."""
    gradient = torch.zeros_like(view.value) if view.grad is None else view.grad
    return (view.value * gradient).abs().sum()


def _add(view: View, gradient: Tensor) -> None:
    if view.grad is not None:
        view.grad.add_(part_of(view, gradient.contiguous()).to(view.grad.dtype))
