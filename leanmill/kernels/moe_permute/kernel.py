"""Sorting by counting and moving rows in Triton: every place and every sum is fixed by the input.

Sorting takes two passes. The first counts each block of copies by expert; a scan of these counts
gives every block its first place for each expert, and the second pass ranks copies inside a block.
No atomics, so results repeat bitwise.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanmill.kernels.moe_permute import naive


_BLOCK_COPIES = 128
"""Copies a program ranks: by comparing all pairs."""

invert = naive.invert


@triton.jit
def _histogram_kernel(experts, counts, num_copies, num_bins, BLOCK: tl.constexpr, BINS: tl.constexpr):
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(experts + at, mask=at < num_copies, other=-1)
    bins = tl.arange(0, BINS)
    count = tl.sum((mine[:, None] == bins[None, :]).to(tl.int32), axis=0)
    tl.store(counts + block * num_bins + bins, count, mask=bins < num_bins)


@triton.jit
def _place_kernel(experts, starts, order, positions, num_copies, num_bins, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    at = block * BLOCK + lane
    valid = at < num_copies
    mine = tl.load(experts + at, mask=valid, other=-1)
    other = tl.load(experts + at, mask=valid, other=-2)
    is_before = (mine[:, None] == other[None, :]) & (lane[None, :] < lane[:, None])
    rank = tl.sum(is_before.to(tl.int32), axis=1)
    start = tl.load(starts + block * num_bins + mine, mask=valid, other=0)
    place = start + rank
    tl.store(order + place, at.to(tl.int64), mask=valid)
    tl.store(positions + at, place, mask=valid)


@triton.jit
def _spread_kernel(
    tokens, positions, weights, rows, top_k, width, num_rows, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr
):
    copy = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(positions + copy)
    mask = column < tl.where(row < num_rows, width, 0)
    token = (copy // top_k).to(tl.int64)
    value = tl.load(tokens + token * width + column, mask=mask).to(tl.float32)
    if HAS_WEIGHTS:
        value *= tl.load(weights + copy).to(tl.float32)
    tl.store(rows + row * width + column, value.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    rows, positions, weights, tokens, top_k, width, num_rows, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(top_k):
        row = tl.load(positions + token * top_k + k)
        inside = column < tl.where(row < num_rows, width, 0)
        value = tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            value *= tl.load(weights + token * top_k + k).to(tl.float32)
        total += value
    at = token.to(tl.int64) * width + column
    tl.store(tokens + at, total.to(tokens.dtype.element_ty), mask=mask)


@triton.jit
def _dots_kernel(rows, positions, tokens, dots, top_k, width, num_rows, BLOCK: tl.constexpr):
    copy = tl.program_id(0)
    row = tl.load(positions + copy)
    token = (copy // top_k).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < tl.where(row < num_rows, width, 0)
        a = tl.load(rows + row * width + column, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(tokens + token * width + column, mask=mask, other=0.0).to(tl.float32)
        total += a * b
    tl.store(dots + copy, tl.sum(total, axis=0))


def sort_by_expert(expert_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `naive.sort_by_expert`; indices outside [0, num_experts] are not looked for."""
    experts = expert_index.reshape(-1).contiguous()
    num_copies, num_bins = experts.numel(), num_experts + 1
    num_blocks = triton.cdiv(num_copies, _BLOCK_COPIES)
    counts = experts.new_empty(num_blocks, num_bins, dtype=torch.int32)
    order, positions = torch.empty_like(experts), torch.empty_like(experts).view(expert_index.shape)
    if num_blocks:
        sizes = (num_copies, num_bins)
        bins = triton.next_power_of_2(num_bins)
        _histogram_kernel[(num_blocks,)](experts, counts, *sizes, BLOCK=_BLOCK_COPIES, BINS=bins)
    by_expert = counts.t().reshape(-1).to(torch.int64)
    starts = (by_expert.cumsum(0) - by_expert).view(num_bins, num_blocks).t().contiguous()
    if num_blocks:
        _place_kernel[(num_blocks,)](experts, starts, order, positions, *sizes, BLOCK=_BLOCK_COPIES)
    return order, positions, counts.sum(0, dtype=torch.int64)[:num_experts]


def spread(tokens: Tensor, positions: Tensor, weights: Tensor | None = None, num_rows: int | None = None) -> Tensor:
    """Return `naive.spread`, multiplied in fp32 and rounded once."""
    rows = tokens.new_empty(positions.numel() if num_rows is None else num_rows, tokens.shape[1])
    _launch(_spread_kernel, positions.numel(), tokens, positions, weights, rows, num_rows=rows.shape[0])
    return rows


def combine(rows: Tensor, positions: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return `naive.combine`: summed in fp32 in the order of k, rounded once."""
    tokens = rows.new_empty(positions.shape[0], rows.shape[1])
    _launch(_combine_kernel, positions.shape[0], rows, positions, weights, tokens, num_rows=rows.shape[0])
    return tokens


def dots(rows: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Return `naive.dots`."""
    products = rows.new_empty(positions.shape, dtype=torch.float32)
    width = rows.shape[1]
    if positions.numel():
        block = min(triton.next_power_of_2(max(width, 1)), 1024)
        _dots_kernel[(positions.numel(),)](
            *(rows, positions, tokens, products, positions.shape[1], width, rows.shape[0]), BLOCK=block, num_warps=4
        )
    return products


def _launch(
    kernel: triton.JITFunction,
    num_programs: int,
    source: Tensor,
    positions: Tensor,
    weights: Tensor | None,
    out: Tensor,
    *,
    num_rows: int,
) -> None:
    width = source.shape[1]
    if out.numel() == 0:
        return
    block = min(triton.next_power_of_2(width), 1024)
    factors = source if weights is None else weights.contiguous()
    kernel[(num_programs, triton.cdiv(width, block))](
        *(source, positions, factors, out, positions.shape[1], width, num_rows),
        HAS_WEIGHTS=weights is not None,
        BLOCK=block,
        num_warps=4,
    )
