"""Judges whose answers are a formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from leanmill.core.levels import Space, State


class FormulaJudge:
    """Gives each candidate `formula` of its levels; keeps what it was asked and told.

    Args:
        formula: Of a state, whose units may be None.
        ends_after: Generations after which `remember` fails, as where a process is killed.
    """

    def __init__(self, formula: Callable[[Sequence[int | None]], float], *, ends_after: int | None = None) -> None:
        self.formula, self.ends_after = formula, ends_after
        self.asked: list[tuple[list[Any], int, str]] = []
        self.memory: dict[str, Any] | None = None

    def losses(self, candidates: Sequence[Sequence[int | None]], *, num_tokens: int, draw: str) -> list[float]:
        self.asked.append((list(candidates), num_tokens, draw))
        return [self.formula(candidate) for candidate in candidates]

    def layer_errors(self) -> list[list[float]]:
        raise NotImplementedError

    def recall(self) -> dict[str, Any] | None:
        return self.memory

    def remember(self, found: dict[str, Any]) -> None:
        self.memory = found
        if len(found["parents"]) == self.ends_after:
            raise KeyboardInterrupt


def states_within(space: Space) -> list[State]:
    every = itertools.product(range(space.num_levels), repeat=len(space.costs))
    return [state for state in every if space.cost(state) <= space.budget]
