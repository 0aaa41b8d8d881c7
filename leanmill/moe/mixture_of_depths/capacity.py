"""Which blocks choose their tokens, and what share of them they get. Imports no torch."""

from __future__ import annotations

import math


def default_layers(num_layers: int) -> list[int]:
    """Return all blocks but the first three and the last, as the code of gamma-MoD has it."""
    return list(range(3, num_layers - 1))


def decayed_capacities(num_layers: int, mean: float, lowest: float, highest: float) -> dict[int, float]:
    """Return p-MoD's shares by block (progressive ratio decay, arXiv:2412.04449).

    Block l of L gets max(lowest, mean + cos(pi l / (L - 1)) / 2); blocks for which that is above `highest` are left
    out, they run for all tokens.
    """
    shares = {layer: mean + math.cos(math.pi * layer / max(1, num_layers - 1)) / 2 for layer in range(num_layers)}
    return {layer: max(lowest, share) for layer, share in shares.items() if share <= highest}


def num_chosen(num_tokens: int, capacity: float) -> int:
    """Return capacity x tokens, rounded up: at least one token."""
    return max(1, math.ceil(num_tokens * capacity - 1e-9))
