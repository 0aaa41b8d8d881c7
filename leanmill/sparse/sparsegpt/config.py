"""SparseGPT. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from leanmill.core.passes import LayerSolver
from leanmill.sparse.pattern import PruningPass


class SparseGpt(PruningPass):
    """Prune and let the survivors make up for it (Frantar and Alistarh 2023, arXiv:2301.00774).

    Prunes exactly the asked-for number of weights a block of columns, where the authors' code prunes
    one more and restarts groups at each block.
    """

    type: Literal["sparsegpt"] = "sparsegpt"
    """Name of the pass."""
    damping: float = Field(default=0.01, gt=0)
    """Added to the diagonal of the Hessian, as a share of its mean."""
    block_size: int = Field(default=128, ge=1)
    """Columns whose weights compete with each other where there is no N:M."""

    def solver(self) -> LayerSolver:
        from leanmill.sparse.sparsegpt.solver import SparseGptSolver

        return SparseGptSolver(self, damping=self.damping, block_size=self.block_size)
