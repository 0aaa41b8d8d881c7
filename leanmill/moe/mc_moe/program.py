"""Which expert gets how many bits."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from leanmill.core.program import cheapest_choices


CHOICES = (1, 2, 3)
"""Bits of an expert."""
_WANTED = (2, 3)
"""Bits that at least one expert must have."""


def total_bits(average_bits: float, num_experts: int) -> int:
    """Return the bits of a layer's experts together, at most `average_bits` each."""
    return int(average_bits * num_experts + 1e-9)


def feasible_bits(num_experts: int) -> tuple[int, int]:
    """Return the least and the most bits that an assignment can have."""
    return num_experts - 2 + 3 + 2, 3 * num_experts - 1


def assign_bits(cost: Tensor, bits: int) -> list[int]:
    """Return the bits of each expert of a layer that cost least together.

    The paper's integer program: minimise sum_ib cost_ib x_ib over x_ib in {0, 1}, where every expert has one choice,
    all bits together are `bits`, and there is at least one expert of 3 bits and one of 2.

    Args:
        cost: [E, 3] finite and not negative: of each expert at each of `CHOICES`.
        bits: Of all together.

    Raises:
        ValueError: There is no such assignment.
    """
    values = cost.double().cpu().numpy()
    spent = np.tile(np.array(CHOICES, dtype=float), (len(values), 1))
    found = cheapest_choices(
        values, [(spent, bits, bits), *(((spent == wanted).astype(float), 1, np.inf) for wanted in _WANTED)]
    )
    if found is None:
        raise ValueError(
            f"{len(values)} experts cannot have {bits} bits together with one of 3 and one of 2 among them"
        )
    return [CHOICES[choice] for choice in found]
