"""Errors that add up, for the program that finds their least sum under a budget."""

from __future__ import annotations

from leanmill.core.least_error import least_error
from leanmill.core.levels import Judge, Space, State


class Program:
    """See `LayerBudgets`.

    Args:
        num_tokens: That errors at the output are measured on; None takes the errors of layers.
        seed: Of the rows.
    """

    def __init__(self, *, num_tokens: int | None, seed: int) -> None:
        self.num_tokens, self.seed = num_tokens, seed

    def run(self, space: Space, judge: Judge) -> State:
        if self.num_tokens is None:
            return least_error(space, judge.layer_errors(), technique="layer_budgets")
        units = len(space.costs)
        alone = [
            [level if index == unit else None for index in range(units)]
            for unit in range(units)
            for level in range(space.num_levels)
        ]
        losses = judge.losses(alone, num_tokens=self.num_tokens, draw=f"{self.seed} budgets")
        errors = [losses[unit * space.num_levels : (unit + 1) * space.num_levels] for unit in range(units)]
        return least_error(space, errors, technique="layer_budgets")
