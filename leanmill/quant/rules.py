"""Rules for scales that are computed from the weight, of the whole or of a part of its rows."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from leanmill.core.facets import Statistic
from leanmill.quant.grids import UniformGrid
from leanmill.quant.scales import symmetric_scale
from leanmill.quant.sharing import Sharing


ScaleOfPart = Generator[Statistic, Tensor, Tensor]
"""Yields statistics of a part, is sent those of the whole, returns the scale."""


class ScaleRule(Protocol):
    """How the scale of a symmetric grid follows from the weights that share it."""

    def scale(self, weight: Tensor, grid: UniformGrid, sharing: Sharing) -> Tensor:
        """Return the scales of a weight [..., out, in], at least fp32, in the shape that `sharing` says."""
        ...

    def scale_of_part(self, part: Tensor, grid: UniformGrid) -> ScaleOfPart | None:
        """Find the one scale of a weight [out, in] from some of its rows; None where only the whole tells."""
        ...


@dataclass(frozen=True)
class AbsMax:
    """The largest magnitude is the outermost code."""

    def scale(self, weight: Tensor, grid: UniformGrid, sharing: Sharing) -> Tensor:
        return symmetric_scale(weight, grid.num_bits, "absmax", sharing.granularity, sharing.group_size)

    def scale_of_part(self, part: Tensor, grid: UniformGrid) -> ScaleOfPart:
        exact = part.detach().to(torch.promote_types(part.dtype, torch.float32))
        largest = torch.cat([exact.abs().flatten(), exact.new_zeros(1)]).amax().reshape(1)
        absmax = yield Statistic(largest, "max")
        return absmax.to(exact.dtype) / grid.largest_code


@dataclass(frozen=True)
class LeastSquares:
    """Of some shares of `AbsMax`'s scale the one with the least squared error, see `scales.SHARES`."""

    def scale(self, weight: Tensor, grid: UniformGrid, sharing: Sharing) -> Tensor:
        return symmetric_scale(weight, grid.num_bits, "mse", sharing.granularity, sharing.group_size)

    def scale_of_part(self, part: Tensor, grid: UniformGrid) -> None:
        return None
