"""How long collectives are under way in a step, by torch's own profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


_MARKS = ("gloo:", "nccl:", "ncclDevKernel")
_NAMES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "recv")


class Communication:
    """Records one step.

    Args:
        device: Where it computes.
    """

    def __init__(self, device: torch.device) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._is_cuda = device.type == "cuda"
        self._profile = profile(activities=activities)

    def start(self) -> None:
        """Begin to record."""
        self._profile.__enter__()

    def stop(self) -> dict[str, float]:
        """Return the seconds in which at least one collective of a kind was under way, and of any as `any`."""
        if self._is_cuda:
            torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)
        return under_way(self._profile.events() or (), is_cuda=self._is_cuda)


def under_way(events: Iterable[Any], *, is_cuda: bool) -> dict[str, float]:
    """Return the length of the union of collectives' times, in seconds, by kind; see `Communication.stop`.

    Args:
        events: Of torch's profiler: `name`, `time_range.start` and `.end` in microseconds, `device_type`.
        is_cuda: Whether only what the device does counts: on the host NCCL only queues.
    """
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if any(mark in event.name for mark in _MARKS) and on_device == is_cuda:
            plain = event.name.lower().replace("allreduce", "all_reduce").replace("allgather", "all_gather")
            plain = plain.replace("reducescatter", "reduce_scatter").replace("alltoall", "all_to_all")
            kind = next((name for name in _NAMES if name in plain), "other")
            span = (event.time_range.start, event.time_range.end)
            spans[kind].append(span)
            spans["any"].append(span)
    return {kind: _union(found) / 1e6 for kind, found in spans.items()}


def _union(spans: list[tuple[float, float]]) -> float:
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
