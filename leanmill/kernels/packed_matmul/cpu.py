"""Packed matmuls on the CPU: dot products on packed rows for few tokens, cached blocks for many.

One token, where the processor multiplies bytes, is the business of `one_token.py`.
With few tokens the weight's bytes are what there is to read, and C multiplies them as it decodes
them. With many, C unpacks a few rows at a time into a buffer that stays in cache and multiplies that
in tiles held in registers. Torch's own matmul on such blocks would do, but for its threads: its idle
ones spin for a while, against ours, at every hand-over. For the same reason what comes before is C.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.native import compiler, threads
from leanmill.kernels.native.dtypes import pointer
from leanmill.kernels.packed_matmul import one_token
from leanmill.kernels.packed_matmul.naive import SMALLEST_ABSMAX
from leanmill.kernels.packing.encoding import TERNARY, codes_per_byte


MOST_DOT_TOKENS = 4
"""More tokens than this are faster as matmuls of unpacked blocks."""
MOST_BLOCK_TOKENS = 16
"""More tokens than this in bf16 are faster on the processor's own bf16 products, where it has them."""
_MOST_UNPACKED = 1 << 22
"""Weights in bf16 that are held unpacked at once: few products, and a bound on memory."""
_LANES = 8
"""Tokens a vector in a panel."""
_VECTOR = 16
"""Planes end at a multiple of this."""
_LARGEST_EXACT_SUM = 1 << 24
"""Integers up to this are exact in fp32, and so is every partial sum below it."""


def library() -> ctypes.CDLL | None:
    """Return the compiled functions, or None without a C compiler."""
    return compiler.load_library(Path(__file__).with_name("cpu.c"))


def _loaded() -> ctypes.CDLL:
    functions = library()
    assert functions is not None
    return functions


def _sizes(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def _planes(x: Tensor, per_byte: int) -> Tensor:
    """Return [tokens, per_byte, bytes rounded up to whole vectors] with plane[i, j] = x[per_byte j + i]."""
    padded = F.pad(x, (0, -x.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte)).transpose(-1, -2)
    return F.pad(padded, (0, -padded.shape[-1] % _VECTOR)).contiguous()


def packed_matmul(x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, number: int) -> Tensor:
    """Return x @ W^T [tokens, out] in fp32 for x [tokens, in], all contiguous and but for `packed` fp32."""
    native = _loaded()
    if x.shape[0] == 1 and one_token.covers(number, x.shape[1], scales.shape[1]):
        out = one_token.packed_matmul(x, packed, scales, zero_points, number)
        if out is not None:
            return out
    # C counts ternary codes from 0.
    zeros = zero_points + 1 if number == TERNARY else zero_points
    group_size = x.shape[-1] // scales.shape[-1]
    fits_vectors = scales.shape[-1] == 1 or group_size % (8 * codes_per_byte(number)) == 0
    by_dots = x.shape[0] <= MOST_DOT_TOKENS and fits_vectors
    return (_dots if by_dots else _blocks)(native, x, packed, scales, zeros, number)


def _dots(native: ctypes.CDLL, x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, number: int) -> Tensor:
    num_rows, num_bytes = packed.shape
    planes = _planes(x, codes_per_byte(number))
    out = x.new_empty((x.shape[0], num_rows))
    sizes = _sizes(num_rows, x.shape[0], planes.shape[-1], num_bytes, x.shape[-1], scales.shape[-1])
    arguments = [pointer(tensor) for tensor in (packed, scales, zeros, planes, out)]

    def work(first: int, last: int) -> None:
        native.dot_rows(*arguments, *_sizes(first, last), *sizes, ctypes.c_int(number))

    threads.parallel_for(work, num_rows, num_bytes)
    return out


def _blocks(native: ctypes.CDLL, x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, number: int) -> Tensor:
    num_rows, num_bytes = packed.shape
    num_tokens, num_codes = x.shape
    # Wider panels read more tokens for nothing, and pay from 64 on.
    vectors = min(native.most_vectors(), 1 if num_tokens <= _LANES else 2 if num_tokens < 8 * _LANES else 4)
    width = vectors * _LANES
    panels = scales.new_empty((-(-num_tokens // width), num_codes, width))
    make = native.make_panels_of_int8 if x.dtype == torch.int8 else native.make_panels
    threads.parallel_for(
        lambda first, last: make(
            pointer(x), pointer(panels), *_sizes(first, last), *_sizes(num_tokens, width, num_codes)
        ),
        panels.shape[0],
        num_codes * width,
    )
    out = scales.new_empty((num_rows, panels.shape[0] * width))
    sizes = _sizes(panels.shape[0], vectors, num_bytes, num_codes, scales.shape[-1])
    arguments = [pointer(tensor) for tensor in (packed, scales, zeros, panels, out)]
    failures: list[int] = []

    def work(first: int, last: int) -> None:
        if native.multiply_panels(*arguments, *_sizes(first, last), *sizes, ctypes.c_int(number)):
            failures.append(first)

    threads.parallel_for(work, num_rows, num_codes)
    _refuse(failures, num_codes)
    return out[:, :num_tokens].t().contiguous()


def rounded_matmul(x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor, number: int) -> Tensor:
    """Return x @ W^T [tokens, out] in bf16 by torch's product, W rounded to bf16.

    Args:
        x: bf16 [tokens, in].
        packed: uint8 [out, bytes], contiguous.
        scales: fp32 [out, groups], contiguous.
        zero_points: Like `scales`.
        number: The encoding's.
    """
    native = _loaded()
    zeros = zero_points + 1 if number == TERNARY else zero_points
    num_rows, num_codes = packed.shape[0], x.shape[1]
    most_rows = max(1, _MOST_UNPACKED // num_codes)
    weight = x.new_empty((min(most_rows, num_rows), num_codes))
    out = x.new_empty((x.shape[0], num_rows))
    for start in range(0, num_rows, most_rows):
        part = slice(start, min(start + most_rows, num_rows))
        rows = weight[: part.stop - start]
        _unpack_rows(native, rows, packed[part], scales[part], zeros[part], number)
        if most_rows >= num_rows:
            return torch.mm(x, rows.t(), out=out)
        out[:, part] = torch.mm(x, rows.t())
    return out


def _unpack_rows(
    native: ctypes.CDLL, weight: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, number: int
) -> None:
    sizes = _sizes(packed.shape[1], weight.shape[1], scales.shape[1])
    arguments = [pointer(tensor) for tensor in (packed, scales, zeros, weight)]
    failures: list[int] = []

    def work(first: int, last: int) -> None:
        if native.dequantise_rows(*arguments, *_sizes(first, last), *sizes, ctypes.c_int(number)):
            failures.append(first)

    threads.parallel_for(work, *weight.shape)
    _refuse(failures, weight.shape[1])


def _refuse(failures: list[int], num_codes: int) -> None:
    if failures:
        raise MemoryError(f"no memory for a few rows of {num_codes} codes")


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `naive.quantise_tokens` of contiguous fp32 [tokens, in]."""
    native = _loaded()
    codes, scales = torch.empty_like(x, dtype=torch.int8), x.new_empty((x.shape[0], 1))
    arguments = [pointer(tensor) for tensor in (x, codes, scales)]
    smallest = ctypes.c_float(SMALLEST_ABSMAX)
    threads.parallel_for(
        lambda first, last: native.quantise_tokens(*arguments, smallest, *_sizes(first, last, x.shape[1])),
        *x.shape,
    )
    return codes, scales


def ternary_int8_matmul(codes: Tensor, packed: Tensor) -> Tensor:
    """Return the exact int32 products [tokens, out] of int8 [tokens, in] and ternary rows."""
    native = _loaded()
    num_codes = codes.shape[-1]
    if codes.shape[0] == 1 and one_token.covers(TERNARY, num_codes, 1):
        return one_token.ternary_int8_matmul(codes, packed)
    if codes.shape[0] > MOST_DOT_TOKENS and 128 * num_codes < _LARGEST_EXACT_SUM:
        ones = torch.ones((packed.shape[0], 1))
        # fp32 matmuls of small integers are exact, in any order of summation, and faster than integer ones.
        return _blocks(native, codes, packed, ones, ones, TERNARY).to(torch.int32)
    planes = _planes(codes.to(torch.int16), codes_per_byte(TERNARY))
    token_sums = codes.sum(-1, dtype=torch.int32)
    out = torch.empty((codes.shape[0], packed.shape[0]), dtype=torch.int32)
    sizes = _sizes(packed.shape[0], codes.shape[0], planes.shape[-1], packed.shape[1])
    arguments = [pointer(tensor) for tensor in (packed, planes, token_sums, out)]
    threads.parallel_for(
        lambda first, last: native.dot_ternary_rows(*arguments, *_sizes(first, last), *sizes),
        packed.shape[0],
        packed.shape[1],
    )
    return out
