"""NormalFloat: levels at the quantiles of a normal distribution, its outermost ones -1 and 1."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""With 4 bits (Dettmers et al. 2023, arXiv:2305.14314, appendix E)."""
_OUTERMOST = 0.9677083
"""The quantile that becomes 1, and its mirror -1: that of QLoRA."""


@cache
def normal_float_levels(num_bits: int) -> tuple[float, ...]:
    """Return the 2^b levels of b bits, ascending, 0 among them.

    Half of them are evenly spaced quantiles up to the median, the rest, one more, from the median on, as in LQ-LoRA
    (Guo et al. 2023, arXiv:2311.12023) and, with 4 bits, QLoRA.
    """
    if num_bits == 4:
        return NF4_LEVELS
    half = 2 ** (num_bits - 1)
    below = torch.linspace(1 - _OUTERMOST, 0.5, half, dtype=torch.float64)[:-1]
    above = torch.linspace(0.5, _OUTERMOST, half + 1, dtype=torch.float64)
    quantiles = torch.special.ndtri(torch.cat([below, above]))
    levels = quantiles / quantiles[-1]
    return (-1.0, *levels[1 : half - 1].tolist(), 0.0, *levels[half:-1].tolist(), 1.0)


def nearest_codes(relative: Tensor, num_bits: int) -> Tensor:
    """Return the index of the nearest level of each value in -1 .. 1, int64; of two as near the lower one."""
    levels = torch.tensor(normal_float_levels(num_bits), device=relative.device)
    return torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2)
