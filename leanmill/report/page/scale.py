"""Axes: ranges, ticks, thinning and smoothing of series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from leanmill.report.page.data import Points


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map of [low, high] onto [0, 1]."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where `value` lies, 0 at `low` and 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, target: int = 5) -> list[float]:
        """About `target` round values inside the range."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _nice((self.high - self.low) / target)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        # Rounding takes off the dust of the multiplication: 3 * 0.1 is 0.30000000000000004.
        return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def fit(values: Sequence[float], *, from_zero: bool = False, allow_log: bool = False) -> Scale:
    """A scale that holds `values` with a little air.

    Args:
        values: May be empty or all alike.
        from_zero: Start at 0, for quantities whose size matters more than their change.
        allow_log: Use a logarithmic axis where the values span more than a factor of 30.
    """
    if not values:
        return Scale(0.0, 1.0)
    low, high = min(values), max(values)
    if allow_log and low > 0 and high / low > 30:
        return Scale(low / 1.1, high * 1.1, log=True)
    if from_zero and low >= 0:
        low = 0.0
    if low == high:
        air = abs(low) * 0.1 or 1.0
        return Scale(low - (0.0 if from_zero and low == 0 else air), high + air)
    air = 0.04 * (high - low)
    return Scale(low if from_zero and low == 0 else low - air, high + air)


def thin(points: Points, max_points: int = 800) -> Points:
    """Keep the lowest and the highest point of each stretch, so that spikes stay visible."""
    if len(points) <= max_points:
        return points
    stride = math.ceil(2 * len(points) / max_points)
    kept: Points = []
    for start in range(0, len(points), stride):
        stretch = points[start : start + stride]
        lowest, highest = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept.extend(sorted({lowest, highest}))
    # The end of a run is what people look up.
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def smooth(points: Points) -> Points:
    """Weighted mean around each point, weights falling off exponentially to both sides.

    Looking both ways keeps a steep start from being drawn late, as a one-sided average would.
    """
    decay = 1 - 2 / (max(len(points) / 50, 1) + 1)
    values = [y for _, y in points]
    before, after = _decayed_sums(values, decay), _decayed_sums(values[::-1], decay)[::-1]
    smoothed: Points = []
    for (x, y), (sum_before, weight_before), (sum_after, weight_after) in zip(points, before, after, strict=True):
        # Both sums hold the point itself.
        smoothed.append((x, (sum_before + sum_after - y) / (weight_before + weight_after - 1)))
    return smoothed


def _decayed_sums(values: Sequence[float], decay: float) -> list[tuple[float, float]]:
    """For each value, the sum of it and all before it, decayed by distance, and the sum of the weights."""
    total, weight, sums = 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        sums.append((total, weight))
    return sums


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 3) if math.log10(high / low) < 2.5 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
