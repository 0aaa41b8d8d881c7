"""The N:M mask as a stage; its two gradients are those of `nm_project`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.rules import StepContext, StepRule
from leanmill.core.sites import iter_sites
from leanmill.core.stage import PartStaging, Slot, Stage
from leanmill.kernels.nm_mask.op import nm_compress, nm_expand, nm_project


class NMSparsityStage(Stage):
    """Zero all but the `num_kept` largest of every `group_size` neighbours of a weight [..., in].

    Args:
        num_kept: Entries kept of each group.
        group_size: Neighbours along the last dim in a group.
        decay: SR-STE's lambda of one optimizer step; 0 is plain straight-through.
        device: Where the buffer lives.
        dtype: Of the buffer; fp64 for fp64 weights.
    """

    slot: ClassVar[Slot] = Slot.MASK
    technique: ClassVar[str] = "nm_sparsity"
    once_a_step: ClassVar[bool] = True
    decay_left: Tensor
    """(1,), at least fp32: decay that the step's backward passes have still to add."""

    def __init__(
        self,
        num_kept: int,
        group_size: int,
        decay: float = 0.0,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_kept, self.group_size, self.decay = num_kept, group_size, decay
        self.register_buffer("decay_left", torch.full((1,), decay, dtype=dtype, device=device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        decay = self.decay_left if self.decay else None
        return nm_project(weight, self.num_kept, self.group_size, decay=decay, spend_decay=True)

    def on_part(self, part: Tensor, shape: torch.Size) -> PartStaging:
        return self.by_itself(part)

    def reset_parameters(self) -> None:
        self.decay_left.fill_(self.decay)

    def packing(self, shape: torch.Size) -> NMPacking:
        return NMPacking(self.num_kept, self.group_size)

    def pattern(self) -> tuple[int, int]:
        return self.num_kept, self.group_size

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


class DecayOncePerStep(StepRule):
    """Lets every stage add its decay once in a step.

    The first backward that reaches a stage takes all of it, so it does not matter how many there are: one
    a micro-batch, a chunk of the loss, or a use of a block. Gradients of micro-batches are summed; those
    of ranks are averaged, and every rank adds the same decay.
    """

    name = "nm_sparsity"

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def begin_step(self, context: StepContext) -> None:
        for _, site in iter_sites(self.model):
            stage = site.stage(Slot.MASK)
            if isinstance(stage, NMSparsityStage):
                stage.decay_left.fill_(stage.decay)
