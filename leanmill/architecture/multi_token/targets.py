"""Which tokens a depth of multi-token prediction reads and predicts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.core.batches import Batch


def tokens_ahead(batch: Batch, depth: int) -> Tensor:
    """Return t_{i+k} at position i, [B, S] int64; 0 past the row's end, where nothing is predicted."""
    return _ahead(batch["input_ids"], depth, 0)


def labels_ahead(batch: Batch, depth: int) -> Tensor:
    """Return t_{i+k+1} at position i, [B, S] int64, as far as `labels` has it and position i + k is of one document.

    Positions restart at each document, so k tokens further in the same one they are k larger, and never in another.
    """
    positions = batch["position_ids"]
    is_inside = _ahead(positions, depth, -1) == positions + depth
    return torch.where(is_inside, _ahead(batch["labels"], depth, -100), -100)


def _ahead(values: Tensor, depth: int, fill: int) -> Tensor:
    return F.pad(values[:, depth:], (0, min(depth, values.shape[1])), value=fill)
