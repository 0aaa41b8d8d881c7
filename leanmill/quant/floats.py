"""Small floating-point formats as grids."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leanmill.core.facets import Codes, FloatCodes
from leanmill.core.operands import lend
from leanmill.kernels.packing.elements import ELEMENT_BITS, smallest_exponent


_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}
"""Integers of the same size, and which of their bits are the exponent's."""


@dataclass(frozen=True)
class FloatGrid:
    """What a sign, E exponent bits and M mantissa bits can say, subnormals included, without infinities.

    The bias of the exponent is 2^(E - 1) - 1, as in IEEE 754. With no exponent bits, and with one, levels are at equal
    distances: 2^(1 - M) each. Values beyond the largest become it; a NaN stays one.
    """

    exponent_bits: int
    mantissa_bits: int
    largest_code: float
    """The largest value: formats spend their top codes differently."""

    @property
    def smallest_exponent(self) -> int:
        """Of normal numbers. Steps below, 2^(this - M), are no subnormals of fp32, which devices may drop."""
        return max(smallest_exponent(self.exponent_bits), self.mantissa_bits - 126)

    def snapped(self, units: Tensor) -> Tensor:
        """Return the nearest level of each of `units`, fp32 or fp64; ties go to the even mantissa."""
        steps = self._steps(units)
        return units.div(steps).round_().mul_(steps).clamp_(-self.largest_code, self.largest_code)

    def rounded(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return `values` [..., in] as levels times `scale`, at least fp32 inside, rounded once; straight-through.

        Args:
            values: Of any float dtype.
            scale: As `fake_quant` takes it: (1,), [..., 1, 1], [..., out, 1] or [..., out, groups].
        """
        return self.scaled(values, scale, None)

    def scaled(self, values: Tensor, scale: Tensor, reciprocal: Tensor | None) -> Tensor:
        """As `rounded`, and where a `reciprocal` of the scale is given values are multiplied by that instead."""
        with torch.no_grad():
            units, scales = _units(values, scale, reciprocal)
            rounded = self.snapped(units).mul_(scales).flatten(-2).to(values.dtype)
        return lend(values, rounded)

    @torch.no_grad()
    def elements(self, weight: Tensor, scale: Tensor, reciprocal: Tensor | None = None) -> Tensor | None:
        """Return the codes of `scaled(weight, ...)`, uint8 [..., out, in]; None where they have not 4, 6 or 8 bits.

        A zero has no sign here.
        """
        if 1 + self.exponent_bits + self.mantissa_bits not in ELEMENT_BITS:
            return None
        levels = self.snapped(_units(weight, scale, reciprocal)[0])
        steps = self._steps(levels)
        field = (steps.log2() + self.mantissa_bits).round() - self.smallest_exponent
        codes = (levels.abs() / steps + field * 2**self.mantissa_bits).to(torch.int16)
        sign = (levels < 0).to(torch.int16) << (self.exponent_bits + self.mantissa_bits)
        return (codes + sign).to(torch.uint8).flatten(-2)

    def _steps(self, units: Tensor) -> Tensor:
        """Distances of levels around `units`."""
        return below_as_power_of_two(units).clamp_(min=2.0**self.smallest_exponent).mul_(2.0**-self.mantissa_bits)

    def codes(self, weight: Tensor, scale: Tensor) -> Codes | None:
        """There are none: levels are at unequal distances."""
        return None


def float_codes(grid: FloatGrid, weight: Tensor, scale: Tensor, stored_as: torch.dtype) -> FloatCodes | None:
    """Return `grid.rounded(weight, scale)` as codes, where those have 4, 6 or 8 bits.

    Args:
        grid: Of the elements.
        weight: [..., out, in].
        scale: As `rounded` takes it.
        stored_as: See `FloatCodes.scales`.
    """
    values = grid.elements(weight, scale)
    if values is None:
        return None
    scales = scale.detach().float().clamp(min=torch.finfo(torch.float32).tiny).to(stored_as)
    return FloatCodes(values=values, exponent_bits=grid.exponent_bits, mantissa_bits=grid.mantissa_bits, scales=scales)


def _units(values: Tensor, scale: Tensor, reciprocal: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `values` over their scales, [..., groups, size], and the scales."""
    scales = scale.clamp(min=torch.finfo(scale.dtype).tiny).unsqueeze(-1)
    groups = values.to(scale.dtype).unflatten(-1, (scale.shape[-1], -1))
    return groups / scales if reciprocal is None else groups * reciprocal.unsqueeze(-1), scales


def below_as_power_of_two(values: Tensor) -> Tensor:
    """Return the largest power of two up to each |value|, fp32 or fp64: 0 for 0 and subnormals, inf for inf and NaN."""
    integers, exponent = _EXPONENT[values.dtype]
    return values.view(integers).bitwise_and(exponent).view(values.dtype)
