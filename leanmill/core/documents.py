"""Which places of packed rows see each other, said by documents: the mask of attention by document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """Rows of documents side by side. A token sees those of its own document up to itself.

    It goes through a model in the place of an attention mask, as flex_attention's BlockMask does.
    """

    lengths: tuple[int, ...]
    """Tokens of each document, one row's after the other's: together all places of the batch."""
    num_rows: int
    window: int | None
    """Places that a token sees at most, itself among them; None for all of its document before it."""
    device: torch.device

    def dense(self) -> Tensor:
        """Return which keys each query sees, bool [B, 1, S, S]."""
        lengths = torch.tensor(self.lengths, device=self.device)
        number = torch.arange(len(lengths), device=self.device).repeat_interleave(lengths).view(self.num_rows, -1)
        places = torch.arange(number.shape[1], device=self.device)
        near = places <= places[:, None]
        if self.window is not None:
            near &= places > places[:, None] - self.window
        return ((number[:, :, None] == number[:, None]) & near)[:, None]


def as_tensor(mask: Any) -> Any:
    """Return an attention mask as it was given to a block, `Documents` as the tensor that they stand for."""
    return mask.dense() if isinstance(mask, Documents) else mask


def places_seen(first: int, end: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which places [0, end) of a document its queries [first, end) see, bool; None for the causal triangle."""
    if first == 0 and (window is None or end <= window):
        return None
    keys = torch.arange(end, device=device)
    queries = keys[first:, None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
