"""Floating-point formats as stages of weights and activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leanmill.core.facets import FloatCodes, PartStaging, Statistic
from leanmill.core.operands import lend
from leanmill.quant.floats import FloatGrid, float_codes
from leanmill.quant.fp_quant.blocks import PowersOfTwo, SharedExponent, Unscaled, two_level, two_level_codes
from leanmill.quant.fp_quant.formats import FloatFormat
from leanmill.quant.rules import AbsMax, LeastSquares, ScaleRule, largest_of_parts
from leanmill.quant.scales import Granularity
from leanmill.quant.sharing import Sharing
from leanmill.quant.stages import ComputedScale, QuantInput, QuantStage


ScaleName = Literal["absmax", "mse", "power_of_two", "none"]


def make_weights(
    formats: Sequence[FloatFormat],
    scale: ScaleName | None,
    granularity: Granularity | None,
    group_size: int | None,
    shared_exponent: SharedExponent = "floor",
    *,
    has_warmup: bool = False,
    device: torch.device | None = None,
) -> QuantStage:
    """Return the stage of a weight: of one format, or of whichever of several is best; see `FpQuant`."""
    first = formats[0]
    if first.block_scale == "two_level":
        return TwoLevelWeights(first, has_warmup=has_warmup, device=device)
    rule, sharing = _rule(first, scale, shared_exponent), Sharing(granularity or "row", group_size)
    if first.block_size is not None:
        sharing = Sharing("group", first.block_size)
    if len(formats) > 1:
        return BestWeights([grid_of(f) for f in formats], rule, sharing, has_warmup=has_warmup, device=device)
    return FloatWeights(grid_of(first), rule, sharing, has_warmup=has_warmup, device=device)


def _rule(format_: FloatFormat, scale: ScaleName | None, shared_exponent: SharedExponent) -> ScaleRule:
    if scale == "none" or format_.is_unscaled:
        return Unscaled()
    if scale == "power_of_two" or format_.block_scale is not None:
        return PowersOfTwo(shared_exponent)
    return LeastSquares() if scale == "mse" else AbsMax()


class FloatWeights(ComputedScale):
    """Round a weight [..., out, in] to floating-point elements; the gradient passes unchanged. As `ComputedScale`."""

    technique: ClassVar[str] = "fp_quant"
    grid: FloatGrid

    def float_codes(self, weight: Tensor) -> FloatCodes | None:
        if self.is_mixed:
            return None
        return float_codes(self.grid, weight, self._scale_of(weight), self.rule.stored_as)


class BestWeights(QuantStage):
    """Round a weight [..., out, in] to that of several grids which has the least squared error for the whole matrix.

    Each expert of a stacked weight has its own choice. The gradient passes unchanged.

    Args:
        grids: To choose from; the first of equals is taken.
        rule: How scales follow from the weight and a grid.
        sharing: What shares one.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    technique: ClassVar[str] = "fp_quant"

    def __init__(
        self,
        grids: Sequence[FloatGrid],
        rule: ScaleRule,
        sharing: Sharing,
        *,
        has_warmup: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(sharing, has_warmup=has_warmup, device=device)
        self.grids, self.rule = tuple(grids), rule

    def spans_rows(self, weight_shape: Sequence[int]) -> bool:
        return len(weight_shape) == 2

    def rounded(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            tried = self._tried(weight)
            errors = torch.stack([_squared_error(one, weight) for one in tried])
            best = _chosen(tried, errors)
        return lend(weight, best)

    def rounded_part(self, part: Tensor, shape: torch.Size) -> PartStaging | None:
        return None if self.sharing.spans_rows(shape) else self._with_errors_of_all(part)

    def _with_errors_of_all(self, part: Tensor) -> PartStaging:
        with torch.no_grad():
            tried = self._tried(part)
            errors = torch.stack([_squared_error(one, part) for one in tried])
        errors = yield Statistic(errors)
        return lend(part, _chosen(tried, errors))

    @torch.no_grad()
    def float_codes(self, weight: Tensor) -> FloatCodes | None:
        if self.is_mixed or weight.dim() != 2:  # experts may have different formats
            return None
        errors = [_squared_error(one, weight).item() for one in self._tried(weight)]
        grid = self.grids[min(range(len(errors)), key=errors.__getitem__)]
        return float_codes(grid, weight, self.rule.scale(weight, grid, self.sharing), self.rule.stored_as)

    def _tried(self, weight: Tensor) -> list[Tensor]:
        weight = weight.detach()
        return [grid.rounded(weight, self.rule.scale(weight, grid, self.sharing)) for grid in self.grids]

    def extra_repr(self) -> str:
        return f"{self.grids}, {self.rule}, {self.sharing}"


def _squared_error(rounded: Tensor, weight: Tensor) -> Tensor:
    """Of matrices [..., out, in]: [..., 1, 1], in fp64 so that no order shows."""
    return (rounded.double() - weight.detach().double()).square().sum((-2, -1), keepdim=True)


def _chosen(tried: Sequence[Tensor], errors: Tensor) -> Tensor:
    """Of each matrix [..., out, in] the form with the least of `errors` [forms, ..., 1, 1]; all NaN gives NaN."""
    best, least = tried[0], errors[0]
    for one, error in zip(tried[1:], errors[1:], strict=True):
        best, least = torch.where(error < least, one, best), torch.minimum(error, least)
    return best


class TwoLevelWeights(QuantStage):
    """Round a weight [..., out, in] as NVFP4 does, one outer scale a matrix; the gradient passes unchanged.

    Args:
        format_: Its elements and blocks.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    technique: ClassVar[str] = "fp_quant"

    def __init__(self, format_: FloatFormat, *, has_warmup: bool = False, device: torch.device | None = None) -> None:
        assert format_.block_size is not None
        super().__init__(Sharing("group", format_.block_size), has_warmup=has_warmup, device=device)
        self.grid, self.block_size = grid_of(format_), format_.block_size

    def spans_rows(self, weight_shape: Sequence[int]) -> bool:
        return len(weight_shape) == 2

    def rounded(self, weight: Tensor) -> Tensor:
        return two_level(weight, weight.detach().abs().amax((-2, -1), keepdim=True), self.grid, self.block_size)

    def rounded_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        return two_level(part, (yield from largest_of_parts(part)), self.grid, self.block_size)

    def float_codes(self, weight: Tensor) -> FloatCodes | None:
        if self.is_mixed:
            return None
        whole = weight.detach().abs().amax((-2, -1), keepdim=True)
        return two_level_codes(weight.detach(), whole, self.grid, self.block_size)

    def extra_repr(self) -> str:
        return f"{self.grid}, block_size={self.block_size}"


class FloatActivations(QuantInput):
    """Round every token [..., in] to floating-point elements, straight-through.

    Scales are those of the weights' formats, with a token for a matrix: one absmax scale a token for elements without
    blocks, and NVFP4's outer scale is one a token too.

    Args:
        format_: Elements, and blocks where it has some.
        is_scaled: Whether elements without blocks have a scale at all.
        shared_exponent: Of blocks, see `PowersOfTwo`; its `mse` is `ceil` here.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    technique: ClassVar[str] = "fp_quant"

    def __init__(
        self,
        format_: FloatFormat,
        *,
        is_scaled: bool = True,
        shared_exponent: SharedExponent = "floor",
        has_warmup: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(has_warmup=has_warmup, device=device)
        self.grid, self.block_size, self.block_scale = grid_of(format_), format_.block_size, format_.block_scale
        self.exponents = PowersOfTwo(shared_exponent)
        self.is_scaled = is_scaled and not format_.is_unscaled

    def rounded(self, tokens: Tensor) -> Tensor:
        if self.block_scale == "two_level":
            assert self.block_size is not None
            return two_level(tokens, tokens.detach().abs().amax(-1, keepdim=True), self.grid, self.block_size)
        with torch.no_grad():
            scale = self._scale_of(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))
        return self.grid.rounded(tokens, scale)

    def _scale_of(self, tokens: Tensor) -> Tensor:
        largest = tokens.abs().unflatten(-1, (-1, self.block_size or tokens.shape[-1])).amax(-1)
        if self.block_scale is not None:
            return self.exponents.of_largest(largest, self.grid)
        return largest / self.grid.largest_code if self.is_scaled else torch.ones_like(largest)

    def extra_repr(self) -> str:
        return f"{self.grid}, block_size={self.block_size}"


def grid_of(format_: FloatFormat) -> FloatGrid:
    """Return the grid of a format's elements."""
    return FloatGrid(format_.exponent_bits, format_.mantissa_bits, format_.largest)
