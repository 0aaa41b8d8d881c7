"""Wanda on one layer."""

from __future__ import annotations

from torch import Tensor

from leanmill.core.passes import InputStatistics
from leanmill.sparse.pattern import PruningPass


class WandaSolver:
    """Zeroes the weights of smallest |w_ij| ||x_j||; the others stay as they are."""

    needs_gram = False

    def __init__(self, pattern: PruningPass) -> None:
        self.pattern = pattern

    def check(self, name: str, shape: tuple[int, int]) -> None:
        self.pattern.check_shape(name, shape)

    def solve(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        return weight * self.pattern.keep(weight.abs() * statistics.square_sum.sqrt())
