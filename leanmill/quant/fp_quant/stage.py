"""Floating-point formats as stages of weights and activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from leanmill.core.errors import ConfigError
from leanmill.core.facets import FloatCodes, PartStaging, Statistic
from leanmill.core.operands import lend
from leanmill.core.site import Site
from leanmill.core.sites import Sites
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


@dataclass(frozen=True)
class TokenRounding:
    """How tokens [..., in], or their gradients, are rounded: each by itself.

    Scales are those of the weights' formats, with a token for a matrix: one absmax scale a token for elements without
    blocks, and NVFP4's outer scale is one a token too. The `mse` of `PowersOfTwo` is `ceil` here.
    """

    format_: FloatFormat
    is_scaled: bool = True
    """Whether elements without blocks have a scale at all."""
    shared_exponent: SharedExponent = "floor"
    """Of blocks."""

    def rounded(self, tokens: Tensor) -> Tensor:
        """Return the rounded tokens, same shape and dtype, straight-through."""
        grid, size = grid_of(self.format_), self.format_.block_size
        if self.format_.block_scale == "two_level":
            assert size is not None
            return two_level(tokens, tokens.detach().abs().amax(-1, keepdim=True), grid, size)
        with torch.no_grad():
            scale = self._scale_of(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), grid)
        return grid.rounded(tokens, scale)

    def _scale_of(self, tokens: Tensor, grid: FloatGrid) -> Tensor:
        largest = tokens.abs().unflatten(-1, (-1, self.format_.block_size or tokens.shape[-1])).amax(-1)
        if self.format_.block_scale is not None:
            return PowersOfTwo(self.shared_exponent).of_largest(largest, grid)
        has_scale = self.is_scaled and not self.format_.is_unscaled
        return largest / grid.largest_code if has_scale else torch.ones_like(largest)


class FloatActivations(QuantInput):
    """Round every token [..., in] to floating-point elements, straight-through.

    Args:
        rounding: Of tokens.
        gradient: Of the gradients of what they are multiplied to, [..., out]; None leaves those alone.
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    technique: ClassVar[str] = "fp_quant"

    def __init__(
        self,
        rounding: TokenRounding,
        gradient: TokenRounding | None = None,
        *,
        has_warmup: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(has_warmup=has_warmup, device=device)
        self.rounding, self.gradient = rounding, gradient

    def rounded(self, tokens: Tensor) -> Tensor:
        return self.rounding.rounded(tokens)

    def on_product(self, product: Tensor) -> Tensor:
        if self.gradient is None or not (torch.is_grad_enabled() and product.requires_grad):
            return product
        return _RoundGradient.apply(product, self)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.rounding}, gradient={self.gradient}"


class FloatGradients(FloatActivations):
    """Leave tokens alone and round the gradients of what they are multiplied to; as `FloatActivations`."""

    is_cancelled: ClassVar[bool] = True

    def __init__(
        self, gradient: TokenRounding, *, has_warmup: bool = False, device: torch.device | None = None
    ) -> None:
        super().__init__(gradient, gradient, has_warmup=has_warmup, device=device)

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Tensor, stage: FloatActivations) -> Tensor:
        ctx.stage = stage
        return product.view_as(product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        stage: FloatActivations = ctx.stage
        assert stage.gradient is not None
        return stage.mixed(grad, stage.gradient.rounded(grad)), None


def make_inputs(
    rounding: TokenRounding | None,
    gradient: TokenRounding | None,
    *,
    has_warmup: bool = False,
    device: torch.device | None = None,
) -> FloatActivations | None:
    """Return the stage of an input for tokens, gradients, or both; None for neither."""
    if rounding is not None:
        return FloatActivations(rounding, gradient, has_warmup=has_warmup, device=device)
    return None if gradient is None else FloatGradients(gradient, has_warmup=has_warmup, device=device)


def check_gradients(sites: Sites, selected: Sequence[Site], block_size: int | None) -> None:
    """Refuse targets whose outputs' gradients cannot be rounded.

    Raises:
        ConfigError: One is the output head, whose logits never exist as a whole, or has outputs that blocks do not
            divide; the message says what to type.
    """
    for site in selected:
        if sites.candidates[site.site_name].kind == "head":
            raise ConfigError(
                f"{site.site_name}: gradients of logits are not rounded, which a loss makes without logits; remove it "
                f"from fp_quant.targets, or give it an fp_quant of its own without gradient_format"
            )
        num_out = site.raw_weight.shape[-2]
        if block_size is not None and num_out % block_size:
            raise ConfigError(
                f"{site.site_name}: the blocks of {block_size} of fp_quant.gradient_format do not divide its {num_out} "
                f"outputs; add {site.site_name!r} to fp_quant.exclude, or choose a format without blocks, e.g. e5m2"
            )


def grid_of(format_: FloatFormat) -> FloatGrid:
    """Return the grid of a format's elements."""
    return FloatGrid(format_.exponent_bits, format_.mantissa_bits, format_.largest)
