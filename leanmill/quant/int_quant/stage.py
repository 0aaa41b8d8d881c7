"""Symmetric integer grids as stages of weights and activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leanmill.quant.bits import SwitchedBits
from leanmill.quant.grids import Grid, NestedGrid, UniformGrid
from leanmill.quant.rules import AbsMax, LeastSquares
from leanmill.quant.scales import Granularity
from leanmill.quant.sharing import Sharing
from leanmill.quant.stages import ComputedScale, QuantInput


class IntWeights(SwitchedBits, ComputedScale):
    """Round a weight [..., out, in] to symmetric codes of `num_bits`; the gradient passes unchanged.

    Args:
        num_bits: 2 to 8.
        scale: `absmax` or `mse`, see `IntQuant`.
        granularity: What shares a scale.
        group_size: Neighbours of a group.
        widths: Bits that it is trained to be rounded to, all from codes of the most; none for `num_bits` alone.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    technique: ClassVar[str] = "int_quant"

    def __init__(
        self,
        num_bits: int,
        scale: Literal["absmax", "mse"] = "absmax",
        granularity: Granularity = "row",
        group_size: int | None = None,
        *,
        widths: Sequence[int] = (),
        has_warmup: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.own_bits, self.widths = num_bits, tuple(widths)
        super().__init__(
            self._grid_of(num_bits),
            AbsMax() if scale == "absmax" else LeastSquares(),
            Sharing(granularity, group_size),
            has_warmup=has_warmup,
            device=device,
        )

    def switch_to(self, num_bits: int) -> None:
        self.grid = self._grid_of(num_bits)

    def trained_bits(self) -> tuple[int, ...]:
        return self.widths

    def _grid_of(self, num_bits: int) -> Grid:
        if self.widths:
            return NestedGrid(max(self.widths), num_bits)
        return UniformGrid(num_bits, "symmetric", "straight_through")


class IntActivations(QuantInput):
    """Round every token [..., in] to symmetric codes of `num_bits` by its largest magnitude, straight-through.

    Args:
        num_bits: 2 to 8.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    technique: ClassVar[str] = "int_quant"

    def __init__(self, num_bits: int, *, has_warmup: bool = False, device: torch.device | None = None) -> None:
        super().__init__(has_warmup=has_warmup, device=device)
        self.grid = UniformGrid(num_bits, "symmetric", "straight_through")

    def rounded(self, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            exact = torch.promote_types(tokens.dtype, torch.float32)
            scale = tokens.abs().amax(-1, keepdim=True).to(exact) / self.grid.largest_code
        return self.grid.rounded(tokens, scale)

    def extra_repr(self) -> str:
        return f"{self.grid}"
