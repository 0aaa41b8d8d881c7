"""Lion: one state tensor, updates of equal magnitude."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from leanmill.optim.foreach import ForeachOptimizer


class Lion(ForeachOptimizer):
    """Evolved sign momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

    With gradient g, momentum m (`exp_avg`, starts at 0) and decoupled weight decay::

        u = sign(beta1 m + (1 - beta1) g)
        p = p - lr (u + weight_decay p)
        m = beta2 m + (1 - beta2) g

    Element-wise, so it works on DTensors and on ZeRO's flat partitions.

    Args:
        params: Parameters or groups.
        lr: Learning rate; the paper takes a 3 to 10 times smaller one than for AdamW, with a weight
            decay larger by the same factor.
        betas: Interpolation of the update, decay of the momentum.
        weight_decay: Decoupled decay.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        gradients = [p.grad for p in params if p.grad is not None]
        momenta = [self._momentum(p) for p in params]
        if group["weight_decay"] != 0:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_add_(params, updates, alpha=-group["lr"])
        torch._foreach_lerp_(momenta, gradients, 1 - beta2)

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(param)
        return state["exp_avg"]  # type: ignore[no-any-return]
