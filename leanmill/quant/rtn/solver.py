"""Rounding one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from leanmill.core.passes import InputStatistics, Solution
from leanmill.kernels.fake_quant.op import fake_quant
from leanmill.quant.scales import check_group_size, symmetric_scale


_ROWS = 256
"""Rounded at a time."""


class RtnSolver:
    """Rounds to the nearest level.

    Args:
        num_bits: 2 to 8.
        group_size: Neighbours in a row that share a scale; None is the row.
        scale: See `symmetric_scale`.
    """

    needs_gram = False

    def __init__(self, *, num_bits: int, group_size: int | None, scale: Literal["absmax", "mse"]) -> None:
        self.num_bits, self.group_size, self.scale = num_bits, group_size, scale

    def check(self, name: str, shape: tuple[int, int]) -> None:
        check_group_size(name, shape, self.group_size)

    def prepare(self, statistics: InputStatistics) -> Callable[[Tensor], Solution]:
        return self._solve

    @torch.no_grad()
    def _solve(self, weight: Tensor) -> Solution:
        for rows in weight.split(_ROWS):
            granularity: Literal["row", "group"] = "row" if self.group_size is None else "group"
            scale = symmetric_scale(rows, self.num_bits, self.scale, granularity, self.group_size)
            rows.copy_(fake_quant(rows, scale, num_bits=self.num_bits, grid="symmetric"))
        return Solution(weight=weight)
