"""Which expert gets how many bits."""

from __future__ import annotations

import torch
from torch import Tensor


CHOICES = (1, 2, 3)
"""Bits of an expert."""
_WANTED = {2: 1, 3: 2}
"""Bits that at least one expert must have, each with its flag in a state."""
_NUM_STATES = 4


def total_bits(average_bits: float, num_experts: int) -> int:
    """Return the bits of a layer's experts together, at most `average_bits` each."""
    return int(average_bits * num_experts + 1e-9)


def feasible_bits(num_experts: int) -> tuple[int, int]:
    """Return the least and the most bits that an assignment can have."""
    return num_experts - 2 + 3 + 2, 3 * num_experts - 1


def assign_bits(cost: Tensor, bits: int) -> list[int]:
    """Return the bits of each expert of a layer that cost least together.

    The paper's integer program: minimise sum_ib cost_ib x_ib over x_ib in {0, 1}, where every expert has one choice,
    all bits together are `bits`, and there is at least one expert of 3 bits and one of 2. Solved exactly by dynamic
    programming over experts, bits spent so far and which of the two wishes are met: a knapsack of small whole
    weights, which needs no general solver and no tolerance.

    Args:
        cost: [E, 3] not negative: of each expert at each of `CHOICES`.
        bits: Of all together.

    Raises:
        ValueError: There is no such assignment.
    """
    cost = cost.double().cpu()
    # Least cost of the experts so far, by wishes met and bits spent.
    least = torch.full((_NUM_STATES, bits + 1), torch.inf, dtype=torch.float64)
    least[0, 0] = 0.0
    came: list[tuple[Tensor, Tensor]] = []
    for expert in cost:
        least, choice, source = _extended(least, expert)
        came.append((choice, source))
    state = _NUM_STATES - 1
    if not torch.isfinite(least[state, bits]):
        raise ValueError(f"{len(cost)} experts cannot have {bits} bits together with one of 3 and one of 2 among them")
    found = []
    for choice, source in reversed(came):
        chosen, state = int(choice[state, bits]), int(source[state, bits])
        found.append(chosen)
        bits -= chosen
    return found[::-1]


def _extended(least: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add one expert: the least costs, and for each of them its bits and the state it came from."""
    best = torch.full_like(least, torch.inf)
    choice, source = torch.zeros(least.shape, dtype=torch.long), torch.zeros(least.shape, dtype=torch.long)
    for spent, price in zip(CHOICES, cost, strict=True):
        for before in range(_NUM_STATES):
            after = before | _WANTED.get(spent, 0)
            moved = torch.full_like(best[after], torch.inf)
            moved[spent:] = least[before, : len(moved) - spent] + price
            better = moved < best[after]
            best[after] = torch.where(better, moved, best[after])
            choice[after][better], source[after][better] = spent, before
    return best, choice, source
