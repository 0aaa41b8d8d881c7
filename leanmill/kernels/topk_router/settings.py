"""What one call of the router is told, apart from tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """See `op.topk_router`."""

    top_k: int
    is_sigmoid: bool
    normalise: bool
    scaling: float
    num_groups: int = 1
    """1 is without groups."""
    open_groups: int = 1
    num_best: int = 1
    num_sequences: int = 1

    def numbers(self) -> list[int]:
        """Return all but the scaling, as operators take them."""
        return [int(value) for name, value in zip(self._fields, self, strict=True) if name != "scaling"]

    @classmethod
    def of(cls, scaling: float, numbers: Sequence[int]) -> Settings:
        """Return what `numbers` was made from."""
        top_k, is_sigmoid, normalise, *others = numbers
        return cls(top_k, bool(is_sigmoid), bool(normalise), scaling, *others)


def num_counted(logits: Tensor, token_mask: Tensor | None, settings: Settings) -> Tensor:
    """Return how many tokens of each sequence are not masked, int64 [S]."""
    if token_mask is None:
        return torch.full((settings.num_sequences,), len(logits) // settings.num_sequences, device=logits.device)
    return token_mask.reshape(settings.num_sequences, -1).sum(-1)
