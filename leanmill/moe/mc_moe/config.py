"""Configuration of mixed-precision experts. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from leanmill.core.passes import ExpertPassConfig, ExpertSolver


class McMoe(ExpertPassConfig):
    """Quantise each expert to the 1 to 3 bits that an integer program gives it (Huang et al. 2024, arXiv:2410.06270).

    The program is solved exactly for each layer; weights are rounded by GPTQ to grids of 2^b levels.
    """

    type: Literal["mc_moe"] = "mc_moe"
    """Name of the pass."""
    average_bits: float = Field(default=2.0, ge=1, le=3)
    """Bits of a weight of an expert, on average over the experts of a layer."""
    frequency_power: float = Field(default=1.0, ge=0)
    """The paper's alpha: of how often an expert is chosen."""
    weight_power: float = Field(default=1.5, ge=0)
    """The paper's beta: of its mean combine weight over all tokens."""
    error_power: float = Field(default=2.0, ge=0)
    """The paper's gamma: of the error in the layer's output that rounding it makes. The authors' code raises it to
    alpha instead."""
    group_size: int | None = Field(default=128, ge=2)
    """Neighbours in a row that share a scale; None is one scale a row."""
    damping: float = Field(default=0.01, gt=0)
    """Added to the diagonal of the Hessian, as a share of its mean."""

    def solver(self) -> ExpertSolver:
        from leanmill.moe.mc_moe.solver import McMoeSolver

        return McMoeSolver(
            average_bits=self.average_bits,
            powers=(self.frequency_power, self.weight_power, self.error_power),
            group_size=self.group_size,
            damping=self.damping,
        )
