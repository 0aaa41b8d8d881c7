"""Running sums between two log records, kept on the device so that logging costs no sync per step."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from leanmill.core.ledger import Ledger
from leanmill.parallel.collectives import max_over_ranks, sum_over_ranks
from leanmill.parallel.slow_ranks import SlowRanks
from leanmill.report.observer import StepRecord


class Meter:
    """Adds up losses, tokens, time and skipped steps; `record` reduces them over ranks."""

    def __init__(
        self,
        device: torch.device,
        num_skipped: int = 0,
        ledger: Ledger | None = None,
        slow_ranks: SlowRanks | None = None,
    ) -> None:
        self.device, self._ledger, self._slow_ranks = device, ledger, slow_ranks
        self._num_skipped = torch.tensor(float(num_skipped), device=device)
        self._reset()

    def _reset(self) -> None:
        self._losses: dict[str, Tensor] = {}
        self._num_valid = torch.zeros((), device=self.device)
        self._num_steps = 0
        self._grad_norm = torch.zeros((), device=self.device)
        self._started = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Leave `seconds` of evaluation or saving out of the step time."""
        self._started += seconds

    def update(self, losses: Mapping[str, Tensor], num_valid: Tensor, grad_norm: Tensor, skip: Tensor) -> None:
        """Add one step.

        Args:
            losses: This rank's sums.
            num_valid: Targets over all ranks.
            grad_norm: Global norm before clipping.
            skip: Whether the step was skipped.
        """
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0) + value
        self._num_valid = self._num_valid + num_valid
        self._grad_norm = grad_norm.detach()
        self._num_skipped = self._num_skipped + skip
        self._num_steps += 1

    @property
    def num_skipped(self) -> int:
        """Steps skipped since the start of the run."""
        return int(self._num_skipped.item())

    def record(
        self,
        *,
        step: int,
        tokens: int,
        lr: float,
        tokens_per_step: int,
        metrics: Mapping[str, float],
        epoch: float | None = None,
    ) -> StepRecord:
        """Reduce over ranks, return the record and start anew. A collective."""
        if self._slow_ranks is not None:
            self._slow_ranks.arrive()
        losses = self._mean_losses()
        seconds = (time.perf_counter() - self._started) / self._num_steps
        told = [] if self._slow_ranks is None else self._slow_ranks.told()
        here = torch.tensor([peak_memory_bytes(self.device), *told], device=self.device, dtype=torch.float64)
        peak, *heard = max_over_ranks(here).tolist()
        if self._slow_ranks is not None:
            self._slow_ranks.hear(heard, step)
            metrics = {**metrics, **{f"slow_ranks/{key}": value for key, value in self._slow_ranks.found.items()}}
        record = StepRecord(
            step=step,
            tokens=tokens,
            losses=losses,
            grad_norm=float(self._grad_norm),
            lr=lr,
            step_seconds=seconds,
            tokens_per_second=tokens_per_step / seconds,
            peak_memory_bytes=int(peak),
            skipped_steps=self.num_skipped,
            epoch=epoch,
            metrics=metrics,
        )
        self._reset()
        return record

    def _mean_losses(self) -> dict[str, float]:
        """Means over all ranks; `total` is the whole objective, losses inside the model included."""
        names, num_valid = list(self._losses), self._num_valid.clamp(min=1)
        parts = [torch.stack([self._losses[name].float() for name in names])]
        if self._ledger is not None:
            parts.append(self._ledger.take().flatten())
        sums = sum_over_ranks(torch.cat(parts))
        means = dict(zip(names, sums[: len(names)] / num_valid, strict=True))
        if self._ledger is not None:
            inside, weighted = self._ledger.means(sums[len(names) :].view(-1, 3), num_valid)
            means = {**means, **inside, "total": means["total"] + weighted}
        return dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak allocated device memory on CUDA, peak resident set of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
