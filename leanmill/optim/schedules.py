"""Learning-rate schedules as one pure function, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from leanmill.core.lengths import steps_of
from leanmill.optim.config import ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of optimizer step `step` as a factor of the peak.

    With N = `num_steps`, W warm-up steps, m = `min_factor` and step s in [0, N):

    - warm-up, s < W: (s + 1) / (W + 1). Linear from 0, which is never used, to 1 at s = W.
    - `constant`: 1.
    - `linear`: 1 - (1 - m) p, with p = (s - W) / (N - 1 - W).
    - `cosine` (Loshchilov & Hutter 2017, arXiv:1608.03983): m + (1 - m) (1 + cos(pi p)) / 2, same p.
    - `wsd` (Hu et al. 2024, arXiv:2404.06395): 1, and over the last D = round(`decay_fraction` N)
      steps 1 - (1 - m) q, with q = (s - (N - 1 - D)) / D. The paper leaves the decay's shape open.
    - `infinite` (Singh et al. 2025, arXiv:2503.02844), c = `constant_factor`: cosine from 1 to c
      over round(`cooldown_fraction` N) steps after the warm-up, c, and over the last D steps
      c (m / c)^q. Up to the anneal nothing depends on N but the length of the cooldown, so a run
      can be picked up from its constant phase with more data.

    Every schedule with a decay is exactly m at the last step, s = N - 1. From step round(`drop_at` N) on all of
    this is multiplied by `drop_factor`, as if the peak were a lower one (Kaushal et al. 2024, arXiv:2407.12327).

    Args:
        config: The schedule.
        step: Index of the optimizer step about to run, from 0.
        num_steps: Optimizer steps of the whole run.
    """
    has_dropped = config.drop_at is not None and step >= round(config.drop_at * num_steps)
    return _of_peak(config, step, num_steps) * (config.drop_factor if has_dropped else 1.0)


def decays(config: ScheduleConfig, step: int, num_steps: int) -> bool:
    """Whether optimizer step `step` decays weights: before step round(`weight_decay_until` `num_steps`)."""
    return config.weight_decay_until is None or step < round(config.weight_decay_until * num_steps)


def _of_peak(config: ScheduleConfig, step: int, num_steps: int) -> float:
    warmup = warmup_steps(config, num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    last = num_steps - 1
    match config.type:
        case "constant":
            return 1.0
        case "linear":
            return _linear(1.0, config.min_factor, _progress(step, warmup, last))
        case "cosine":
            return _cosine(1.0, config.min_factor, _progress(step, warmup, last))
        case "wsd":
            start = max(last - round(config.decay_fraction * num_steps), warmup)
            return _linear(1.0, config.min_factor, _progress(step, start, last))
        case "infinite":
            return _infinite(config, step, warmup, num_steps)


def warmup_steps(config: ScheduleConfig, num_steps: int) -> int:
    """Return the number of warm-up steps; a float counts as a share of the run."""
    return steps_of(config.warmup_steps, num_steps)


def _infinite(config: ScheduleConfig, step: int, warmup: int, num_steps: int) -> float:
    last = num_steps - 1
    anneal = max(last - round(config.decay_fraction * num_steps), warmup)
    cooled = min(warmup + round(config.cooldown_fraction * num_steps), anneal)
    constant = config.constant_factor
    if step <= anneal:
        return _cosine(1.0, constant, _progress(step, warmup, cooled))
    ratio: float = config.min_factor / constant
    return float(constant * ratio ** _progress(step, anneal, last))


def _progress(step: int, start: int, end: int) -> float:
    """Share of [start, end] that lies behind `step`, within [0, 1]; an empty phase is over."""
    if end <= start:
        return 0.0 if step < end else 1.0
    return min(max((step - start) / (end - start), 0.0), 1.0)


def _linear(high: float, low: float, progress: float) -> float:
    return high + (low - high) * progress


def _cosine(high: float, low: float, progress: float) -> float:
    return low + (high - low) * (1 + math.cos(math.pi * progress)) / 2
