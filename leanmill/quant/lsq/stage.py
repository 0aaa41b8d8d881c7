"""A quantiser with learned step sizes as a stage."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from leanmill.kernels.fake_quant.grid import Kind, make_grid
from leanmill.kernels.fake_quant.op import initial_scale
from leanmill.quant.grids import UniformGrid
from leanmill.quant.rules import step_of_levels
from leanmill.quant.scales import Granularity
from leanmill.quant.sharing import Sharing
from leanmill.quant.stages import LearnedScale


Start = Literal["lsq", "lsq_plus", "l4q", "levels"]


class LsqStage(LearnedScale):
    """Round a weight [..., out, in] to a grid with trained steps; gradients of value and step are LSQ's.

    Args:
        weight: The weight it will be given: shape and device are taken.
        num_bits: 1 to 8.
        grid: See `fake_quant`.
        granularity: What shares a step.
        group_size: Neighbours of a group.
        start: Where steps begin, see `Lsq.weight_start`.
        has_warmup: See `WarmedUp`.
    """

    technique: ClassVar[str] = "lsq"

    def __init__(
        self,
        weight: Tensor,
        num_bits: int,
        grid: Kind = "signed",
        granularity: Granularity = "tensor",
        group_size: int | None = None,
        *,
        start: Start = "lsq",
        has_warmup: bool = False,
    ) -> None:
        super().__init__(weight, UniformGrid(num_bits, grid), Sharing(granularity, group_size), has_warmup=has_warmup)
        self.starts_as: Start = start

    def start(self, weight: Tensor) -> Tensor:
        if self.starts_as == "lsq_plus":
            return three_sigma_start(weight, self.grid.num_bits, self.sharing)
        if self.starts_as == "l4q":
            return unclipped_start(weight, self.grid, self.sharing)
        if self.starts_as == "levels":
            return step_of_levels(weight, self.grid, self.sharing)
        shape = tuple(self.scale.shape)
        return initial_scale(weight, shape, num_bits=self.grid.num_bits, grid=self.grid.kind)


def unclipped_start(weight: Tensor, grid: UniformGrid, sharing: Sharing) -> Tensor:
    """Return max(|min w / Qn|, |max w / Qp|) of what shares a step (Jeon et al. 2024, eq. 15).

    Args:
        weight: [..., out, in].
        grid: Qn and Qp, its outermost codes.
        sharing: What shares a step.
    """
    codes = make_grid(grid.num_bits, grid.kind)
    below, above = (sharing.largest(side.clamp(min=0)) for side in (-weight, weight))
    return torch.maximum(below / abs(codes.low + codes.shift), above / (codes.high + codes.shift))


def three_sigma_start(weight: Tensor, num_bits: int, sharing: Sharing) -> Tensor:
    """Return max(|mu - 3 sigma|, |mu + 3 sigma|) / 2^(b-1) of what shares a step (Bhalgat et al. 2020, eq. 8).

    Args:
        weight: [..., out, in].
        num_bits: b.
        sharing: What shares a step.
    """
    exact = weight.double()
    count = sharing.total(torch.ones_like(exact))
    mean = sharing.total(exact) / count
    deviation = (sharing.total(exact.square()) / count - mean.square()).clamp(min=0).sqrt()
    # The larger of the two, whatever the sign of the mean.
    return (mean.abs() + 3 * deviation) / 2 ** (num_bits - 1)
