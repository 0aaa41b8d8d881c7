"""CBQ. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.passes import WindowPassConfig, WindowSolver


class Cbq(WindowPassConfig):
    """Train rounding and steps of several blocks at once, until they compute what they did (Ding et al. 2025).

    CBQ, arXiv:2312.07950, for weights: a window slides over the blocks; in it, steps and what is added to each
    rounding, a product of two thin matrices (LoRA-Rounding), are trained on the window's output (cross-block
    dependency), after outliers were cut off (coarse-to-fine preprocessing). Weights that are 0 stay 0.
    """

    type: Literal["cbq"] = "cbq"
    """Name of the pass."""
    weight_bits: int = Field(default=4, ge=1, le=8)
    """Bits b of a weight."""
    grid: Literal["symmetric", "signed", "midrise"] = "symmetric"
    """Codes: `symmetric` -(2^(b-1) - 1) to 2^(b-1) - 1, which `int_quant` trains, `signed` one more below, `midrise`
    the halves between, without zero; `lsq` trains all three."""
    group_size: int | None = Field(default=128, ge=2)
    """Neighbours in a row that share a step; None is one step a row."""
    rank: int = Field(default=5, ge=1)
    """Columns of the two matrices whose product turns roundings of a weight up or down."""
    cut_outliers: bool = True
    """Cut weights off where the gap above what lies inside is widest, among those beyond 1.5 interquartile ranges."""
    rounding: Literal["hard", "soft"] = "hard"
    """What a window computes with in training: `hard` the rounded weights, which the gradient of soft ones trains;
    `soft` the soft ones, pulled to 0 or 1, as in the paper, and rounded once the window is done."""
    rounding_lr: float = Field(default=0.03, ge=0)
    """Learning rate of the two matrices (Adam), which falls to a tenth over a window; 0 rounds to nearest."""
    step_lr: float = Field(default=0.003, ge=0)
    """Learning rate of the logarithm of steps, likewise; 0 keeps them at the least squared error of the weights."""
    pull_weight: float = Field(default=0.01, ge=0)
    """What the pull of soft roundings to 0 or 1 counts for, a weight, in units of the loss."""
    divergence_weight: float = Field(default=1.0, ge=0)
    """What the divergence of outputs, each token's as a softmax over its channels, counts for beside their squared
    distance."""

    @model_validator(mode="after")
    def _one_bit_has_a_grid(self) -> Self:
        if self.weight_bits == 1 and self.grid != "midrise":
            raise ConfigError(f"cbq with weight_bits 1 and grid {self.grid} has no positive code; set grid: midrise")
        return self

    @model_validator(mode="after")
    def _only_soft_ones_are_pulled(self) -> Self:
        if self.rounding == "hard" and "pull_weight" in self.model_fields_set:
            raise ConfigError("cbq: pull_weight is for soft roundings; remove it, or type rounding: soft")
        return self

    def check_shape_of(self, name: str, shape: tuple[int, int]) -> None:
        from leanmill.quant.scales import check_group_size

        check_group_size(name, shape, self.group_size)

    def solver(self, seed: int) -> WindowSolver:
        from leanmill.quant.cbq.solver import CbqSolver

        return CbqSolver(
            num_bits=self.weight_bits,
            grid=self.grid,
            group_size=self.group_size,
            rank=self.rank,
            cut_outliers=self.cut_outliers,
            is_soft=self.rounding == "soft",
            rounding_lr=self.rounding_lr,
            step_lr=self.step_lr,
            pull_weight=self.pull_weight,
            divergence_weight=self.divergence_weight,
            seed=seed,
        )
