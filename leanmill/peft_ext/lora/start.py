"""Adapters that begin with factors on disk."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from leanmill.core.facets import StoredFactors
from leanmill.core.site import Site
from leanmill.peft_ext.lora.stage import LoraStage


class StoredLoraStage(LoraStage):
    """Starts from stored factors, whatever the weight is; what they add stays the same under another scaling.

    Args:
        weight: See `LoraStage`.
        scaling: s.
        stored: Of the same rank.
    """

    def __init__(self, weight: Tensor, scaling: float, stored: StoredFactors) -> None:
        super().__init__(weight, stored.rank, scaling)
        self.stored = stored

    @torch.no_grad()
    def initialise(self, weight: Tensor) -> None:
        found = self.stored.read()
        share = (found.scaling / self.scaling) ** 0.5  # in equal parts, as in LQ-LoRA's code
        self.lora_A.copy_(found.a * share)
        self.lora_B.copy_(found.b * share)


def stage_of(
    site: Site,
    rank: int,
    scaling: float,
    init: Literal["kaiming", "gaussian", "stored"],
    stored: StoredFactors | None,
) -> LoraStage:
    """Return the adapter of a site; without `stored`, one that is to start from it is filled from a checkpoint."""
    if stored is not None:
        return StoredLoraStage(site.raw_weight, scaling, stored)
    return LoraStage(site.raw_weight, rank, scaling, init="kaiming" if init == "stored" else init)
