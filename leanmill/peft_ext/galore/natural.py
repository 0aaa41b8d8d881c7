"""The natural gradient of coordinates, by the last gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from leanmill.core.views import View


def natural_gradient(coordinates: View, past: Sequence[View], oldest: int, damping: float) -> None:
    """Put a gradient g in the place of the oldest of the last ones, and overwrite it with F^-1 g times the damping.

    With G the matrix whose columns are the last gradients, g among them, and F = damping I + G G^T, by Woodbury's
    identity

        damping F^-1 g = g - G (damping I + G^T G)^-1 G^T g

    The paper's step is that without the factor, which Adam takes out again and clipping would not. A gradient that is
    not finite stays so, and is not kept. Of sharded pieces only the products of pairs are reduced.

    Args:
        coordinates: With its gradient.
        past: Of the last gradients, the oldest of which is overwritten.
        oldest: Its index.
        damping: See above.
    """
    gradient = coordinates.grad
    if gradient is None:  # no token came by
        return
    kept = past[oldest].value
    columns = [gradient if index == oldest else view.value for index, view in enumerate(past)]
    stacked = torch.stack([column.flatten() for column in columns])
    products = coordinates.reduce((stacked @ stacked.T).double(), "sum")
    is_finite = torch.isfinite(products[oldest, oldest])
    damped = torch.where(is_finite, products, 0) + damping * torch.eye(len(past)).to(products)
    weights = torch.linalg.solve(damped, products[:, oldest])
    natural = gradient - (weights.to(stacked.dtype) @ stacked).view_as(gradient)
    kept.copy_(torch.where(is_finite, gradient, kept))
    gradient.copy_(natural)
