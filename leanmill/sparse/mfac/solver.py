"""M-FAC on one layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from leanmill.core.passes import Solution
from leanmill.sparse.inverse_fisher import Inverse
from leanmill.sparse.pattern import PatternConfig


_ELEMENTS = 1 << 24
"""Of gradients that are solved at a time, fp64."""


class MFacSolver:
    """Zeroes the weights of least w^2 / [F^-1]_ii and corrects the others of their block; see `MFac`."""

    def __init__(self, pattern: PatternConfig, *, block_size: int, damping: float, rounds: int) -> None:
        self.pattern, self.block_size, self.damping = pattern, block_size, damping
        self.rounds = rounds if pattern.sparsity is not None else 1

    @torch.no_grad()
    def solve(self, weight: Tensor, sensitivity: Tensor) -> Solution:
        """Prune.

        Args:
            weight: [out, in] fp32; it is overwritten.
            sensitivity: Gradients of the calibration rows [rows, out, in], fp32; they are overwritten.
        """
        mean = float(sensitivity.square().mean(dtype=torch.float64))
        # Times the number of rows, for which the sum over them is then no mean.
        ridge = max(self.damping * mean, torch.finfo(torch.float32).tiny) * len(sensitivity)
        left = torch.ones_like(weight, dtype=torch.bool)
        for number in range(1, self.rounds + 1):
            sensitivity.mul_(left)  # the curvature among what is left
            diagonal = torch.empty_like(weight, dtype=torch.float64)
            for place, inverse in self._inverses(sensitivity, ridge):
                diagonal[place] = inverse.diagonal()
            score = (weight.double().square() / diagonal).float().masked_fill_(~left, -1.0)
            kept = self._after(number).keep(score, whole=True)
            lost = torch.where(left & ~kept, -weight.double() / diagonal, 0.0)
            for place, inverse in self._inverses(sensitivity, ridge):
                weight[place] += inverse.times(lost[place]).float()
            weight.masked_fill_(~kept, 0.0)
            left = kept
        return Solution(weight=weight)

    def _after(self, number: int) -> PatternConfig:
        """The pattern after a round: the same share of what is left goes in each."""
        if number == self.rounds or self.pattern.sparsity is None:
            return self.pattern
        share = 1 - (1 - self.pattern.sparsity) ** (number / self.rounds)
        return self.pattern.model_copy(update={"sparsity": share})

    def _inverses(self, gradients: Tensor, ridge: float) -> Iterator[tuple[tuple[slice, slice], Inverse]]:
        """Yield each block of columns of some rows, and the inverse of its Fisher matrices."""
        num_rows, num_out, num_in = gradients.shape
        together = max(1, _ELEMENTS // (num_rows * self.block_size))
        for first in range(0, num_out, together):
            for start in range(0, num_in, self.block_size):
                place = (slice(first, first + together), slice(start, start + self.block_size))
                yield place, Inverse(gradients[:, place[0], place[1]].transpose(0, 1).double(), ridge)
