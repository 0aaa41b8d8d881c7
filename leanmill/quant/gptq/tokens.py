"""What calibration tokens count for."""

from __future__ import annotations

import torch
from torch import Tensor


def by_attention(maps: Tensor, least: float) -> Tensor:
    """Return weights from `least` to 1, in each row linear in the attention that a token gets, [B, S] fp32.

    Of all heads and queries together; where all tokens of a row get the same, all weights are 1.

    Args:
        maps: Attention maps [B, heads, S, S], queries before keys.
        least: Of the token that gets least.
    """
    received = maps.float().sum((1, 2))
    low, high = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    share = torch.where(high > low, (received - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return least + (1 - least) * share
