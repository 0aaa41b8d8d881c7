"""Levels of a row by weighted k-means, and the nearest of them."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_levels(values: Tensor, mass: Tensor, num_levels: int, iterations: int) -> Tensor:
    """Return the centres of weighted k-means over each row [R, k], ascending.

    Lloyd's iterations over sorted rows, where clusters are spans and their sums differences of running sums. They start
    at the means of spans of equal mass. A row whose mass is zero everywhere counts its weights alike.

    Args:
        values: [R, n].
        mass: What each counts for [R, n], at least 0.
        num_levels: k.
        iterations: At most.
    """
    mass = torch.where(mass.sum(1, keepdim=True) > 0, mass, torch.ones_like(mass)).double()
    values, order = values.double().sort(dim=1)
    mass = mass.gather(1, order)
    running = torch.nn.functional.pad(torch.stack([mass, mass * values]).cumsum(-1), (1, 0))
    shares = torch.arange(1, num_levels, dtype=torch.float64) / num_levels
    ends = torch.searchsorted(running[0], shares * running[0, :, -1:], right=False)
    levels = values.gather(1, _first_of(ends, values.shape[1]))
    levels = _centres(values, running, ends, levels)
    for _ in range(iterations):
        moved = torch.searchsorted(values, (levels[:, 1:] + levels[:, :-1]) / 2, right=True)
        if torch.equal(moved, ends):
            break
        ends = moved
        levels = _centres(values, running, ends, levels)
    return levels.to(torch.float32)


def _first_of(ends: Tensor, num_values: int) -> Tensor:
    """Index of the first value of each span [R, k]."""
    return torch.nn.functional.pad(ends, (1, 0)).clamp(max=num_values - 1)


def _centres(values: Tensor, running: Tensor, ends: Tensor, before: Tensor) -> Tensor:
    """Weighted means of spans that end before `ends` [R, k - 1]; of a span without mass the centre it had."""
    num_values = values.shape[-1]
    bounds = torch.nn.functional.pad(torch.nn.functional.pad(ends, (1, 0)), (0, 1), value=num_values)
    mass, moment = (part.gather(1, bounds).diff(dim=1) for part in running)
    centres = moment / mass.clamp(min=torch.finfo(torch.float64).tiny)
    # The difference of sums that are much larger than it is mostly rounding.
    first, last = _first_of(ends, num_values), (bounds[:, 1:] - 1).clamp(min=0)
    centres = centres.clamp(values.gather(1, first), values.gather(1, last))
    centres = torch.where(mass > 0, centres, before)
    return centres.sort(dim=1).values


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Return the nearest level of each value, the lower of two as near; levels [R, k] ascend."""
    between = ((levels[:, 1:].double() + levels[:, :-1].double()) / 2).contiguous()
    return levels.gather(1, torch.searchsorted(between, values.double().contiguous(), right=False))
