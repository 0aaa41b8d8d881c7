"""Ternary weights and 8-bit activations as stages."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from leanmill.core.stage import Codes, InputSlot, InputStage, Slot, Stage
from leanmill.kernels.fake_quant.activations import quantise_activations
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

    def extra_repr(self) -> str:
        return f"scale={self.scale}, granularity={self.granularity}"


class Int8Activations(InputStage):
    """Round every token [..., in] to 8-bit codes and back, straight-through (BitNet b1.58)."""

    slot: ClassVar[InputSlot] = InputSlot.QUANT
    technique: ClassVar[str] = "ternary"
    formats: ClassVar[tuple[str, ...]] = ("bitnet", "packed")

    def forward(self, tokens: Tensor) -> Tensor:
        return quantise_activations(tokens)
