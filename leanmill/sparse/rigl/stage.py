"""A mask that a step rule moves, as a stage; the gradient passes to masked weights too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leanmill.core.selection import largest
from leanmill.sparse.held import HeldMask


class MovingMask(HeldMask):
    """Zero the weights [..., out, in] whose mask is off.

    Args:
        shape: Of the weight.
        num_active: Weights that are on, in the whole.
        start: Which are on at first: drawn at random, or the largest of the weight that is loaded.
        device: Where the mask lives.
    """

    technique: ClassVar[str] = "rigl"

    def __init__(
        self,
        shape: Iterable[int],
        num_active: int,
        start: Literal["random", "magnitude"] = "random",
        *,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(shape, device=device)
        self.num_active, self.start = num_active, start

    def reset_parameters(self) -> None:
        self.mask.copy_(largest(torch.rand(self.mask.shape), self.num_active))

    @property
    def has_initialiser(self) -> bool:
        return self.start == "magnitude"

    def initialise(self, weight: Tensor) -> None:
        self.mask.copy_(largest(weight, self.num_active))

    def extra_repr(self) -> str:
        return f"num_active={self.num_active}, start={self.start!r}"
