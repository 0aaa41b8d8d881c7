"""The Walsh-Hadamard transform and QuEST's quantiser in plain tensor code: the definitions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


CLIPS = {
    2: 0.79788,
    3: 1.224,
    4: 1.49353,
    8: 2.05107,
    16: 2.51393,
    32: 2.91609,
    64: 3.27660,
    128: 3.60105,
    256: 3.88494,
}
"""Outermost level by number of levels, in units of the row's RMS: the clip that minimises the squared
error of a Gaussian. 3 is ternary, {-clip, 0, clip}."""


def hadamard_matrix(block_size: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the orthonormal matrix H [b, b] in Sylvester's order; symmetric, its own inverse."""
    index = torch.arange(block_size)
    common = index.unsqueeze(0) & index.unsqueeze(1)
    parity = sum(((common >> bit) & 1 for bit in range(block_size.bit_length())), torch.zeros_like(common)) & 1
    return (1 - 2 * parity).to(dtype) / math.sqrt(block_size)


def scale_of(block_size: int) -> float:
    """Return 1 / sqrt(b) rounded to fp32, the factor that every path applies last."""
    return float(torch.tensor(block_size, dtype=torch.float64).rsqrt().float())


def transform(x: Tensor, block_size: int) -> Tensor:
    """Return H applied to each block of the last dim, in fp32 (fp64 for fp64) and not rounded further.

    Neighbours at distance 1, 2, 4 .. become sum and difference. C and Triton take the same order, so
    they round alike.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    distance = 1
    while distance < block_size:
        first, second = wide.unflatten(-1, (-1, 2, distance)).unbind(-2)
        wide = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        distance *= 2
    return wide * (1 / math.sqrt(block_size) if wide.dtype == torch.float64 else scale_of(block_size))


def hadamard(x: Tensor, block_size: int) -> Tensor:
    """Return the transform [..., n] in the dtype of `x`."""
    return transform(x, block_size).to(x.dtype)


def quest_quantise(x: Tensor, num_levels: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the quantised transform [..., n] and the bool mask of entries whose gradient passes.

    With sigma the RMS of a row's transform and step = 2 clip sigma / (levels - 1): an even number of
    levels puts them at (k + 1/2) step, three at {-1, 0, 1} step. An entry is trusted if its
    quantisation error is at most half a step, which is |x_h| <= clip sigma + step / 2.
    """
    rotated = transform(x, block_size)
    # In fp64, so that every order of summation rounds to the same fp32 sigma, nearly always.
    sigma = rotated.to(torch.float64).square().mean(-1, keepdim=True).sqrt().to(rotated.dtype)
    step = sigma * (2 * CLIPS[num_levels] / (num_levels - 1))
    # A row of zeros has step 0 and stays zeros.
    units = rotated / torch.where(step == 0, 1.0, step)
    if num_levels % 2:
        levels = units.round().clamp(-(num_levels // 2), num_levels // 2)
    else:
        levels = units.floor().clamp(-(num_levels // 2), num_levels // 2 - 1) + 0.5
    return (levels * step).to(x.dtype), rotated.abs() <= step * (num_levels / 2)
