"""Floats in 4 bits: a sign and three bits of exponent, no mantissa (E3M0), under a scale for each block."""

from __future__ import annotations

import math

import torch
from torch import Tensor


BLOCK = 256
"""Elements under one scale."""
_LOWEST = -6
"""Exponent of the smallest magnitude that is not 0; the largest is 1."""


def num_bytes(numel: int) -> int:
    """Return what `numel` elements take: half a byte each, and 4 for the scale of each block."""
    return math.ceil(numel / BLOCK) * (BLOCK // 2 + 4)


def encode(tensor: Tensor) -> Tensor:
    """Round to the nearest of 0 and +-2^k s, k = -6 ... 0, where s is the largest magnitude of the block.

    A tie between two goes to the larger.

    Args:
        tensor: Floats of any shape; blocks are of its flattened elements, the last filled up with 0.

    Returns:
        uint8 [num_bytes(numel)]: for each block its scale in fp32, then two elements a byte, the first in the low bits.
    """
    blocks = torch.nn.functional.pad(tensor.detach().float().flatten(), (0, -tensor.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    share = blocks.abs() / scale.clamp(min=torch.finfo(torch.float32).tiny)
    # share = m 2^e with m in [0.5, 1): below 0.75 the power under it is nearer, from there on the one above.
    mantissa, exponent = torch.frexp(share)
    power = exponent - (mantissa < 0.75).int()
    code = torch.where(share < 2.0 ** (_LOWEST - 1), 0, (power - _LOWEST + 1).clamp(1, 7)).to(torch.uint8)
    code |= (blocks < 0).to(torch.uint8) << 3
    packed = code[:, 0::2] | (code[:, 1::2] << 4)
    return torch.cat([scale.view(torch.uint8), packed], dim=1).flatten()


def decode(data: Tensor, numel: int) -> Tensor:
    """Return the fp32 values [numel] of what `encode` returned."""
    blocks = data.view(-1, BLOCK // 2 + 4)
    scale, packed = blocks[:, :4].contiguous().view(torch.float32), blocks[:, 4:]
    code = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).int()
    magnitude = torch.where(code & 7 == 0, 0.0, torch.exp2(((code & 7) - 1 + _LOWEST).float()))
    return (torch.where(code >= 8, -magnitude, magnitude) * scale).flatten()[:numel]
