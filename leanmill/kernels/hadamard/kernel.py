"""The transforms in Triton: butterflies on a tile in registers, one read and one write."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanmill.kernels.hadamard.naive import CLIPS, scale_of


LARGEST_ROW = 16384
"""Longest row that quest_quantise holds in registers at once."""
_TILE = 2048
"""Elements a program: with one warp, stages up to this distance exchange within the warp."""


@triton.jit
def _butterflies(x, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr):
    # The definition's order of stages, so that results equal it bit for bit.
    for stage in tl.static_range(LOG_BLOCK):
        pairs = tl.reshape(x, (ROWS, BLOCK // (2 << stage), 2, 1 << stage))
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        x = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2)), (ROWS, BLOCK))
    return x


@triton.jit
def _hadamard_kernel(
    x_ptr,
    mask_ptr,
    out_ptr,
    num_blocks,
    scale,
    HAS_MASK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    index = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (block < num_blocks)[:, None]
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
    if HAS_MASK:
        x = tl.where(tl.load(mask_ptr + index, mask=inside, other=0) != 0, x, 0.0)
    x = _butterflies(x, ROWS, BLOCK, LOG_BLOCK) * scale
    tl.store(out_ptr + index, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _quest_kernel(
    x_ptr,
    out_ptr,
    mask_ptr,
    length,
    scale,
    step_of_sigma,
    NUM_LEVELS: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    LOG_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * length
    index = tl.arange(0, NUM_BLOCKS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = index < length
    x = tl.load(x_ptr + row + index, mask=inside, other=0.0).to(tl.float32)
    x = _butterflies(x, NUM_BLOCKS, BLOCK, LOG_BLOCK) * scale
    # Scaled by the largest magnitude, so that squares neither overflow nor vanish.
    largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    unit = tl.where(largest > 0, largest, 1.0)
    share = x / unit
    sigma = tl.sqrt(tl.sum(tl.sum(share * share, axis=1), axis=0) / length) * unit
    step = sigma * step_of_sigma
    units = tl.div_rn(x, tl.zeros_like(x) + tl.where(step == 0, 1.0, step))
    half: tl.constexpr = NUM_LEVELS // 2
    if NUM_LEVELS % 2 == 1:
        # Within +-4096 this rounds half to even.
        near = tl.where(units < -4096.0, -4096.0, tl.where(units > 4096.0, 4096.0, units))
        level = (near + 12582912.0) - 12582912.0
        level = tl.where(level < -half, -half * 1.0, tl.where(level > half, half * 1.0, level))
    else:
        level = tl.floor(units)
        level = tl.where(level < -half, -half * 1.0, tl.where(level > half - 1, half - 1.0, level)) + 0.5
    tl.store(out_ptr + row + index, (level * step).to(out_ptr.dtype.element_ty), mask=inside)
    trusted = tl.abs(x) <= step * (NUM_LEVELS / 2)
    tl.store(mask_ptr + row + index, trusted.to(tl.uint8), mask=inside)


def hadamard(x: Tensor, mask: Tensor | None, out: Tensor, block_size: int) -> Tensor:
    """Write the transform of contiguous `x` [..., n], zeroed where `mask` is false, to `out`, maybe `x`."""
    num_blocks = x.numel() // block_size
    rows = max(1, _TILE // 2 // block_size)
    _hadamard_kernel[(triton.cdiv(num_blocks, rows),)](
        x,
        x if mask is None else mask.view(torch.uint8),
        out,
        num_blocks,
        scale_of(block_size),
        HAS_MASK=mask is not None,
        ROWS=rows,
        BLOCK=block_size,
        LOG_BLOCK=block_size.bit_length() - 1,
        num_warps=max(1, rows * block_size // _TILE),
    )
    return out


def quest_quantise(x: Tensor, num_levels: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Return the quantised transform of contiguous `x` [..., n <= LARGEST_ROW] and its bool trust mask."""
    length = x.shape[-1]
    quantised, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
    num_blocks = triton.next_power_of_2(length // block_size)
    _quest_kernel[(x.numel() // length,)](
        x,
        quantised,
        mask,
        length,
        scale_of(block_size),
        2 * CLIPS[num_levels] / (num_levels - 1),
        NUM_LEVELS=num_levels,
        NUM_BLOCKS=num_blocks,
        BLOCK=block_size,
        LOG_BLOCK=block_size.bit_length() - 1,
        num_warps=min(16, max(1, num_blocks * block_size // _TILE)),
    )
    return quantised, mask.view(torch.bool)
