"""Which weights of a branch stand out."""

from __future__ import annotations

import torch
from torch import Tensor


_EPS = 1e-8
"""What probabilities are raised by, as in the authors' code."""


def importance(mine: Tensor, other: Tensor) -> Tensor:
    """Return |other - mine| x KL(p || q) of each weight, p and q being the softmax of its row in `other` and in `mine`.

    Args:
        mine: [..., in] fp32.
        other: Likewise.
    """
    p, q = other.softmax(-1) + _EPS, mine.softmax(-1) + _EPS
    divergence = (p * (p / q).log()).sum(-1, keepdim=True)
    return (other - mine).abs() * divergence


def stands_out(mine: Tensor, other: Tensor) -> Tensor:
    """Return which weights are at least as important as median + 1.5 x interquartile range of the tensor, bool.

    The authors take the quantiles of a million weights drawn at random; these are of all.
    """
    scores = importance(mine, other)
    first, median, third = (_quantile(scores, share) for share in (0.25, 0.5, 0.75))
    return scores >= median + 1.5 * (third - first)


def _quantile(values: Tensor, share: float) -> Tensor:
    """The value at place floor(share x (n - 1)) of n in order."""
    return torch.kthvalue(values.flatten(), int(share * (values.numel() - 1)) + 1).values
