"""AdamW beside a pull on weights that its moments do not see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from leanmill.optim.foreach import ForeachOptimizer


class PulledAdamW(ForeachOptimizer):
    """AdamW with a pull p that a step rule writes (`pull` of the state, like the parameter, starts at 0).

    With gradient g, moments m and v (`exp_avg` and `exp_avg_sq`) and their bias corrections c1 and c2::

        m = beta1 m + (1 - beta1) g
        u = m + p
        v = beta2 v + (1 - beta2) u^2
        w = w - lr weight_decay w - lr u / c1 / (sqrt(v / c2) + eps)

    in a group whose `pull` is "update" (AST: Huang et al. 2025, arXiv:2407.20584, of whose code this is the equations).
    Where it is "weight", AdamW moves the weight and p is beside it: v = beta2 v + (1 - beta2) g^2, and

        w = w - lr weight_decay w - lr p - lr m / c1 / (sqrt(v / c2) + eps)

    A group that has none is plain AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101). The `kept` tensors of a group,
    `kept_0` and on, are for step rules alone. Element-wise, so it works on DTensors and on ZeRO's flat partitions.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Decay of both moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "pull": None, "kept": 0}
        super().__init__(params, defaults)

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(p, group) for p in params]
        gradients = [p.grad for p in params if p.grad is not None]
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        first, second, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        updates, seen = first, gradients
        if group["pull"] == "update":
            updates = seen = list(torch._foreach_add(first, [state["pull"] for state in states]))
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, seen, seen, 1 - beta2)
        if group["weight_decay"] != 0:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        if group["pull"] == "weight":
            torch._foreach_add_(params, [state["pull"] for state in states], alpha=-lr)
        numbers = [float(step) for step in steps]
        roots = torch._foreach_sqrt(second)
        torch._foreach_div_(roots, [(1 - beta2**number) ** 0.5 for number in numbers])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(params, updates, roots, [-lr / (1 - beta1**number) for number in numbers])

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            # On the CPU: no step waits for a device to read it.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            if group["pull"] is not None:
                state["pull"] = torch.zeros_like(param)
            state.update((f"kept_{number}", torch.zeros_like(param)) for number in range(group["kept"]))
        return state
