"""The zeros that a weight was loaded with, as a mask that stays."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.facets import PartStaging
from leanmill.core.stage import Slot, Stage


class ZeroMask(Stage):
    """W [..., out, in] -> W where the loaded weight was not zero, and zero elsewhere; the gradient likewise.

    The mask is a frozen bool parameter, so it is sharded and saved with the weight. It is filled once the weight
    is loaded; until then, and where the weight holds no zeros, it keeps everything.

    Args:
        weight: The weight it will be given: shape and device are taken.
    """

    slot: ClassVar[Slot] = Slot.MASK
    once_a_step: ClassVar[bool] = True
    kept: nn.Parameter
    """[..., out, in] bool: which weights may be other than zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        kept = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        self.kept = nn.Parameter(kept, requires_grad=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.kept.fill_(True)

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        self.kept.copy_(weight != 0)

    def forward(self, weight: Tensor) -> Tensor:
        # Not a product: what is zero stays zero beside an infinity too.
        return torch.where(self.kept, weight, weight.new_zeros(()))

    def on_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        return self.by_itself(part)
