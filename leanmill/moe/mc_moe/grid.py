"""Grids of 2^b levels around zero, and rounding to them."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.core.obs import Factor, solve_columns


_SHARES = tuple(1.0 - 0.02 * index for index in range(45))
"""Shares tried of the scale at which the largest magnitude is the outermost level."""


def midrise(values: Tensor, scale: Tensor, num_bits: int) -> Tensor:
    """Return the nearest of the 2^b levels (code + 1/2) x scale, codes -2^(b-1) to 2^(b-1) - 1; of 1 bit +-scale/2."""
    half = 2 ** (num_bits - 1)
    safe = torch.where(scale == 0, 1.0, scale)
    return ((values / safe).floor().clamp(-half, half - 1) + 0.5) * scale


def best_scale(groups: Tensor, num_bits: int) -> Tensor:
    """Return the scale [..., 1] of least squared error for the last dim of `groups`."""
    if num_bits == 1:
        return 2 * groups.abs().mean(-1, keepdim=True)
    largest = groups.abs().amax(-1, keepdim=True) / (2 ** (num_bits - 1) - 0.5)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in _SHARES:
        scale = largest * share
        error = (midrise(groups, scale, num_bits) - groups).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def rounded(weight: Tensor, num_bits: int, group_size: int | None) -> Tensor:
    """Return a weight [out, in] with every entry rounded by itself."""
    groups = weight.unflatten(-1, (-1, group_size or weight.shape[-1]))
    return midrise(groups, best_scale(groups, num_bits), num_bits).flatten(-2)


def corrected(weight: Tensor, factor: Factor, num_bits: int, group_size: int | None) -> Tensor:
    """Return a weight [out, in] rounded by GPTQ, whose later columns make up for earlier ones."""
    found, _ = solve_columns(weight, factor, _Levels(num_bits), group_size=group_size or weight.shape[1])
    return found


class _Levels:
    """A `ColumnRule` that rounds to the levels of a group, whose scale is taken when it begins."""

    def __init__(self, num_bits: int) -> None:
        self.num_bits = num_bits
        self.scale = torch.empty(0)

    def start_group(self, columns: Tensor, diagonal: Tensor) -> None:
        self.scale = torch.cat([best_scale(rows, self.num_bits)[:, 0] for rows in columns.split(64)])

    def value(self, column: Tensor, index: int) -> Tensor:
        return midrise(column, self.scale, self.num_bits)
