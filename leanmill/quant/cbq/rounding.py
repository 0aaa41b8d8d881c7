"""One weight whose steps and roundings are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE, make_grid
from leanmill.quant.grids import UniformGrid
from leanmill.quant.scales import Granularity, fitted_scale


LOW, HIGH = -0.1, 1.1
"""What a rectified sigmoid is stretched to before it is cut to [0, 1] (Louizos et al. 2018; AdaRound)."""


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """Return clip(sigmoid(V) (HIGH - LOW) + LOW, 0, 1)."""
    return (logits.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def logits_of(shares: Tensor) -> Tensor:
    """Return V of which `rectified_sigmoid` makes shares in [0, 1]."""
    return ((shares - LOW) / (HIGH - LOW)).logit()


class LowRankRounding(nn.Module):
    """A weight [out, in] as s clip(floor(W / s_0) + h(V_0 + A_1 A_2)), with trained s, A_1 [out, r] and A_2 [r, in].

    h is the rectified sigmoid, s_0 the step of least squared error and V_0 what makes h the fraction of W / s_0: soft
    roundings begin with the weight itself, as far as the grid reaches, and hard ones, h >= 1/2, with the nearest codes.
    CBQ's text has V = A_1 A_2, of which no product of thin matrices makes the fractions.

    Args:
        weight: fp32, kept.
        grid: Codes.
        group_size: Neighbours in a row that share a step; None is the row.
        rank: r.
        is_soft: Whether `trained` has soft roundings, or hard ones with the gradient of soft ones.
        generator: Draws A_1; A_2 starts at 0.
    """

    def __init__(
        self,
        weight: Tensor,
        grid: UniformGrid,
        *,
        group_size: int | None,
        rank: int,
        is_soft: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.is_soft = is_soft
        num_out, num_in = weight.shape
        self.weight, self.codes = weight, make_grid(grid.num_bits, grid.kind)
        granularity: Granularity = "row" if group_size is None else "group"
        fitted = fitted_scale(weight, grid.rounded, grid.largest_code, "mse", granularity, group_size)
        self.first_step = fitted.clamp(min=SMALLEST_SCALE)
        self.log_change = nn.Parameter(torch.zeros_like(self.first_step))
        """log(s / s_0)."""
        drawn = torch.randn(num_out, rank, generator=generator)
        self.rows = nn.Parameter(drawn.to(weight.device))
        """A_1."""
        self.columns = nn.Parameter(torch.zeros(rank, num_in, device=weight.device))
        """A_2."""

    def shares(self) -> Tensor:
        """Return h, how far each weight is rounded up, [out, in]."""
        units = self._units
        return rectified_sigmoid(logits_of(units - units.floor()) + self.rows @ self.columns)

    def rounded(self, shares: Tensor) -> Tensor:
        """Return the weight [out, in] whose weights are rounded up by these shares."""
        codes = (self._units.floor() + shares).clamp(self.codes.low, self.codes.high) + self.codes.shift
        step = (self.first_step * self.log_change.exp()).unsqueeze(-1)
        value = (codes.unflatten(-1, (step.shape[-2], -1)) * step).flatten(-2)
        return torch.where(self.weight == 0, 0.0, value)

    def trained(self) -> Tensor:
        """Return the weight that gradients are taken of."""
        shares = self.shares()
        return self.rounded(shares if self.is_soft else shares + (_decided(shares) - shares).detach())

    @torch.no_grad()
    def solved(self) -> Tensor:
        """Return the weight with every rounding decided."""
        return self.rounded(_decided(self.shares()))

    @property
    def _units(self) -> Tensor:
        """W / s_0 less the grid's shift, inside of it."""
        step = self.first_step
        units = (self.weight.unflatten(-1, (step.shape[-1], -1)) / step.unsqueeze(-1)).flatten(-2)
        return (units - self.codes.shift).clamp(self.codes.low, self.codes.high)


def _decided(shares: Tensor) -> Tensor:
    return (shares >= 0.5).to(shares.dtype)
