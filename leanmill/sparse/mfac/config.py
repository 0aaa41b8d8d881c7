"""M-FAC. Imports no torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from leanmill.core.passes import SensitivePassConfig, SensitiveSolver
from leanmill.sparse.pattern import PatternConfig


class MFac(PatternConfig, SensitivePassConfig):
    """Prune by the curvature of the loss itself, and correct the survivors (Frantar et al. 2021, arXiv:2107.03356).

    The Fisher matrix of some neighbours of a row is that of the gradients g of the calibration rows, F = damping I +
    sum of g g^T / rows, and its inverse is never formed. Weights of least w^2 / [F^-1]_ii go, and others move by -w
    F^-1 e_i / [F^-1]_ii for each. Gradients take memory for the whole model in fp32, and for the layers of a block as
    often as there are calibration rows.
    """

    reads_each_row: ClassVar[bool] = True

    type: Literal["mfac"] = "mfac"
    """Name of the pass."""
    block_size: int = Field(default=128, ge=1)
    """Neighbours in a row that are looked at together; the last ones of a row may be fewer."""
    damping: float = Field(default=0.01, gt=0)
    """Added to the diagonal of the Fisher matrix, as a share of its mean over the layer."""
    rounds: int = Field(default=4, ge=1, le=64)
    """Times in which an ever larger share is pruned, each with an inverse for what the ones before left. With N:M one
    round has all of it."""

    def check_shape_of(self, name: str, shape: tuple[int, int]) -> None:
        self.check_shape(name, shape)

    def solver(self) -> SensitiveSolver:
        from leanmill.sparse.mfac.solver import MFacSolver

        return MFacSolver(self, block_size=self.block_size, damping=self.damping, rounds=self.rounds)
