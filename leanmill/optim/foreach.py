"""What optimizers of our own share: a step over the parameters that have a gradient, group by group."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor


class ForeachOptimizer(torch.optim.Optimizer):
    """An optimizer that updates all parameters of a group together."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Write the parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(params, group)
        return loss

    @abstractmethod
    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Write `params`, which have gradients, by the settings of their group."""
