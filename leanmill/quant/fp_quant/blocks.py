"""Scales of blocks: powers of two (MX), and E4M3 times one of a whole (NVFP4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leanmill.core.facets import FloatCodes
from leanmill.quant.floats import FloatGrid, below_as_power_of_two
from leanmill.quant.grids import Grid
from leanmill.quant.rules import ScaleOfPart, largest_of_parts
from leanmill.quant.sharing import Sharing


SharedExponent = Literal["floor", "ceil", "mse"]
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127
"""Of shared scales. The format has 2^-127 too, which fp32 holds as a subnormal only."""
_E4M3_SMALLEST, _E4M3_LARGEST = 2.0**-6, 448.0
"""Of NVFP4's block scales: normal ones only, as in torchao."""
_TRIED = (1.0, 0.5, 0.25)
"""Shares of `ceil`'s scale that `mse` tries."""


@dataclass(frozen=True)
class PowersOfTwo:
    """A power of two as the scale of what shares one, as MX formats have it; a scale rule.

    `floor` is OCP's: 2^(floor(log2 amax) - emax), emax the exponent of the largest element, so that the largest of a
    block may saturate. `ceil` takes the least power of two under which nothing does (NVIDIA's, torchao's RCEIL), and
    `mse` of that and the next two below the one with the least squared error.
    """

    shared_exponent: SharedExponent = "floor"
    stored_as: ClassVar[torch.dtype] = torch.float8_e8m0fnu

    def scale(self, weight: Tensor, grid: Grid, sharing: Sharing) -> Tensor:
        """Return the scales of values [..., out, in], at least fp32, in the shape that `sharing` says."""
        exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        scale = self.of_largest(sharing.largest(exact), grid)
        if self.shared_exponent != "mse":
            return scale
        best, least = scale, torch.full_like(scale, torch.inf)
        for share in _TRIED:
            candidate = (scale * share).clamp(min=_SMALLEST)
            error = sharing.total((grid.rounded(exact, candidate) - exact).square())
            best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
        return best

    def of_largest(self, largest: Tensor, grid: Grid) -> Tensor:
        """Return the scales for the largest magnitudes of blocks: `floor`'s or `ceil`'s."""
        if self.shared_exponent == "floor":
            reach = below_as_power_of_two(torch.tensor(grid.largest_code))
            scale = below_as_power_of_two(largest) / float(reach)
        else:
            wanted = largest / grid.largest_code
            scale = below_as_power_of_two(wanted)
            scale = torch.where(scale < wanted, 2 * scale, scale)
        # Of what is not finite nothing finite may come.
        return torch.where(largest.isfinite(), scale.clamp(_SMALLEST, _LARGEST), torch.nan)

    def scale_of_part(self, part: Tensor, grid: Grid) -> ScaleOfPart | None:
        """Find the one scale of a weight [out, in] from some of its rows; None where only the whole tells."""
        return None if self.shared_exponent == "mse" else self._asking(part, grid)

    def _asking(self, part: Tensor, grid: Grid) -> ScaleOfPart:
        return self.of_largest((yield from largest_of_parts(part)), grid)


@dataclass(frozen=True)
class Unscaled:
    """No scale: a grid's own values; a scale rule."""

    stored_as: ClassVar[torch.dtype] = torch.float32

    def scale(self, weight: Tensor, grid: Grid, sharing: Sharing) -> Tensor:
        """Return 1 in a shape that fits all."""
        return weight.new_ones(1, dtype=torch.promote_types(weight.dtype, torch.float32))

    def scale_of_part(self, part: Tensor, grid: Grid) -> None:
        """Nobody shares anything, so nobody asks."""
        return None


def two_level(values: Tensor, whole: Tensor, grid: FloatGrid, block_size: int) -> Tensor:
    """Round `values` [..., in] as NVFP4 does, straight-through.

    A block's scale is its largest magnitude over that of the grid, in E4M3 relative to a scale of the whole,
    which is such that the largest block's is 448. Operations are torchao's, in its order.

    Args:
        values: Of any float dtype.
        whole: Largest magnitude of what shares the outer scale; broadcasts against [..., blocks].
        grid: E2M1.
        block_size: Neighbours of a block.
    """
    with torch.no_grad():
        scale, reciprocal = two_level_scales(values, whole, grid, block_size)
    return grid.scaled(values, scale, reciprocal)


def two_level_scales(values: Tensor, whole: Tensor, grid: FloatGrid, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the scales of blocks [..., blocks], and what values are multiplied by."""
    blocks, outer = _levels(values, whole, grid, block_size)
    return outer * blocks, (1.0 / outer) / blocks


@torch.no_grad()
def two_level_codes(values: Tensor, whole: Tensor, grid: FloatGrid, block_size: int) -> FloatCodes | None:
    """Return what `two_level` makes of a weight [..., out, in] as codes."""
    blocks, outer = _levels(values, whole, grid, block_size)
    elements = grid.elements(values, outer * blocks, (1.0 / outer) / blocks)
    if elements is None:
        return None
    return FloatCodes(
        values=elements,
        exponent_bits=grid.exponent_bits,
        mantissa_bits=grid.mantissa_bits,
        scales=blocks.to(torch.float8_e4m3fn),
        outer=outer.float(),
    )


def _levels(values: Tensor, whole: Tensor, grid: FloatGrid, block_size: int) -> tuple[Tensor, Tensor]:
    exact = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    outer = whole.to(exact.dtype) / (_E4M3_LARGEST * grid.largest_code)
    # Zeros alone need any scale; that of subnormal numbers would have no reciprocal.
    outer = torch.where(outer < _SMALLEST, 1.0, outer)
    wanted = exact.unflatten(-1, (-1, block_size)).abs().amax(-1) / grid.largest_code / outer
    return wanted.clamp(_E4M3_SMALLEST, _E4M3_LARGEST).to(torch.float8_e4m3fn).to(exact.dtype), outer
