"""What calibration tokens count for: the strategies of RSQ (Sung et al. 2025, arXiv:2503.01820)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leanmill.core.passes import SeenTokens


def by_attention(seen: SeenTokens) -> Tensor:
    """Return the attention that each token gets, of all heads and queries together [B, S]."""
    assert seen.maps is not None
    return seen.maps.float().sum((1, 2))


def by_rarity(seen: SeenTokens) -> Tensor:
    """Return how seldom each token is in all calibration rows, negative [B, S]."""
    return -seen.frequencies[seen.ids].float()


def by_norm(seen: SeenTokens) -> Tensor:
    """Return the norm of the block's input [B, S]."""
    assert seen.inputs is not None
    return seen.inputs.float().norm(dim=-1)


def by_constancy(seen: SeenTokens) -> Tensor:
    """Return how little the block changes its input, negative [B, S]."""
    assert seen.inputs is not None
    assert seen.outputs is not None
    return -(seen.outputs.float() - seen.inputs.float()).norm(dim=-1)


def by_distance(seen: SeenTokens) -> Tensor:
    """Return the mean squared distance of the block's input to those of its row [B, S]."""
    assert seen.inputs is not None
    inputs = seen.inputs.double()  # differences of large squares
    squares = inputs.square().sum(-1)
    others = squares.mean(1, keepdim=True)
    return (squares + others - 2 * (inputs * inputs.mean(1, keepdim=True)).sum(-1)).float()


SCORES: dict[str, Callable[[SeenTokens], Tensor]] = {
    "attention": by_attention,
    "rare": by_rarity,
    "norm": by_norm,
    "unchanged": by_constancy,
    "distant": by_distance,
}


def spread(scores: Tensor, least: float) -> Tensor:
    """Return weights from `least` to 1, linear in the scores of a row [B, S]; 1 where all of a row are the same."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    share = torch.where(high > low, (scores - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny), 1.0)
    return least + (1 - least) * share


def ends(seen: SeenTokens, share: float, *, last_too: bool) -> Tensor:
    """Return 1 for the first tokens of each row, or as many at both ends together, and 0 for the others [B, S].

    Args:
        seen: The tokens.
        share: Of a row's tokens; at least one counts.
        last_too: Whether half of them are at the end.
    """
    length = seen.ids.shape[1]
    number = max(1, round(share * length))
    first = number - number // 2 if last_too else number
    place = torch.arange(length, device=seen.ids.device).expand(seen.ids.shape)
    return ((place < first) | (place >= length - (number - first))).float()
