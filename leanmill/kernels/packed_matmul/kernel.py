"""Packed matmuls in Triton: codes are decoded in registers, plane by plane.

With P codes a byte, code i of every byte meets x[P j + i]: a byte tile gives P weight tiles and
needs no interleaving.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanmill.kernels.packing.encoding import TERNARY, codes_per_byte


MOST_VECTOR_TOKENS = 4
"""Up to here bandwidth bounds the time and each token is a matrix-vector product."""
_INTERPRETED = triton.knobs.runtime.interpret


def is_supported(num_codes: int, num_groups: int, number: int) -> bool:
    """Whether no byte straddles two groups."""
    return num_groups == 1 or num_codes // num_groups % codes_per_byte(number) == 0


@triton.jit
def _digit(raw, i: tl.constexpr, NUMBER: tl.constexpr):
    """Code i of every byte, ternary ones as -1 .. 1."""
    if NUMBER == 3:
        power: tl.constexpr = 3**i
        return ((((raw * power) & 255) * 3) >> 8) - 1
    return (raw >> (i * NUMBER)) & ((1 << NUMBER) - 1)


@triton.jit
def _vector_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    num_rows,
    num_codes,
    num_bytes,
    num_groups,
    group_bytes,
    NUMBER: tl.constexpr,
    PER_BYTE: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    is_row = row < num_rows
    total = tl.zeros([ROWS, BYTES], dtype=tl.int32 if IS_INTEGER else tl.float32)
    for start in range(0, num_bytes, BYTES):
        byte = start + tl.arange(0, BYTES)
        inside = is_row[:, None] & (byte < num_bytes)[None, :]
        raw = tl.load(packed_ptr + row[:, None] * num_bytes + byte[None, :], mask=inside, other=0).to(tl.int32)
        if not IS_INTEGER:
            at = row[:, None] * num_groups + (byte // group_bytes)[None, :]
            scale = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(zeros_ptr + at, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(PER_BYTE):
            index = byte * PER_BYTE + i
            x = tl.load(x_ptr + token * num_codes + index, mask=index < num_codes, other=0)
            code = _digit(raw, i, NUMBER)
            if IS_INTEGER:
                total += code * x.to(tl.int32)[None, :]
            else:
                total += (code.to(tl.float32) - zero) * scale * x.to(tl.float32)[None, :]
    tl.store(out_ptr + token * num_rows + row, tl.sum(total, axis=1).to(out_ptr.dtype.element_ty), mask=is_row)


@triton.jit
def _matrix_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    num_tokens,
    num_rows,
    num_codes,
    num_bytes,
    num_groups,
    group_bytes,
    NUMBER: tl.constexpr,
    PER_BYTE: tl.constexpr,
    IS_INTEGER: tl.constexpr,
    UPCAST: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_token, is_row = token < num_tokens, row < num_rows
    total = tl.zeros([TOKENS, ROWS], dtype=tl.int32 if IS_INTEGER else tl.float32)
    for start in range(0, num_bytes, BYTES):
        byte = start + tl.arange(0, BYTES)
        is_byte = byte < num_bytes
        inside = is_byte[:, None] & is_row[None, :]
        raw = tl.load(packed_ptr + row[None, :] * num_bytes + byte[:, None], mask=inside, other=0).to(tl.int32)
        if not IS_INTEGER:
            at = row[None, :] * num_groups + (byte // group_bytes)[:, None]
            scale = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(zeros_ptr + at, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(PER_BYTE):
            index = byte * PER_BYTE + i
            is_x = is_token[:, None] & (index < num_codes)[None, :]
            x = tl.load(x_ptr + token[:, None] * num_codes + index[None, :], mask=is_x, other=0)
            code = _digit(raw, i, NUMBER)
            if IS_INTEGER:
                total = tl.dot(x, code.to(tl.int8), total, out_dtype=tl.int32)
            elif UPCAST:
                weight = (code.to(tl.float32) - zero) * scale
                total = tl.dot(x.to(tl.float32), weight, total, input_precision="ieee")
            else:
                # Tensor cores take the weight in the type of x: it is rounded to that here.
                weight = ((code.to(tl.float32) - zero) * scale).to(x.dtype)
                total = tl.dot(x, weight, total)
    out = out_ptr + token[:, None] * num_rows + row[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & is_row[None, :])


def packed_matmul(x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, number: int) -> Tensor:
    """Return x @ W^T [tokens, out] for x [tokens, in]; see `is_supported`."""
    out = x.new_empty((x.shape[0], packed.shape[0]))
    return _launch(x, packed, scales, zero_points, out, number)


def ternary_int8_matmul(codes: Tensor, packed: Tensor) -> Tensor:
    """Return the exact int32 products [tokens, out] of int8 [tokens, in] and ternary rows."""
    out = codes.new_empty((codes.shape[0], packed.shape[0]), dtype=torch.int32)
    return _launch(codes, packed, None, None, out, TERNARY)


def _launch(x: Tensor, packed: Tensor, scales: Tensor | None, zeros: Tensor | None, out: Tensor, number: int) -> Tensor:
    x, packed = x.contiguous(), packed.contiguous()
    (num_tokens, num_codes), (num_rows, num_bytes) = x.shape, packed.shape
    per_byte, is_integer = codes_per_byte(number), scales is None
    num_groups = 1 if scales is None else scales.shape[-1]
    group_bytes = num_bytes if num_groups == 1 else num_codes // num_groups // per_byte
    # Unused without scales, but a pointer is.
    scales = packed if scales is None else scales.contiguous()
    zeros = packed if zeros is None else zeros.contiguous()
    fixed = {"NUMBER": number, "PER_BYTE": per_byte, "IS_INTEGER": is_integer}
    sizes = (num_rows, num_codes, num_bytes, num_groups, group_bytes)
    if num_tokens <= MOST_VECTOR_TOKENS:
        rows, num_bytes_at_once = (4, 256) if num_bytes >= 256 else (8, 64)
        _vector_kernel[(triton.cdiv(num_rows, rows), num_tokens)](
            x, packed, scales, zeros, out, *sizes, **fixed, ROWS=rows, BYTES=num_bytes_at_once, num_warps=4
        )
        return out
    tokens = min(64, max(16, triton.next_power_of_2(num_tokens)))
    _matrix_kernel[(triton.cdiv(num_rows, 64), triton.cdiv(num_tokens, tokens))](
        x,
        packed,
        scales,
        zeros,
        out,
        num_tokens,
        *sizes,
        **fixed,
        UPCAST=not is_integer and (x.dtype == torch.float32 or _INTERPRETED),
        TOKENS=tokens,
        ROWS=64,
        BYTES=32,
        num_warps=4,
    )
    return out
