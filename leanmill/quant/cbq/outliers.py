"""Where weights end and outliers begin."""

from __future__ import annotations

import torch
from torch import Tensor


COARSE = 1.5
"""Interquartile ranges above the third quartile beyond which a magnitude may be an outlier."""


def cut_off(weight: Tensor) -> Tensor:
    """Return a weight without outliers: what is one gets the magnitude of the largest that is none, and keeps its sign.

    Magnitudes above Q3 + 1.5 (Q3 - Q1) are candidates. They are cut where the square of the gap below one, less the
    variance of all magnitudes that stay, is largest, if that is above 0. CBQ's text takes the variance of the
    candidates that stay, which is 0 where none or one does, so that some would always be cut.

    Args:
        weight: [out, in] fp32.
    """
    magnitudes = weight.abs().flatten().sort().values
    if magnitudes.numel() < 4:
        return weight
    quarter = magnitudes.numel() // 4
    first, third = magnitudes[quarter], magnitudes[3 * quarter]
    start = int(torch.searchsorted(magnitudes, third + COARSE * (third - first), right=True))
    if start == magnitudes.numel():
        return weight
    exact = magnitudes.double()
    sums = torch.stack([exact, exact.square()]).cumsum(1)[:, start - 1 : -1]
    mean, square = sums / torch.arange(start, len(exact), dtype=torch.float64, device=weight.device)
    score = exact[start - 1 :].diff().square() - (square - mean.square())
    best = int(score.argmax())
    limit = float(magnitudes[start - 1 + best])
    return weight.clamp(-limit, limit) if score[best] > 0 else weight
