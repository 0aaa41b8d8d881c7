"""A mask that a step rule moves, as a stage; the gradient passes to masked weights too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from leanmill.core.selection import largest
from leanmill.core.stage import Slot, Stage


class MovingMask(Stage):
    """Zero the weights [..., out, in] whose mask is off.

    Args:
        shape: Of the weight.
        num_active: Weights that are on, in the whole.
        start: Which are on at first: drawn at random, or the largest of the weight that is loaded.
        device: Where the mask lives.
    """

    slot: ClassVar[Slot] = Slot.MASK
    technique: ClassVar[str] = "rigl"

    def __init__(
        self,
        shape: Iterable[int],
        num_active: int,
        start: Literal["random", "magnitude"] = "random",
        *,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_active, self.start = num_active, start
        mask = torch.empty(tuple(shape), dtype=torch.bool, device=device)
        self.mask = nn.Parameter(mask, requires_grad=False)

    def forward(self, weight: Tensor) -> Tensor:
        return _Gate.apply(weight, self.mask)  # type: ignore[no-any-return]

    def reset_parameters(self) -> None:
        self.mask.copy_(largest(torch.rand(self.mask.shape), self.num_active))

    @property
    def has_initialiser(self) -> bool:
        return self.start == "magnitude"

    def initialise(self, weight: Tensor) -> None:
        self.mask.copy_(largest(weight, self.num_active))

    def extra_repr(self) -> str:
        return f"num_active={self.num_active}, start={self.start!r}"


class _Gate(torch.autograd.Function):
    """Masked in forward; the gradient of the masked weight is that of the dense one, which growth looks at."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
