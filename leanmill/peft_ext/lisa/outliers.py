"""How many weights of a block stand out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from leanmill.core.errors import RunError


_ROWS = 256
"""Looked at together."""


def outlier_share(layers: Sequence[tuple[Tensor, Tensor]], threshold: float) -> float:
    """Return the share of a block's weights whose score is above `threshold` times the mean score of the block.

    The score of w_ij is |w_ij| ||x_j||_2, as in Yin et al. 2023, arXiv:2310.05175.

    Args:
        layers: Weight [out, in] and sum of squares of each input feature [in] of each linear layer, fp32.
        threshold: The paper's tau.

    Raises:
        RunError: A weight, or what goes into a layer, is not finite.
    """
    number = sum(weight.numel() for weight, _ in layers)
    norms = [squares.double().sqrt() for _, squares in layers]
    # In fp64, so that processors agree on what is above but for a tie.
    sums = [weight.abs().double().sum(0) for weight, _ in layers]
    total = sum(float((of_weights * norm).sum()) for of_weights, norm in zip(sums, norms, strict=True))
    if not math.isfinite(total):
        raise RunError(
            "outliers: a weight or the inputs of a layer are not finite; give a model from before it diverged"
        )
    limit = threshold * total / number
    above = sum(
        int((rows.abs().double() * norm > limit).sum())
        for (weight, _), norm in zip(layers, norms, strict=True)
        for rows in torch.split(weight, _ROWS)
    )
    return above / number
