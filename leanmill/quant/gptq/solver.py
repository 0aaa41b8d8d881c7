"""GPTQ on one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leanmill.core.errors import RunError
from leanmill.core.obs import inverse_factor, solve_columns
from leanmill.core.passes import InputStatistics
from leanmill.quant.scales import symmetric_scale


if TYPE_CHECKING:
    from leanmill.quant.gptq.config import Gptq


class GptqSolver:
    """Rounds every column to the grid of its row or group and corrects the columns after it."""

    needs_gram = True

    def __init__(self, config: Gptq) -> None:
        self.config = config

    def check(self, name: str, shape: tuple[int, int]) -> None:
        self.config.check_shape(name, shape)

    def solve(self, weight: Tensor, statistics: InputStatistics) -> Tensor:
        assert statistics.gram is not None
        config, gram = self.config, statistics.gram
        order = torch.arange(weight.shape[1], device=weight.device)
        if config.order == "activations" and config.group_size is None:
            order = statistics.square_sum.argsort(descending=True, stable=True)
        try:
            factor = inverse_factor(gram[order][:, order], config.damping)
        except ValueError as error:
            raise RunError(str(error)) from None
        rule = _Grid(config)
        group_size = config.group_size or weight.shape[1]
        solved = solve_columns(weight[:, order], factor, rule, group_size=group_size)
        out = torch.empty_like(weight)
        out[:, order] = solved
        return out


class _Grid:
    def __init__(self, config: Gptq) -> None:
        self.config = config
        self.largest = 2 ** (config.weight_bits - 1) - 1
        self.scale = torch.empty(0)

    def start_group(self, columns: Tensor, diagonal: Tensor) -> None:
        self.scale = symmetric_scale(columns, self.config.weight_bits, self.config.scale, "row", None)[:, 0]

    def value(self, column: Tensor, index: int) -> Tensor:
        safe = torch.where(self.scale == 0, 1.0, self.scale)
        return (column / safe).round().clamp(-self.largest, self.largest) * self.scale
