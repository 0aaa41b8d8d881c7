"""One-shot pruning of a layer by a score of each weight; survivors stay as they are."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from leanmill.core.passes import InputStatistics, Solution
from leanmill.sparse.pattern import PruningPass


Score = Callable[[Tensor, InputStatistics], Tensor]
"""Importance of each weight [out, in], at least 0, in memory of its own."""


class CriterionSolver:
    """Zeroes the weights of lowest score.

    Args:
        pattern: How many stay, and among which.
        score: Their importance.
        whole: Compare the whole matrix instead of each row, where there is no N:M.
    """

    needs_gram = False

    def __init__(self, pattern: PruningPass, score: Score, *, whole: bool) -> None:
        self.pattern, self.score, self.whole = pattern, score, whole

    def check(self, name: str, shape: tuple[int, int]) -> None:
        self.pattern.check_shape(name, shape)

    def prepare(self, statistics: InputStatistics) -> Callable[[Tensor], Solution]:
        def solve(weight: Tensor) -> Solution:
            is_kept = self.pattern.keep(self.score(weight, statistics), whole=self.whole)
            return Solution(weight=weight.masked_fill_(is_kept.logical_not_(), 0.0))

        return solve


def magnitude(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """Return |w|."""
    return weight.abs()


def magnitude_times_input_norm(weight: Tensor, statistics: InputStatistics) -> Tensor:
    """Return |w_ij| ||x_j|| (Sun et al. 2023, arXiv:2306.11695, eq. 1)."""
    return weight.abs().mul_(statistics.square_sum.sqrt())
