"""Ternary weights and 8-bit activations as stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leanmill.core.operands import lend
from leanmill.core.stage import Codes, InputSlot, InputStage, PartStaging, Slot, Stage, Statistic
from leanmill.kernels.fake_quant.activations import quantise_activations
from leanmill.kernels.packing.op import pack, unpack
from leanmill.kernels.ternary.naive import Scale
from leanmill.kernels.ternary.op import Granularity, ternary


class TernaryStage(Stage):
    """Snap a weight [..., out, in] to {-s, 0, s}; the gradient passes unchanged.

    Args:
        scale: How s and the threshold are chosen, see `leanmill.kernels.ternary.op.ternary`.
        granularity: One s a matrix (`tensor`) or an output row (`row`).
    """

    slot: ClassVar[Slot] = Slot.QUANT
    technique: ClassVar[str] = "ternary"
    once_a_step: ClassVar[bool] = True

    def __init__(self, scale: Scale = "absmean", granularity: Granularity = "tensor") -> None:
        super().__init__()
        self.scale: Scale = scale
        self.granularity: Granularity = granularity

    def forward(self, weight: Tensor) -> Tensor:
        return ternary(weight, self.scale, self.granularity)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Codes:
        levels = self(weight).float()
        shared = (-2, -1) if self.granularity == "tensor" else (-1,)
        scales = levels.abs().amax(shared, keepdim=True)
        # One scale a row is what packed layers hold; it may be the same for all.
        rows = scales.expand(*levels.shape[:-1], 1)
        return Codes(values=levels.sign().to(torch.int8), encoding="ternary", scales=rows, zero=0.0)

    def on_part(self, part: Tensor, shape: torch.Size) -> PartStaging | None:
        if self.granularity == "row" or len(shape) > 2:
            return self.by_itself(part)  # each expert has a scale of its own
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

    def packing(self, shape: torch.Size) -> TernaryPacking:
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


class Int8Activations(InputStage):
    """Round every token [..., in] to 8-bit codes and back, straight-through (BitNet b1.58)."""

    slot: ClassVar[InputSlot] = InputSlot.QUANT
    technique: ClassVar[str] = "ternary"
    formats: ClassVar[tuple[str, ...]] = ("bitnet", "packed")

    def forward(self, tokens: Tensor) -> Tensor:
        return quantise_activations(tokens)
