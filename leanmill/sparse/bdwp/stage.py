"""Two N:M masks as a stage: one for forward, one for the gradient of the input."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from leanmill.core.stage import Slot, Stage
from leanmill.kernels.nm_mask.op import nm_project


class BdwpStage(Stage):
    """Keep N of M along the inputs in forward and along the outputs in backward; [..., out, in].

    Args:
        num_kept: Entries kept of each group.
        group_size: Neighbours in a group.
    """

    slot: ClassVar[Slot] = Slot.MASK
    technique: ClassVar[str] = "bdwp"

    def __init__(self, num_kept: int, group_size: int) -> None:
        super().__init__()
        self.num_kept, self.group_size = num_kept, group_size

    def forward(self, weight: Tensor) -> Tensor:
        return nm_project(weight, self.num_kept, self.group_size)

    def for_backward(self, weight: Tensor) -> Tensor:
        across = weight.transpose(-2, -1).contiguous()
        return nm_project(across, self.num_kept, self.group_size).transpose(-2, -1)

    def pattern(self) -> tuple[int, int]:
        return self.num_kept, self.group_size

    def extra_repr(self) -> str:
        return f"num_kept={self.num_kept}, group_size={self.group_size}"
