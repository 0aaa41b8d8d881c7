"""Packed matmuls in plain tensor code: unpack the whole weight, then multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from leanmill.kernels.packing import naive as packing


SMALLEST_ABSMAX = 1e-5
"""Below this a token counts as zeros, as in BitNet."""


def dequantise(packed: Tensor, scales: Tensor, zero_points: Tensor, number: int, num_codes: int) -> Tensor:
    """Return the weight [out, in] in the dtype of `scales`: (code - zero point) * scale, group by group.

    Args:
        packed: uint8 [out, bytes].
        scales: [out, groups]; groups divide `num_codes`.
        zero_points: [out, groups].
        number: The encoding's number.
        num_codes: in.
    """
    codes = packing.unpack(packed, number, num_codes).to(scales.dtype)
    grouped = codes.unflatten(-1, (scales.shape[-1], -1))
    return ((grouped - zero_points.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(-2)


def packed_matmul(x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, number: int) -> Tensor:
    """Return x @ W^T [tokens, out] for x [tokens, in], computed in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = dequantise(packed, scales.to(wide), zero_points.to(wide), number, x.shape[-1])
    return (x.to(wide) @ weight.t()).to(x.dtype)


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes [tokens, in] and fp32 scales [tokens, 1]: absmax / 127 of each token."""
    wide = x.to(torch.float32)
    if wide.numel() == 0:
        return wide.to(torch.int8), wide.new_zeros((x.shape[0], 1))
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ABSMAX)
    return (wide * (127 / largest)).round().clamp(-128, 127).to(torch.int8), largest / 127


def ternary_int8_matmul(codes: Tensor, packed: Tensor) -> Tensor:
    """Return the exact int32 products [tokens, out] of int8 [tokens, in] and ternary rows."""
    weight = packing.unpack(packed, 3, codes.shape[-1])
    # Integer matmuls do not exist for every device; fp64 holds these sums exactly.
    return (codes.double() @ weight.double().t()).to(torch.int32)
