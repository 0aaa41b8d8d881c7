"""Weighted k-means over the rows of one layer."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.core.passes import Solution
from leanmill.quant.clusters import nearest, weighted_levels


_ROWS = 256
"""Solved at a time."""


class SqueezeSolver:
    """Snaps weights to the levels of their row; see `SqueezeLlm` for the arguments."""

    def __init__(self, *, num_bits: int, outlier_share: float, sensitive_share: float, iterations: int) -> None:
        self.num_levels, self.iterations = 2**num_bits, iterations
        self.outlier_share, self.sensitive_share = outlier_share, sensitive_share

    def solve(self, weight: Tensor, sensitivity: Tensor) -> Solution:
        stays = _largest(weight.abs(), self.outlier_share) | _largest(sensitivity, self.sensitive_share)
        for rows, mass, kept in zip(weight.split(_ROWS), sensitivity.split(_ROWS), stays.split(_ROWS), strict=True):
            levels = weighted_levels(rows, mass.masked_fill(kept, 0.0), self.num_levels, self.iterations)
            rows.copy_(torch.where(kept, rows, nearest(rows, levels)))
        return Solution(weight=weight)


def _largest(scores: Tensor, share: float) -> Tensor:
    """Bool mask of the share of largest scores over the whole matrix, rounded down."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().topk(int(share * scores.numel())).indices] = True
    return mask.view_as(scores)
