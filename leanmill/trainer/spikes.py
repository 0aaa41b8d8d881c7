"""A step whose loss or gradient norm stands out of those before it, found on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class SpikeSettings(Protocol):
    """What is read of `train.spike`."""

    @property
    def sigmas(self) -> float:
        """Standard deviations above the mean from which on a step stands out."""

    @property
    def window_steps(self) -> int:
        """Steps that mean and deviation are taken over."""


class SpikeWatch:
    """Loss and gradient norm of the last steps, on the device, so that no step waits for the host.

    As in OLMo's optimizers that skip steps: nothing stands out until half a window has been seen, and a step that
    stood out counts for those after it, so that a level that stays is not skipped for ever.

    Args:
        settings: When a step stands out.
        device: Where losses are.
    """

    def __init__(self, settings: SpikeSettings, device: torch.device) -> None:
        self.sigmas, self.window_steps = settings.sigmas, settings.window_steps
        self._values = torch.zeros(2, settings.window_steps, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def stands_out(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step does, bool scalar; then remember it, unless it is not finite.

        Args:
            loss: Mean of the step over all ranks, fp32 scalar.
            norm: Of its gradient before clipping, fp32 scalar.
        """
        now = torch.stack([loss.float(), norm.float()])
        index = torch.arange(self.window_steps, device=now.device)
        is_filled = index < self._count
        number = is_filled.sum().clamp(min=1)
        mean = (self._values * is_filled).sum(1) / number
        variance = ((self._values - mean[:, None]).square() * is_filled).sum(1) / (number - 1).clamp(min=1)
        is_far = (now > mean + self.sigmas * variance.sqrt()).any()
        is_finite = torch.isfinite(now).all()
        is_next = (index == self._count % self.window_steps) & is_finite
        self._values = torch.where(is_next, now.nan_to_num()[:, None], self._values)
        found = is_far & is_finite & (self._count >= max(2, self.window_steps // 2))
        self._count = self._count + is_finite
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, JSON-able, equal on all ranks."""
        return {"values": self._values.tolist(), "count": int(self._count)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; of another window, as much of its newest as there is room for."""
        values, count = torch.tensor(state["values"]), int(state["count"])
        length = values.shape[1]
        newest = [(count - 1 - back) % length for back in range(min(count, length, self.window_steps))][::-1]
        self._values.zero_()
        self._values[:, : len(newest)] = values[:, newest].to(self._values)
        if length == self.window_steps:
            self._values, self._count = values.to(self._values), self._count.fill_(count)
        else:
            self._count.fill_(len(newest))
