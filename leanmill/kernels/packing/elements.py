"""Small floats as codes, the sign on top, then exponent and mantissa, and codes of 4, 6 or 8 bits as bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.packing.op import pack, unpack


ELEMENT_BITS = (4, 6, 8)
"""Of codes that `pack_elements` takes."""


def smallest_exponent(exponent_bits: int) -> int:
    """Return the exponent of the smallest normal number: bias 2^(E - 1) - 1, and 1 without exponent bits."""
    return 1 if exponent_bits == 0 else 2 - 2 ** (exponent_bits - 1)


def element_levels(exponent_bits: int, mantissa_bits: int) -> Tensor:
    """Return what the codes 0 .. 2^(1 + E + M) - 1 stand for, fp32; every code is a number, none an infinity."""
    codes = torch.arange(2 ** (exponent_bits + mantissa_bits))
    field, fraction = codes >> mantissa_bits, codes & (2**mantissa_bits - 1)
    is_normal = field > 0
    significand = torch.where(is_normal, fraction + 2**mantissa_bits, fraction).double()
    exponent = smallest_exponent(exponent_bits) - mantissa_bits + torch.where(is_normal, field - 1, 0)
    magnitudes = significand * torch.exp2(exponent.double())
    return torch.cat([magnitudes, -magnitudes]).float()


def pack_elements(codes: Tensor, num_bits: int) -> Tensor:
    """Return the bytes of uint8 codes [..., n]: as `pack`, and four codes of 6 bits in three bytes, lowest bits first.

    Args:
        codes: uint8 below 2^num_bits.
        num_bits: One of `ELEMENT_BITS`.

    Returns:
        uint8 [..., n * num_bits / 8], rounded up to a byte, of 6 bits to three; what fills a row up is code 0.
    """
    if num_bits != 6:
        return pack(codes, num_bits)  # type: ignore[arg-type]
    of_codes, of_bytes = _shifts(codes.device)
    words = (F.pad(codes, (0, -codes.shape[-1] % 4)).to(torch.int32).unflatten(-1, (-1, 4)) << of_codes).sum(-1)
    return ((words.unsqueeze(-1) >> of_bytes) & 0xFF).to(torch.uint8).flatten(-2)


def unpack_elements(packed: Tensor, num_bits: int, num_codes: int) -> Tensor:
    """Return the uint8 codes [..., num_codes] that `pack_elements` was given."""
    if num_bits != 6:
        return unpack(packed, num_bits, num_codes)  # type: ignore[arg-type]
    of_codes, of_bytes = _shifts(packed.device)
    words = (packed.to(torch.int32).unflatten(-1, (-1, 3)) << of_bytes).sum(-1)
    return ((words.unsqueeze(-1) >> of_codes) & 0x3F).to(torch.uint8).flatten(-2).narrow(-1, 0, num_codes)


def _shifts(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return where codes of 6 bits, and where bytes, stand in a word of 24."""
    of_codes = torch.arange(0, 24, 6, dtype=torch.int32, device=device)
    return of_codes, torch.arange(0, 24, 8, dtype=torch.int32, device=device)
