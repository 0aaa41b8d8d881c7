"""CBQ on the layers of one window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leanmill.core.noise import derive_seed
from leanmill.kernels.fake_quant.grid import Kind
from leanmill.quant.cbq.outliers import cut_off
from leanmill.quant.cbq.rounding import LowRankRounding
from leanmill.quant.grids import UniformGrid


FREE_SHARE = 0.2
"""Of a window's steps in which nothing pulls roundings to 0 or 1, as in AdaRound; so are the next two."""
FIRST_POWER, LAST_POWER = 20.0, 2.0
"""Between which beta of the pull falls."""


class CbqSolver:
    """Rounds by trained steps and roundings; see `Cbq` for the arguments."""

    def __init__(
        self,
        *,
        num_bits: int,
        grid: Kind,
        group_size: int | None,
        rank: int,
        cut_outliers: bool,
        is_soft: bool,
        rounding_lr: float,
        step_lr: float,
        pull_weight: float,
        divergence_weight: float,
        seed: int,
    ) -> None:
        self.grid, self.group_size, self.rank = UniformGrid(num_bits, grid), group_size, rank
        self.cut_outliers, self.is_soft, self.seed = cut_outliers, is_soft, seed
        self.rounding_lr, self.step_lr = rounding_lr, step_lr
        self.pull_weight, self.divergence_weight = pull_weight, divergence_weight

    def layer(self, name: str, weight: Tensor) -> LowRankRounding:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "cbq", name))
        return LowRankRounding(
            cut_off(weight) if self.cut_outliers else weight,
            self.grid,
            group_size=self.group_size,
            rank=min(self.rank, *weight.shape),
            is_soft=self.is_soft,
            generator=generator,
        )

    def optimizer(self, layers: Sequence[LowRankRounding]) -> torch.optim.Optimizer:
        matrices = [matrix for layer in layers for matrix in (layer.rows, layer.columns)]
        steps = [layer.log_change for layer in layers]
        return torch.optim.Adam(
            [{"params": matrices, "lr": self.rounding_lr}, {"params": steps, "lr": self.step_lr}],
        )

    def loss(self, found: Tensor, wanted: Tensor, size: float) -> Tensor:
        """Return ||found - wanted||^2 / size + lambda KL(softmax(wanted) || softmax(found)), both over channels.

        CBQ does not divide; then learning rates and weights would mean something else in every model.
        """
        squared = (found - wanted).square().sum(-1).mean() / max(size, 1e-30)
        if not self.divergence_weight:
            return squared
        ours, theirs = found.log_softmax(-1), wanted.log_softmax(-1)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
        return squared + self.divergence_weight * divergence

    def pull(self, layers: Sequence[LowRankRounding], progress: float) -> Tensor | None:
        if not self.is_soft or progress < FREE_SHARE or not self.pull_weight:
            return None
        power = FIRST_POWER + (LAST_POWER - FIRST_POWER) * (progress - FREE_SHARE) / (1 - FREE_SHARE)
        distances = [(1 - (2 * layer.shares() - 1).abs().pow(power)).sum() for layer in layers]
        return self.pull_weight * torch.stack(distances).sum()
