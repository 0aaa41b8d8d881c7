"""The experts of a layer that this rank holds, where a layout spreads them over ranks.

Parameters of experts are then tensors over the ranks of all experts (DTensors, or, where an engine takes
plain tensors only, this rank's part); what is multiplied with is this rank's part. The tokens of several
data ranks meet at one expert, so the gradient that its product gives is that of all of them: divided by
their number it is a mean over ranks like any other parameter's, and what a stage adds of its own (a
decay, say) is not divided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.kernels.sharded import is_dtensor


_ATTRIBUTE = "expert_shard"


@dataclass(frozen=True)
class ExpertShard:
    """Which experts of a module are here."""

    first: int
    num_experts: int
    """How many, from the first on."""
    gradient_divisor: int
    """What the gradient of a product with their weights is divided by."""


def set_expert_shard(module: nn.Module, shard: ExpertShard) -> None:
    """Note which experts of a stacked experts module this rank holds."""
    setattr(module, _ATTRIBUTE, shard)


def expert_shard_of(module: nn.Module) -> ExpertShard | None:
    """Return which experts of `module` are here; None where all are."""
    return getattr(module, _ATTRIBUTE, None)


def part_here(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, differentiable; a plain tensor is one already."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def with_divided_gradient(weight: Tensor, module: nn.Module) -> Tensor:
    """Return the weight that experts of `module` are multiplied with, its gradient divided as their shard asks."""
    shard = expert_shard_of(module)
    if shard is None or shard.gradient_divisor == 1 or not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    return _Divided.apply(weight, shard.gradient_divisor)  # type: ignore[no-any-return]


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, divisor: int) -> Tensor:
        ctx.divisor = divisor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad / ctx.divisor, None
