"""A weight as codes and a delta of low rank, found in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from leanmill.core.compact import Compact, Kind


OVERSAMPLE, POWER_ITERATIONS = 10, 2
"""Of the randomised decomposition: vectors beyond the rank, and products with the matrix and its transpose."""
_LEAST_SHARE = 1e-12
"""Of the largest mean of a row's or column's sensitivities: less counts as that much, so that it can be divided by."""


@dataclass(frozen=True)
class Parts:
    """W [out, in] is nearly `kept` + B A."""

    kept: Tensor
    """[out, in] fp32, values that `rounded` has made."""
    a: Tensor
    """[rank, in]."""
    b: Tensor
    """[out, rank]."""
    error: float
    """Sum of squares of what is missing, each counted by its sensitivity."""


def decompose(
    weight: Tensor,
    rank: int,
    rounding: Callable[[Tensor], Tensor],
    *,
    sensitivity: Tensor | None,
    iterations: int,
    generator: torch.Generator | None,
) -> Parts:
    """Alternate B A = the leading part of W - Q, and Q = rounded(W - B A), from Q = 0 (the paper's algorithm 1).

    It ends when the error does not fall; the parts of least error are returned, where the authors' code returns those
    after.

    Args:
        weight: W [out, in] fp32.
        rank: Of B A.
        rounding: Makes codes' values of a matrix.
        sensitivity: F [out, in]; None counts all alike. The delta is weighed by the square roots of F's means over
            rows and columns, the error by F itself.
        iterations: At most.
        generator: Of the randomised decomposition; None makes a whole one.
    """
    rows, columns = _weights(sensitivity)
    best: Parts | None = None
    kept = torch.zeros_like(weight)
    for _ in range(iterations):
        b, a = leading(rows * (weight - kept) * columns, rank, generator)
        b, a = b / rows, a / columns
        kept = rounding(weight - b @ a)
        missing = (weight - kept - b @ a).double().square()
        error = float((missing if sensitivity is None else missing * sensitivity).sum())
        if best is not None and error >= best.error:
            break
        best = Parts(kept, a, b, error)
    assert best is not None
    return best


def _weights(sensitivity: Tensor | None) -> tuple[Tensor, Tensor]:
    """What rows [out, 1] and columns [1, in] count for."""
    if sensitivity is None:
        return torch.ones(1, 1), torch.ones(1, 1)
    means = sensitivity.mean(1, keepdim=True), sensitivity.mean(0, keepdim=True)
    largest = [float(mean.max()) for mean in means]
    if not all(largest):  # no weight has a gradient
        return torch.ones(1, 1), torch.ones(1, 1)
    rows, columns = (mean.clamp(min=_LEAST_SHARE * top).sqrt() for mean, top in zip(means, largest, strict=True))
    return rows, columns


def leading(matrix: Tensor, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Return [out, rank] and [rank, in], each with the square roots of the leading singular values in it."""
    short = min(matrix.shape)
    if generator is None or rank + OVERSAMPLE >= short:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], rank + OVERSAMPLE, generator=generator))[0]
        for _ in range(POWER_ITERATIONS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis)[0])[0]
        left, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        left = basis @ left
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def rounded(weight: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """Return the values fp32 of a weight that is kept as `kind`, which are the same once it was stored in `dtype`."""
    stage = Compact(weight.shape, kind, torch.float32, weight.device)
    codes, scales = stage.encode(weight, dtype)
    with torch.no_grad():
        stage.scale.copy_(scales)
        return stage.decode(codes, torch.float32)
