"""What every path of gated experts is given, and returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from leanmill.kernels.grouped_gemm.problem import Problem


@dataclass(frozen=True)
class Experts:
    """Checked operands of one call; N rows are in sorted order."""

    tokens: Tensor
    """[T, H], contiguous."""
    gate_up: Tensor
    """[E, 2I, H], contiguous, in the dtype of `tokens`."""
    down: Tensor
    """[E, H, I], likewise."""
    offsets: Tensor
    """[E] int64: end row of each expert."""
    positions: Tensor
    """[T, K] int64: sorted row of each copy."""
    weights: Tensor
    """[T, K]: combine weights."""
    num_kept: int | None = None
    """Rows that exist, where positions from there on have none."""

    def up_problem(self) -> Problem:
        """The product that gate and up come of."""
        return Problem(self.tokens, self.gate_up, self.offsets, gather_index=self.positions, num_kept=self.num_kept)

    def down_problem(self, hidden: Tensor) -> Problem:
        """The product that tokens are summed of."""
        positions, weights = self.positions, self.weights
        return Problem(hidden, self.down, self.offsets, None, positions, weights, num_kept=self.num_kept)


@dataclass(frozen=True)
class Gradients:
    """What backward has to return; None where it was not asked for."""

    tokens: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True)
class Needed:
    """Which gradients backward has to return."""

    tokens: bool = True
    gate_up: bool = True
    down: bool = True
    weights: bool = True
