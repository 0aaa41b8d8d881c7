"""Scales, thresholds and levels of ternary weights, in plain tensor code.

Statistics are taken in fp32 (fp64 for fp64 weights) over `dims`, which are kept with size 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


Scale = Literal["absmean", "twn", "mse"]


def ternarise(weight: Tensor, scale: Scale, dims: tuple[int, ...]) -> Tensor:
    """Return `weight` snapped to {-s, 0, s}, in its own dtype.

    Args:
        weight: Floating [..., out, in].
        scale: How s and the threshold are chosen.
        dims: Trailing dims that share one scale: (-2, -1) or (-1,).
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if scale == "absmean":
        level = exact.abs().mean(dims, keepdim=True)
        # Whatever divides zeros gives zeros, but 0 / 0 would not.
        codes = exact.div(torch.where(level == 0, 1.0, level)).round_().clamp_(-1, 1)
    else:
        level, is_kept = (_twn if scale == "twn" else _least_squares)(exact.abs(), dims)
        codes = exact.sign() * is_kept
    # Rounded once, so that the levels are the same number everywhere in the weight's dtype.
    return codes.to(weight.dtype).mul_(level.to(weight.dtype))


def _twn(magnitude: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Li et al. 2016, eq. 5 and 6: threshold 0.7 mean |w|, scale the mean of what exceeds it."""
    is_kept = magnitude > 0.7 * magnitude.mean(dims, keepdim=True)
    num_kept = is_kept.sum(dims, keepdim=True).clamp(min=1)
    return (magnitude * is_kept).sum(dims, keepdim=True) / num_kept, is_kept


def _least_squares(magnitude: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scale and threshold that minimise the squared error, exactly.

    Keeping the k largest magnitudes with their mean as scale removes (their sum)^2 / k from the
    error, so the best k is the argmax. Along equal magnitudes that expression is convex in k, so
    the best k never splits them and a threshold describes it.
    """
    flat = magnitude.flatten(-len(dims)) if len(dims) > 1 else magnitude
    ordered = flat.sort(dim=-1, descending=True).values
    # Prefix sums over millions of entries outrun fp32.
    sums = ordered.to(torch.float64).cumsum(-1)
    counts = torch.arange(1, flat.shape[-1] + 1, device=flat.device)
    best = (sums.square() / counts).argmax(-1, keepdim=True)
    level = (sums.gather(-1, best) / (best + 1)).to(magnitude.dtype)
    threshold = ordered.gather(-1, best)
    shape = [*magnitude.shape[: -len(dims)], *[1] * len(dims)]
    return level.view(shape), magnitude >= threshold.view(shape)
