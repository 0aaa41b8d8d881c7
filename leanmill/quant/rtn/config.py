"""Round to nearest. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from leanmill.core.passes import LayerPassConfig, LayerSolver


class Rtn(LayerPassConfig):
    """Round every weight to the nearest of its levels, the baseline of quantisation after training.

    The grid is that of `int_quant` and `gptq`: symmetric integers times a scale. Calibration text is not looked at.
    """

    type: Literal["rtn"] = "rtn"
    """Name of the pass."""
    weight_bits: int = Field(default=4, ge=2, le=8)
    """Bits b of a weight; codes are -(2^(b-1) - 1) to 2^(b-1) - 1."""
    group_size: int | None = Field(default=128, ge=2)
    """Neighbours in a row that share a scale; None is one scale a row."""
    scale: Literal["absmax", "mse"] = "absmax"
    """`absmax`: the largest magnitude is the outermost code. `mse`: of 40 shares of that, from 1 down to
    0.22, the one with the least squared error."""

    @property
    def bits_per_weight(self) -> float:
        return float(self.weight_bits)

    @property
    def reads_text(self) -> bool:
        return False

    def solver(self) -> LayerSolver:
        from leanmill.quant.rtn.solver import RtnSolver

        return RtnSolver(num_bits=self.weight_bits, group_size=self.group_size, scale=self.scale)
