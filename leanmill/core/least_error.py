"""The cheapest sum of errors under a budget, by dynamic programming. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from leanmill.core.errors import RunError
from leanmill.core.levels import Space, State


_BUCKETS = 20_000
"""Of the budget, where its common divisor with all costs would give more: costs are rounded up to whole ones then."""


def least_error(space: Space, errors: Sequence[Sequence[float]], *, technique: str) -> State:
    """Return the levels within the budget whose errors have the least sum.

    Exact where the budget has at most 20,000 steps of the costs' common divisor; else the budget is met with costs
    that are rounded up to 1/20,000 of it.

    Args:
        space: Costs and budget.
        errors: Of each unit at each level; what is no number is never taken.
        technique: Who asks.

    Raises:
        RunError: Nothing meets the budget with errors that are numbers.
    """
    floor = [costs[0] for costs in space.costs]
    room = space.budget - sum(floor)
    steps = [[cost - costs[0] for cost in costs] for costs in space.costs]
    unit = math.gcd(*(cost for costs in steps for cost in costs)) or 1
    if room // unit > _BUCKETS:
        unit = -(-room // _BUCKETS)
    size = room // unit
    least = np.zeros(size + 1)
    chosen = []
    for costs, of_unit in zip(steps, errors, strict=True):
        best = np.full(size + 1, np.inf)
        which = np.full(size + 1, -1)
        for level, (cost, error) in enumerate(zip(costs, of_unit, strict=True)):
            shift = -(-cost // unit)
            if shift > size or not math.isfinite(error):
                continue
            total = np.full(size + 1, np.inf)
            total[shift:] = least[: size + 1 - shift] + error
            better = total < best
            best[better], which[better] = total[better], level
        least = best
        chosen.append((which, costs))
    if room < 0 or not np.isfinite(least[size]):
        raise RunError(
            f"{technique}: no levels meet the budget with errors that are numbers; look at model and calibration data"
        )
    left, state = size, []
    for which, costs in reversed(chosen):
        level = int(which[left])
        state.append(level)
        left -= -(-costs[level] // unit)
    return tuple(reversed(state))
