"""Wanda. Imports no torch."""

from __future__ import annotations

from typing import Literal

from leanmill.core.passes import LayerSolver
from leanmill.sparse.pattern import PruningPass


class Wanda(PruningPass):
    """Keep the weights of largest |w| times the norm of their input, in each group or row.

    Sun et al. 2023, arXiv:2306.11695. Ties keep the lower index, in the authors' code the higher one.
    """

    type: Literal["wanda"] = "wanda"
    """Name of the pass."""

    def solver(self) -> LayerSolver:
        from leanmill.sparse.criterion import CriterionSolver, magnitude_times_input_norm

        return CriterionSolver(self, magnitude_times_input_norm, whole=False)
