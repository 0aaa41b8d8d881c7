"""Ternary weights and 8-bit activations as stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leanmill.core.facets import Codes, PartStaging, Statistic
from leanmill.core.operands import lend
from leanmill.kernels.packing.op import pack, unpack
from leanmill.kernels.ternary.naive import Scale
from leanmill.kernels.ternary.op import Granularity, ternary
from leanmill.quant.inputs import Int8Input, NormInput
from leanmill.quant.sharing import Sharing
from leanmill.quant.stages import QuantStage


class TernaryStage(QuantStage):
    """Snap a weight [..., out, in] to {-s, 0, s}; the gradient passes unchanged.

    Args:
        scale: How s and the threshold are chosen, see `leanmill.kernels.ternary.op.ternary`.
        granularity: One s a matrix (`tensor`) or an output row (`row`).
        has_warmup: See `WarmedUp`.
        device: Of the weight.
    """

    technique: ClassVar[str] = "ternary"

    def __init__(
        self,
        scale: Scale = "absmean",
        granularity: Granularity = "tensor",
        *,
        has_warmup: bool = False,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(Sharing(granularity), has_warmup=has_warmup, device=device)
        self.scale: Scale = scale
        self.granularity: Granularity = granularity

    def rounded(self, weight: Tensor) -> Tensor:
        return ternary(weight, self.scale, self.granularity)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes | None:
        if self.is_mixed:
            return None
        levels = self.rounded(weight).float()
        shared = (-2, -1) if self.granularity == "tensor" else (-1,)
        scales = levels.abs().amax(shared, keepdim=True)
        # One scale a row is what packed layers hold; it may be the same for all.
        rows = scales.expand(*levels.shape[:-1], 1)
        return Codes(values=levels.sign().to(torch.int8), encoding="ternary", scales=rows, zero=0.0)

    def rounded_part(self, part: Tensor, shape: torch.Size) -> PartStaging | None:
        return None if self.scale == "mse" else self._with_sums(part, shape.numel())

    def _with_sums(self, part: Tensor, num_weights: int) -> PartStaging:
        """`absmean` and `twn` (see `ternary`) with the sums of the whole weight."""
        exact = part.detach().to(torch.promote_types(part.dtype, torch.float32))
        magnitude = exact.abs()
        mean = ((yield Statistic(magnitude.sum(dtype=torch.float64))) / num_weights).to(exact.dtype)
        if self.scale == "absmean":
            level, is_kept = mean, magnitude / torch.where(mean == 0, 1.0, mean) > 0.5
        else:
            is_kept = magnitude > 0.7 * mean
            total = yield Statistic((magnitude * is_kept).sum(dtype=torch.float64))
            level = (total / (yield Statistic(is_kept.sum(dtype=torch.float64))).clamp(min=1)).to(exact.dtype)
        # Rounded once, as in `ternary`.
        return lend(part, (exact.sign() * is_kept).to(part.dtype) * level.to(part.dtype))

    def packing(self, shape: torch.Size) -> TernaryPacking | None:
        if self.strength is not None:  # what lies between is not ternary
            return None
        # What shares a scale within a part: all of it, a matrix of it, or a row.
        dims = (-1,) if self.granularity == "row" else (-2, -1)
        return TernaryPacking(shape[-1], dims)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, granularity={self.granularity}"


@dataclass(frozen=True)
class TernaryPacking:
    """Codes of 2 bits and the scales; a matrix in one scale has one a part, which is 0 where the part is."""

    num_in: int
    dims: tuple[int, ...]
    """What shares a scale."""

    def pack(self, part: Tensor) -> tuple[Tensor, ...]:
        return pack((part.sign() + 1).to(torch.uint8), 2), part.abs().amax(self.dims, keepdim=True)

    def unpack(self, packed: Sequence[Tensor]) -> Tensor:
        codes, scales = packed
        if scales.dim() == len(self.dims):
            scales = scales.amax()  # of one matrix in several parts
        return (unpack(codes, 2, self.num_in).to(scales.dtype) - 1) * scales


class Int8Activations(Int8Input):
    """Tokens of 8 bits before ternary weights (BitNet b1.58)."""

    technique: ClassVar[str] = "ternary"
    formats: ClassVar[tuple[str, ...]] = ("bitnet", "packed")


class TernaryNorm(NormInput):
    """The norm inside of BitNet's layers."""

    technique: ClassVar[str] = "ternary"
    formats: ClassVar[tuple[str, ...]] = ("bitnet",)
