"""One-shot pruning by magnitude, the baseline. Imports no torch."""

from __future__ import annotations

from typing import Literal

from leanmill.core.passes import LayerSolver
from leanmill.sparse.pattern import PruningPass


class Magnitude(PruningPass):
    """Keep the weights of largest magnitude, in each group or over the whole matrix.

    Han et al. 2015, arXiv:1506.02626, without retraining.
    """

    type: Literal["magnitude"] = "magnitude"
    """Name of the pass."""

    def solver(self) -> LayerSolver:
        from leanmill.sparse.criterion import CriterionSolver, magnitude

        return CriterionSolver(self, magnitude, whole=True)
