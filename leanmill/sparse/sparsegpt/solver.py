"""SparseGPT on one layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leanmill.core.errors import RunError
from leanmill.core.obs import inverse_factor, solve_columns
from leanmill.core.passes import InputStatistics, Solution
from leanmill.sparse.pattern import PruningPass


class SparseGptSolver:
    """Zeroes the weights of smallest w^2 / [H^-1]_jj^2 and corrects the rest."""

    needs_gram = True

    def __init__(self, pattern: PruningPass, *, damping: float, block_size: int) -> None:
        self.pattern, self.damping, self.block_size = pattern, damping, block_size

    def check(self, name: str, shape: tuple[int, int]) -> None:
        self.pattern.check_shape(name, shape)

    def prepare(self, statistics: InputStatistics) -> Callable[[Tensor], Solution]:
        assert statistics.gram is not None
        try:
            factor = inverse_factor(statistics.gram, self.damping)
        except ValueError as error:
            raise RunError(str(error)) from None
        group_size = self.pattern.group_size or self.block_size

        def solve(weight: Tensor) -> Solution:
            # A feature that was always 0 is free to prune, and nothing can make up for its weights.
            weight.masked_fill_(statistics.square_sum == 0, 0.0)
            found, error = solve_columns(weight, factor, _Mask(self.pattern), group_size=group_size)
            return Solution(weight=found, squared_error=error)

        return solve


class _Mask:
    def __init__(self, pattern: PruningPass) -> None:
        self.pattern = pattern
        self.keep = torch.empty(0)

    def start_group(self, columns: Tensor, diagonal: Tensor) -> None:
        self.keep = self.pattern.keep((columns / diagonal).square(), whole=True)

    def value(self, column: Tensor, index: int) -> Tensor:
        return column * self.keep[:, index]
