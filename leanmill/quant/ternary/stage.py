"""Ternary weights as a stage."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from leanmill.core.stage import Slot, Stage
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

    def extra_repr(self) -> str:
        return f"scale={self.scale}, granularity={self.granularity}"
