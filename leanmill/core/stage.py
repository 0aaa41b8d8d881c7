"""Slots and stages: what may happen to a weight between the optimizer and the matmul, in one order."""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

from torch import Tensor, nn


class Slot(IntEnum):
    """The only order of stages, whatever order a recipe lists its techniques in.

    Mask before quantiser keeps N:M exact (the other way round, ties break it), and a delta before
    the mask is merged inside it.
    """

    DELTA = 0
    MASK = 1
    QUANT = 2

    @property
    def key(self) -> str:
        """Name of the slot inside `site.stages` and in state dicts."""
        return self.name.lower()


class Stage(nn.Module):
    """One transform of a weight `[..., out, in]`, differentiable, straight-through inside.

    Rules for implementers:

    - Plain tensor code on the weight; no `to_local()`, no cached references to parameters.
    - Compute statistics (scales, norms) in fp32 whatever the weight's dtype; return that dtype.
    - State that training changes is a Parameter of at least 1 dim (FSDP2 refuses 0-dim ones); a
      fixed mask is a frozen bool Parameter, so it is sharded with the weight; values that a step
      rule schedules are non-persistent fp32 buffers of shape (1,).
    - A stage may be called many times in a step: by micro-batches, chunks of a loss, recomputation. What
      its backward adds of its own accord (a decay) is to be used up by the first one and filled by a step rule.
    - Keep nothing weight-sized alive after `forward`: the site recomputes it in backward.
    """

    slot: ClassVar[Slot]
    technique: ClassVar[str]
    """Registered name of the technique, for messages."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the staged weight, same shape and dtype."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Fill own parameters and buffers after they have been materialised from meta.

        Called with the random generator already seeded for this stage, on full (unsharded) tensors.
        """
