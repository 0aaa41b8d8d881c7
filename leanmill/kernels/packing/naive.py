"""Packing in plain tensor code: the definition of the byte layouts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.packing.encoding import TERNARY, code_dtype, codes_per_byte


def pack(codes: Tensor, number: int) -> Tensor:
    """Return uint8 [..., ceil(n / codes per byte)] for codes [..., n] within range.

    Bits: code i of a byte lies at bits [i b, (i + 1) b). Base 3: the digits d = code + 1, first one
    most significant, make v = sum d_i 3^(4 - i), and the byte is ceil(256 v / 243), from which each
    digit comes out of multiplications by 3 and shifts. A last byte is filled up with code 0.
    """
    per_byte = codes_per_byte(number)
    digits = codes.to(torch.int32)
    padded = F.pad(digits, (0, -digits.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    if number != TERNARY:
        shifts = torch.arange(per_byte, device=codes.device, dtype=torch.int32) * number
        return (padded << shifts).sum(-1).to(torch.uint8)
    powers = torch.tensor([81, 27, 9, 3, 1], device=codes.device, dtype=torch.int32)
    value = ((padded + 1) * powers).sum(-1)
    return ((value * 256 + 242) // 243).to(torch.uint8)


def unpack(packed: Tensor, number: int, num_codes: int) -> Tensor:
    """Return codes [..., num_codes], the inverse of `pack`: uint8, or int8 for ternary."""
    bytes_ = packed.to(torch.int32).unsqueeze(-1)
    index = torch.arange(codes_per_byte(number), device=packed.device, dtype=torch.int32)
    if number == TERNARY:
        codes = (((bytes_ * 3**index) & 255) * 3 >> 8) - 1
    else:
        codes = (bytes_ >> index * number) & ((1 << number) - 1)
    return codes.flatten(-2)[..., :num_codes].to(code_dtype(number))
