"""The N:M mask as a stage, at once or step by step; its gradients are those of `nm_project` and `nm_fade`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leanmill.core.facets import PartStaging
from leanmill.core.stage import Slot, Stage
from leanmill.kernels.nm_mask.fading import nm_fade
from leanmill.kernels.nm_mask.op import nm_compress, nm_expand, nm_project
from leanmill.sparse.schedule import Masking, MaskSchedule, WarmedUp


_LONG_RUN = 2**31
"""Steps of a run whose length is not known yet."""


class NMSparsityStage(Stage):
    """Zero all but the `num_kept` largest of every `group_size` neighbours of a weight [..., in].

    Args:
        num_kept: Entries kept of each group.
        group_size: Neighbours along the last dim in a group.
        decay: SR-STE's lambda of one optimizer step; 0 is plain straight-through.
        decay_warmup: Share of the run over which lambda grows from 0 to that.
        schedule: How the mask comes about; None has it from the start.
        masks_gradient: The gradient is multiplied with the mask, as the weight is.
        transposable: Two of every row and column of each 4 x 4 tile are kept, of weights [..., out, in].
        device: Where the buffer lives.
        dtype: Of the buffer; fp64 for fp64 weights.
    """

    slot: ClassVar[Slot] = Slot.MASK
    technique: ClassVar[str] = "nm_sparsity"
    once_a_step: ClassVar[bool] = True
    decay_left: Tensor
    """(1,), at least fp32: decay that the step's backward passes have still to add."""
    masking: Tensor
    """fp64 [3]: N, M and what is left of pruned weights. No buffer, so that it stays on the CPU, where it is read."""

    def __init__(
        self,
        num_kept: int,
        group_size: int,
        decay: float = 0.0,
        *,
        decay_warmup: float = 0.0,
        schedule: MaskSchedule | None = None,
        masks_gradient: bool = False,
        transposable: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_kept, self.group_size, self.decay = num_kept, group_size, decay
        self.decay_schedule = WarmedUp(strength=decay, share=decay_warmup)
        self.schedule, self.masks_gradient, self.transposable = schedule, masks_gradient, transposable
        first = Masking(num_kept, group_size, 0.0) if schedule is None else schedule.at(0, _LONG_RUN)
        self.masking = torch.tensor(first, dtype=torch.float64, device="cpu")
        self.register_buffer("decay_left", torch.full((1,), decay, dtype=dtype, device=device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        decay = self.decay_left if self.decay else None
        if self.schedule is None and not self.masks_gradient:
            pattern = (self.num_kept, self.group_size)
            return nm_project(weight, *pattern, decay=decay, spend_decay=True, transposable=self.transposable)
        return nm_fade(
            weight,
            self.masking,
            decay=decay,
            spend_decay=True,
            masks_gradient=self.masks_gradient,
            transposable=self.transposable,
        )

    def on_part(self, part: Tensor, shape: torch.Size) -> PartStaging | None:
        # A tile may lie on two ranks, but no matrix of a stack does.
        return None if self.transposable and len(shape) == 2 else self.by_itself(part)

    def start_step(self, step: int, num_steps: int) -> None:
        """Fill the decay of a step, and take the mask that the schedule has for it."""
        self.decay_left.fill_(self.decay_schedule.at(step, num_steps))
        if self.schedule is not None:
            self.take(self.schedule.at(step, num_steps))

    def take(self, masking: Masking) -> None:
        """Have this mask from now on."""
        self.masking.copy_(torch.tensor(masking, dtype=torch.float64))

    def reset_parameters(self) -> None:
        self.decay_left.fill_(self.decay)

    def packing(self, shape: torch.Size) -> NMPacking | None:
        # A pattern that changes has no form of one size.
        return NMPacking(self.num_kept, self.group_size) if self.schedule is None else None

    def pattern(self) -> tuple[int, int] | None:
        num_kept, group_size, left = self.masking.tolist()
        return (int(num_kept), int(group_size)) if left == 0 else None

    def extra_repr(self) -> str:
        return f"num_kept={self.num_kept}, group_size={self.group_size}, decay={self.decay}"


@dataclass(frozen=True)
class NMPacking:
    """Kept entries and where they stood; of 2:4 in bf16, 9/16 of the bytes."""

    num_kept: int
    group_size: int

    def pack(self, part: Tensor) -> tuple[Tensor, ...]:
        return nm_compress(part, self.num_kept, self.group_size)

    def unpack(self, packed: Sequence[Tensor]) -> Tensor:
        values, indices = packed
        return nm_expand(values, indices, self.num_kept, self.group_size)
