"""Rules for scales that are computed from the weight, of the whole or of a part of its rows."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from leanmill.core.facets import Statistic
from leanmill.kernels.fake_quant.grid import make_grid
from leanmill.quant.grids import Grid, UniformGrid
from leanmill.quant.scales import ScaleKind, fitted_scale
from leanmill.quant.sharing import Sharing


ScaleOfPart = Generator[Statistic, Tensor, Tensor]
"""Yields statistics of a part, is sent those of the whole, returns the scale."""


class ScaleRule(Protocol):
    """How the scale of a grid around zero follows from the weights that share it."""

    stored_as: ClassVar[torch.dtype]
    """What holds such scales as they are."""

    def scale(self, weight: Tensor, grid: Grid, sharing: Sharing) -> Tensor:
        """Return the scales of a weight [..., out, in], at least fp32, in the shape that `sharing` says."""
        ...

    def scale_of_part(self, part: Tensor, grid: Grid) -> ScaleOfPart | None:
        """Find the one scale of a weight [out, in] from some of its rows; None where only the whole tells."""
        ...


@dataclass(frozen=True)
class AbsMax:
    """The largest magnitude is the outermost code."""

    stored_as: ClassVar[torch.dtype] = torch.float32

    def scale(self, weight: Tensor, grid: Grid, sharing: Sharing) -> Tensor:
        return _fitted(weight, grid, "absmax", sharing)

    def scale_of_part(self, part: Tensor, grid: Grid) -> ScaleOfPart:
        return (yield from largest_of_parts(part)) / grid.largest_code


@dataclass(frozen=True)
class LeastSquares:
    """Of some shares of `AbsMax`'s scale the one with the least squared error, see `scales.SHARES`."""

    stored_as: ClassVar[torch.dtype] = torch.float32

    def scale(self, weight: Tensor, grid: Grid, sharing: Sharing) -> Tensor:
        return _fitted(weight, grid, "mse", sharing)

    def scale_of_part(self, part: Tensor, grid: Grid) -> None:
        return None


def step_of_levels(weight: Tensor, grid: UniformGrid, sharing: Sharing) -> Tensor:
    """Return max |w| / k, k the code magnitude of least squared error, the largest such step where several are as good.

    Args:
        weight: [..., out, in].
        grid: Its outermost code bounds k.
        sharing: What shares a step.
    """
    codes = make_grid(grid.num_bits, grid.kind)
    exact = weight.float()
    outermost = sharing.largest(exact)
    best, least = outermost, torch.full_like(outermost, torch.inf)
    for code in range(max(1, -codes.low)):
        tried = outermost / (code + 1 - codes.shift)
        error = sharing.total((grid.rounded(exact, tried) - exact).square())
        # What differs by the rounding of its storage alone is as good.
        is_better = error < least - 1e-4 * tried.square()
        best, least = torch.where(is_better, tried, best), torch.where(is_better, error, least)
    return best


def largest_of_parts(part: Tensor) -> ScaleOfPart:
    """Ask for the largest magnitude (1,) of a weight of which `part`, perhaps none of its rows, is here."""
    exact = part.detach().to(torch.promote_types(part.dtype, torch.float32))
    largest = torch.cat([exact.abs().flatten(), exact.new_zeros(1)]).amax().reshape(1)
    return (yield Statistic(largest, "max")).to(exact.dtype)


def _fitted(weight: Tensor, grid: Grid, rule: ScaleKind, sharing: Sharing) -> Tensor:
    return fitted_scale(weight, grid.rounded, grid.largest_code, rule, sharing.granularity, sharing.group_size)
