"""Scales, thresholds and levels of ternary weights, in plain tensor code: the definition.

Statistics are taken over `dims`, which are kept with size 1. They are summed in fp64, so that the
order of summation does not show, and rounded to fp32 (fp64 for fp64 weights).
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
        level = _mean(exact.abs(), dims)
        # Whatever divides zeros gives zeros, but 0 / 0 would not.
        codes = exact.div(torch.where(level == 0, 1.0, level)).round_().clamp_(-1, 1)
    else:
        level, is_kept = (_twn if scale == "twn" else _least_squares)(exact.abs(), dims)
        codes = exact.sign() * is_kept
    # Rounded once, so that the levels are the same number everywhere in the weight's dtype.
    return codes.to(weight.dtype).mul_(level.to(weight.dtype))


def _mean(magnitude: Tensor, dims: tuple[int, ...]) -> Tensor:
    return magnitude.mean(dims, keepdim=True, dtype=torch.float64).to(magnitude.dtype)


def _twn(magnitude: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Li et al. 2016, eq. 5 and 6: threshold 0.7 mean |w|, scale the mean of what exceeds it."""
    is_kept = magnitude > 0.7 * _mean(magnitude, dims)
    num_kept = is_kept.sum(dims, keepdim=True).clamp(min=1)
    level = (magnitude * is_kept).sum(dims, keepdim=True, dtype=torch.float64) / num_kept
    return level.to(magnitude.dtype), is_kept


def _least_squares(magnitude: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    level, threshold = least_squares(magnitude, dims)
    return level, magnitude >= threshold


def least_squares(magnitude: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Scale, and least magnitude that is kept, that minimise the squared error, exactly.

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
    return level.view(shape), threshold.view(shape)
