"""ARank (arXiv:2410.13859): how much of the row the attention of a layer tells apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_ranks(maps: Tensor) -> Tensor:
    """Return the rank of every attention map [..., S, S] without its diagonal: [...] int64, at most S - 1.

    The diagonal, which the authors' code takes out too, alone would give every causal map full rank.
    """
    return torch.linalg.matrix_rank(maps.float().tril(-1))


def lowest(ranks: Sequence[float], num: int) -> list[int]:
    """Return the indices of the `num` lowest ranks, in order; the deeper of two equal ones."""
    return sorted(sorted(range(len(ranks)), key=lambda layer: (ranks[layer], -layer))[:num])
