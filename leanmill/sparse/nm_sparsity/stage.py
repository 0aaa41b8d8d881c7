"""The N:M mask as a stage; its two gradients are those of `nm_project`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot, Stage
from leanmill.core.technique import StepContext, StepRule
from leanmill.kernels.nm_mask.op import nm_project


class NMSparsityStage(Stage):
    """Zero all but the `num_kept` largest of every `group_size` neighbours of a weight [..., in].

    Args:
        num_kept: Entries kept of each group.
        group_size: Neighbours along the last dim in a group.
        decay: SR-STE's lambda of one optimizer step; 0 is plain straight-through.
        device: Where the schedule buffer lives.
    """

    slot: ClassVar[Slot] = Slot.MASK
    technique: ClassVar[str] = "nm_sparsity"
    decay_share: Tensor
    """(1,) fp32: share of `decay` that one backward pass adds."""

    def __init__(
        self, num_kept: int, group_size: int, decay: float = 0.0, *, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.num_kept, self.group_size, self.decay = num_kept, group_size, decay
        self.register_buffer("decay_share", torch.ones(1, device=device), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        decay = self.decay * self.decay_share if self.decay else None
        return nm_project(weight, self.num_kept, self.group_size, decay=decay)

    def reset_parameters(self) -> None:
        self.decay_share.fill_(1.0)

    def extra_repr(self) -> str:
        return f"num_kept={self.num_kept}, group_size={self.group_size}, decay={self.decay}"


class DecayOncePerStep(StepRule):
    """Makes the decay of all micro-batches of a step add up to one.

    Gradients of micro-batches are summed, so each adds 1 / num_micro_batches of the decay. Gradients
    of ranks are averaged, and every rank adds the same decay, so ranks need no factor.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def begin_step(self, context: StepContext) -> None:
        for _, site in iter_sites(self.model):
            stage = site.stage(Slot.MASK)
            if isinstance(stage, NMSparsityStage):
                stage.decay_share.fill_(1.0 / context.num_micro_batches)
