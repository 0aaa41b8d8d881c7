"""GPTQ on one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from leanmill.core.errors import RunError
from leanmill.core.obs import inverse_factor, solve_columns
from leanmill.core.passes import InputStatistics, Solution
from leanmill.quant.scales import check_group_size, symmetric_scale


class GptqSolver:
    """Rounds every column to the grid of its row or group and corrects the columns after it.

    Args:
        num_bits: 2 to 8.
        group_size: Neighbours in a row that share a scale; None is the row.
        scale: See `symmetric_scale`.
        damping: See `inverse_factor`.
        by_activations: Fix the features of largest square sum first, where a row has one scale.
    """

    needs_gram = True

    def __init__(
        self,
        *,
        num_bits: int,
        group_size: int | None,
        scale: Literal["absmax", "mse"],
        damping: float,
        by_activations: bool,
    ) -> None:
        self.group_size, self.damping = group_size, damping
        self.by_activations = by_activations and group_size is None
        self.rule = _Grid(num_bits, scale)

    def check(self, name: str, shape: tuple[int, int]) -> None:
        check_group_size(name, shape, self.group_size)

    def prepare(self, statistics: InputStatistics) -> Callable[[Tensor], Solution]:
        assert statistics.gram is not None
        gram, order = statistics.gram, None
        if self.by_activations:
            order = statistics.square_sum.argsort(descending=True, stable=True)
            gram = gram.permuted(order)
            statistics.gram.tiles.clear()
        try:
            factor = inverse_factor(gram, self.damping)
        except ValueError as error:
            raise RunError(str(error)) from None

        def solve(weight: Tensor) -> Solution:
            group_size = self.group_size or weight.shape[1]
            if order is not None:
                weight.copy_(weight[:, order])
            found, error = solve_columns(weight, factor, self.rule, group_size=group_size)
            if order is not None:
                weight[:, order] = found
                found = weight
            return Solution(weight=found, squared_error=error)

        return solve


class _Grid:
    def __init__(self, num_bits: int, rule: Literal["absmax", "mse"]) -> None:
        self.num_bits, self.rule = num_bits, rule
        self.largest = 2 ** (num_bits - 1) - 1
        self.scale = torch.empty(0)

    def start_group(self, columns: Tensor, diagonal: Tensor) -> None:
        # Some rows at a time, since a group may be the whole matrix.
        parts = [symmetric_scale(rows, self.num_bits, self.rule, "row", None)[:, 0] for rows in columns.split(64)]
        self.scale = torch.cat(parts)

    def value(self, column: Tensor, index: int) -> Tensor:
        safe = torch.where(self.scale == 0, 1.0, self.scale)
        return (column / safe).round().clamp(-self.largest, self.largest) * self.scale
