"""Which expert gets how many bits."""

from __future__ import annotations

import numpy as np
from torch import Tensor


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
    all bits together are `bits`, and there is at least one expert of 3 bits and one of 2. Solved by HiGHS (Huangfu and
    Hall 2018) through SciPy, to its tolerance: about a millionth of the largest cost.

    Args:
        cost: [E, 3] finite and not negative: of each expert at each of `CHOICES`.
        bits: Of all together.

    Raises:
        ValueError: There is no such assignment.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    values = cost.double().cpu().numpy()
    num_experts = len(values)
    largest = values.max() or 1.0  # tolerances are absolute
    each = np.kron(np.eye(num_experts), np.ones(len(CHOICES)))
    spent = np.tile(np.array(CHOICES, dtype=float), num_experts)
    wanted = np.stack([np.tile(np.array(CHOICES) == choice, num_experts) for choice in _WANTED]).astype(float)
    found = milp(
        (values / largest).ravel(),
        integrality=np.ones(values.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(each, 1, 1),
            LinearConstraint(spent, bits, bits),
            LinearConstraint(wanted, 1, np.inf),
        ],
        options={"mip_rel_gap": 0},
    )
    if found.x is None:
        raise ValueError(
            f"{num_experts} experts cannot have {bits} bits together with one of 3 and one of 2 among them"
        )
    return [CHOICES[choice] for choice in found.x.reshape(values.shape).argmax(1)]
