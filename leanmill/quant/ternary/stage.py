"""Ternary weights as a stage."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from leanmill.core.stage import Slot, Stage
from leanmill.kernels.ternary.naive import Scale, ternarise


class TernaryStage(Stage):
    """Snap a weight [..., out, in] to {-s, 0, s}; the gradient passes unchanged.

    Args:
        scale: How s and the threshold are chosen, see `leanmill.kernels.ternary.naive`.
        granularity: One s a matrix (`tensor`) or an output row (`row`).
    """

    slot: ClassVar[Slot] = Slot.QUANT
    technique: ClassVar[str] = "ternary"

    def __init__(self, scale: Scale = "absmean", granularity: Literal["tensor", "row"] = "tensor") -> None:
        super().__init__()
        self.scale: Scale = scale
        self.granularity = granularity

    def forward(self, weight: Tensor) -> Tensor:
        return _Ternarise.apply(weight, self.scale, (-2, -1) if self.granularity == "tensor" else (-1,))

    def extra_repr(self) -> str:
        return f"scale={self.scale}, granularity={self.granularity}"


class _Ternarise(torch.autograd.Function):
    """W -> its levels, gradient unchanged."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Scale, dims: tuple[int, ...]) -> Tensor:
        return ternarise(weight, scale, dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None
