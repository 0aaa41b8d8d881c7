"""Who has the time: a sequence of moments, each with what begins there."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch


Phase = Literal["data", "forward", "backward", "recomputation", "update"]


@dataclass(frozen=True)
class Owner:
    """What time is spent on: a module by its path in a phase; "" is what lies outside of modules."""

    path: str
    phase: Phase


class Timeline:
    """Adds up the time between moments, each for the owner that began at the first of them.

    On CUDA moments are events in the stream, so that what is timed is the device's work and nothing waits for it.

    Args:
        device: Where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[tuple[float | torch.cuda.Event, Owner]] = []
        self._base = Owner("", "data")
        self._inside: list[Owner] = []
        self.is_running = False

    def begin(self, owner: Owner) -> None:
        """Say that `owner` goes on from here, outside of any module that is being called."""
        self._base = owner
        if not self._inside:
            self._mark(owner)

    def enter(self, owner: Owner) -> None:
        """Say that a call begins, until `leave`."""
        self._inside.append(owner)
        self._mark(owner)

    def leave(self) -> None:
        """Say that the innermost call has ended."""
        self._inside.pop()
        self._mark(self._inside[-1] if self._inside else self._base)

    def _mark(self, owner: Owner) -> None:
        if not self.is_running:
            return
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append((event, owner))
        else:
            self._moments.append((time.perf_counter(), owner))

    def totals(self) -> dict[Owner, float]:
        """Return the seconds of each owner so far, and forget them."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found: dict[Owner, float] = defaultdict(float)
        for (began, owner), (ended, _) in zip(self._moments, self._moments[1:], strict=False):
            if isinstance(began, float):
                assert isinstance(ended, float)
                found[owner] += ended - began
            else:
                assert not isinstance(ended, float)
                found[owner] += began.elapsed_time(ended) / 1000
        self._moments = self._moments[-1:]
        return dict(found)
