"""Lookahead over any optimizer, with slow weights that are part of the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor


class Lookahead(torch.optim.Optimizer):
    """k steps forward, 1 step back (Zhang et al. 2019, arXiv:1907.08610, algorithm 1).

    Every `every`-th step, after the inner optimizer has moved the fast weights::

        slow = slow + alpha (fast - slow)
        fast = slow

    `state` and `param_groups` are the inner optimizer's own objects, so schedules, checkpoints and
    engines see one optimizer. Two keys are added to each parameter's state: `slow`, like the
    parameter, starting from its value before the first step; and `slow_step`, a 0-dim fp32 CPU
    tensor counting steps, so that a resumed run updates at the same steps and no step waits for a
    device. Element-wise, so it works on DTensors and on ZeRO's flat partitions.

    Args:
        inner: The optimizer of the fast weights.
        every: Steps between slow updates (k in the paper).
        alpha: Slow step size.
    """

    def __init__(self, inner: torch.optim.Optimizer, every: int = 5, alpha: float = 0.5) -> None:
        self.inner, self.every, self.alpha = inner, every, alpha
        state = inner.state
        super().__init__(inner.param_groups, inner.defaults)  # empties both, then adds the same groups again
        self.state = state

    @property
    def state(self) -> Any:
        """The inner optimizer's state."""
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self.inner.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.inner.param_groups = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.inner.add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step the inner optimizer, and the slow weights when it is their turn."""
        # Group by group: operations on many tensors at once take those of one mesh.
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        params = [p for group in groups for p in group]
        # Kept aside until the inner step is done: torch's optimizers take a non-empty state for theirs.
        starts = [(p, p.detach().clone()) for p in params if "slow" not in self.state[p]]
        loss = self.inner.step(closure)
        for param, start in starts:
            self.state[param].update(slow=start, slow_step=torch.zeros((), dtype=torch.float32))
        for group in groups:
            self._update_slow(group)
        return loss

    def _update_slow(self, params: list[Tensor]) -> None:
        for param in params:
            self.state[param]["slow_step"] += 1
        due = [p for p in params if int(self.state[p]["slow_step"]) % self.every == 0]
        if due:
            slow: list[Tensor] = [self.state[p]["slow"] for p in due]
            torch._foreach_lerp_(slow, due, self.alpha)
            for param, value in zip(due, slow, strict=True):
                param.copy_(value)  # no _foreach_copy_: DTensor has no strategy for it

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; the counters keep their dtype and stay on the CPU."""
        self.inner.load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            if "slow_step" in saved:
                self.state[params[index]]["slow_step"] = saved["slow_step"].detach().to("cpu", torch.float32, copy=True)
