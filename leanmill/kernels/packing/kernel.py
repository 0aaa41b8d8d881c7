"""Packing in Triton: a program handles a stretch of one row's bytes."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanmill.kernels.packing.encoding import code_dtype, codes_per_byte, packed_length


_BLOCK_BYTES = 256


@triton.jit
def _pack_kernel(
    codes_ptr, packed_ptr, num_codes, num_bytes, NUMBER: tl.constexpr, PER_BYTE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros([BLOCK], dtype=tl.int32)
    for i in tl.static_range(PER_BYTE):
        index = byte * PER_BYTE + i
        code = tl.load(codes_ptr + row * num_codes + index, mask=index < num_codes, other=0).to(tl.int32)
        value = value * 3 + code + 1 if NUMBER == 3 else value | (code << (i * NUMBER))
    if NUMBER == 3:
        value = (value * 256 + 242) // 243
    tl.store(packed_ptr + row * num_bytes + byte, value.to(tl.uint8), mask=byte < num_bytes)


@triton.jit
def _unpack_kernel(
    packed_ptr, codes_ptr, num_codes, num_bytes, NUMBER: tl.constexpr, PER_BYTE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(packed_ptr + row * num_bytes + byte, mask=byte < num_bytes, other=0).to(tl.int32)
    for i in tl.static_range(PER_BYTE):
        index = byte * PER_BYTE + i
        if NUMBER == 3:
            rest = rest * 3
            code = (rest >> 8) - 1
            rest = rest & 255
        else:
            code = (rest >> (i * NUMBER)) & ((1 << NUMBER) - 1)
        tl.store(codes_ptr + row * num_codes + index, code.to(codes_ptr.dtype.element_ty), mask=index < num_codes)


def pack(codes: Tensor, number: int) -> Tensor:
    """Return the packed bytes of codes [..., n], uint8 or, for ternary, int8."""
    codes = codes.contiguous()
    num_codes = codes.shape[-1]
    num_bytes = packed_length(num_codes, number)
    packed = codes.new_empty((*codes.shape[:-1], num_bytes), dtype=torch.uint8)
    grid = (codes.numel() // num_codes, triton.cdiv(num_bytes, _BLOCK_BYTES))
    _pack_kernel[grid](
        codes, packed, num_codes, num_bytes, NUMBER=number, PER_BYTE=codes_per_byte(number), BLOCK=_BLOCK_BYTES
    )
    return packed


def unpack(packed: Tensor, number: int, num_codes: int) -> Tensor:
    """Return codes [..., num_codes]."""
    packed = packed.contiguous()
    num_bytes = packed.shape[-1]
    codes = packed.new_empty((*packed.shape[:-1], num_codes), dtype=code_dtype(number))
    grid = (packed.numel() // num_bytes, triton.cdiv(num_bytes, _BLOCK_BYTES))
    _unpack_kernel[grid](
        packed, codes, num_codes, num_bytes, NUMBER=number, PER_BYTE=codes_per_byte(number), BLOCK=_BLOCK_BYTES
    )
    return codes
