"""The staged linear as autograd does it by itself: keeps the staged weight and what led to it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def staged_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, stage: Callable[..., Tensor], *parameters: Tensor
) -> Tensor:
    """Return x @ stage(weight, *parameters)^T + bias."""
    return F.linear(x, stage(weight, *parameters), bias)
