"""QuEST's rotation and rounding as stages of weights and activations."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from leanmill.core.facets import PartStaging
from leanmill.core.stage import InputSlot, InputStage, Slot, Stage
from leanmill.kernels.fake_quant.op import fake_quant
from leanmill.kernels.hadamard.naive import CLIPS
from leanmill.kernels.hadamard.op import hadamard, quest_quantise


class HadamardWeight(Stage):
    """Rotate every row of a weight [..., out, in] by an orthonormal Hadamard transform of blocks."""

    slot: ClassVar[Slot] = Slot.ROTATE
    technique: ClassVar[str] = "quest"
    once_a_step: ClassVar[bool] = True

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def forward(self, weight: Tensor) -> Tensor:
        return hadamard(weight, self.block_size)

    def on_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        return self.by_itself(part)

    def undo(self, weight: Tensor) -> Tensor:
        return hadamard(weight, self.block_size)  # its own inverse

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}"


class QuestWeight(Stage):
    """Round a rotated weight [..., out, in] to 2^b levels a row, with the trust gradient.

    A row's step is 2 clip sigma / (levels - 1), sigma the RMS of its entries and clip the Gaussian's
    best. Entries that are exactly 0 stay 0 and do not count in sigma, so a mask before this stage
    holds on a grid that has no zero; without a mask that changes nothing.
    """

    slot: ClassVar[Slot] = Slot.QUANT
    technique: ClassVar[str] = "quest"
    once_a_step: ClassVar[bool] = True

    def __init__(self, num_bits: int) -> None:
        super().__init__()
        self.num_bits = num_bits

    def forward(self, weight: Tensor) -> Tensor:
        num_levels = 2**self.num_bits
        with torch.no_grad():
            is_zero = weight == 0
            # In fp64, so that every order of summation gives the same fp32 sigma, nearly always.
            total = weight.to(torch.float64).square().sum(-1, keepdim=True)
            count = (~is_zero).sum(-1, keepdim=True).clamp(min=1)
            sigma = (total / count).sqrt().to(torch.promote_types(weight.dtype, torch.float32))
            step = sigma * (2 * CLIPS[num_levels] / (num_levels - 1))
        rounded = fake_quant(weight, step, num_bits=self.num_bits, grid="midrise")
        # Zero in value only: what a mask pruned keeps its gradient.
        return rounded - (rounded * is_zero).detach()

    def on_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        return self.by_itself(part)

    def extra_repr(self) -> str:
        return f"num_bits={self.num_bits}"


class HadamardInput(InputStage):
    """Rotate every token [..., in] like the weight, which cancels."""

    slot: ClassVar[InputSlot] = InputSlot.ROTATE
    technique: ClassVar[str] = "quest"
    is_cancelled: ClassVar[bool] = True

    def __init__(self, block_size: int) -> None:
        super().__init__()
        self.block_size = block_size

    def forward(self, tokens: Tensor) -> Tensor:
        return hadamard(tokens, self.block_size)

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}"


class QuestInput(InputStage):
    """Rotate every token [..., in] and round it to 2^b levels, with the trust gradient, in one pass."""

    slot: ClassVar[InputSlot] = InputSlot.QUANT
    technique: ClassVar[str] = "quest"

    def __init__(self, num_bits: int, block_size: int) -> None:
        super().__init__()
        self.num_bits, self.block_size = num_bits, block_size

    def forward(self, tokens: Tensor) -> Tensor:
        return quest_quantise(tokens, self.num_bits, self.block_size)

    def unrounded(self) -> HadamardInput:
        return HadamardInput(self.block_size)

    def extra_repr(self) -> str:
        return f"num_bits={self.num_bits}, block_size={self.block_size}"
