"""Which of a few choices each of many takes, under budgets: a small integer program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np


if TYPE_CHECKING:
    from numpy.typing import NDArray


def cheapest_choices(
    cost: NDArray[np.float64], budgets: Sequence[tuple[NDArray[np.float64], float, float]]
) -> list[int] | None:
    """Return the choice of each row that cost least together; None where no choices keep to the budgets.

    Minimises sum_nc cost_nc x_nc over x_nc in {0, 1} with one choice a row. Solved by HiGHS (Huangfu and Hall 2018)
    through SciPy, to its tolerance: about a millionth of the largest cost.

    Args:
        cost: [n, c], finite and not negative.
        budgets: Each what a choice takes [n, c], and the least and the most that all may take together.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    largest = cost.max() or 1.0  # tolerances are absolute
    each = np.kron(np.eye(len(cost)), np.ones(cost.shape[1]))
    limits = [LinearConstraint(taken.ravel()[None], least, most) for taken, least, most in budgets]
    found = milp(
        (cost / largest).ravel(),
        integrality=np.ones(cost.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(each, 1, 1), *limits],
        options={"mip_rel_gap": 0},
    )
    return None if found.x is None else [int(choice) for choice in found.x.reshape(cost.shape).argmax(1)]
