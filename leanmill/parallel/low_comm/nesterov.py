"""The outer optimizer: SGD with Nesterov momentum on the mean of how far workers went."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def nesterov_step(
    values: list[Tensor], momenta: list[Tensor], gradients: list[Tensor], *, lr: float, momentum: float
) -> None:
    """Step in place, as `torch.optim.SGD(nesterov=True)` does: m = mu m + g; value = value - lr (g + mu m).

    Args:
        values: What is trained.
        momenta: As many tensors like them, zeros at first.
        gradients: As many; they are overwritten.
        lr: Learning rate.
        momentum: mu.
    """
    if not values:
        return
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, gradients)
    torch._foreach_add_(gradients, momenta, alpha=momentum)
    torch._foreach_add_(values, gradients, alpha=-lr)
