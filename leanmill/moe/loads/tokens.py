"""How many tokens a micro-batch has beside the others of its step: padding is none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.core.batches import Batch
from leanmill.core.ledger import Ledger
from leanmill.core.stage import TechniqueModule
from leanmill.parallel.collectives import reduced


class TokenShare(TechniqueModule):
    """Of the micro-batch under way; one for all routers of a model.

    Costs nothing where batches have no `token_mask`, else one reduction of two numbers a step.

    Args:
        ledger: Of the run; it shows the batches.
        group: Ranks whose batches differ; None is all.
    """

    count: Tensor
    """fp32 (1,): tokens of the micro-batch."""
    share: Tensor
    """fp32 (1,): `count` over its mean over all micro-batches of all ranks in the step. A mean over the tokens of a
    micro-batch times this, averaged over micro-batches and ranks, is the mean over the tokens of the step."""

    def __init__(self, ledger: Ledger, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        # Past nn.Module's registration: a process group is no part of a model.
        self.__dict__["_group"] = group
        self._mean_count: Tensor | None = None
        for name in ("count", "share"):
            self.register_buffer(name, torch.ones(1), persistent=False)
        ledger.before_step(self._see_step)
        ledger.before_forward(self._see)

    @torch.no_grad()
    def _see_step(self, batches: Sequence[Batch]) -> None:
        masks = [batch["token_mask"] for batch in batches if "token_mask" in batch]
        if not masks:
            return
        num_tokens = torch.stack([mask.sum() for mask in masks]).sum().double()
        both = torch.stack([num_tokens, torch.full_like(num_tokens, len(masks))])
        total, num_batches = reduced(both, "sum", self.__dict__["_group"])
        self._mean_count = total / num_batches

    @torch.no_grad()
    def _see(self, batch: Batch) -> None:
        mask = batch.get("token_mask")
        if mask is None:
            self.count.fill_(batch["input_ids"].numel())
            self.share.fill_(1)
            return
        assert self._mean_count is not None, "the ledger sees a step before its first forward"
        self.count.copy_(mask.sum().reshape(1))
        self.share.copy_(self.count / self._mean_count.clamp(min=1))
