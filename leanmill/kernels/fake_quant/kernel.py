"""Fake quantisation on a GPU: one read and one write forward, two reads and one write backward.

Weights that share a scale lie next to each other, so a weight is a matrix [groups, group_length].
A program takes a tile of short groups, or walks along one segment of a long one, and writes one sum
for each: sums need no atomics and come out the same every time.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanmill.kernels.fake_quant.grid import SMALLEST_SCALE, Grid


_TILE = 4096
"""Elements of a tile: 16 a thread with 8 warps, two 16-byte loads of bf16."""
_SEGMENT = 16384
"""Longest run of weights one program sums up; rows are rarely longer, whole weights always are."""
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""Without fused multiply-add a GPU computes what the CPU computes, bit for bit but for sums."""


@triton.jit
def _round_even(x):
    # Exact for |x| < 2^22, and the same in the interpreter, which has no libdevice.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _magnitude(values):
    # NaNs all equal and above infinity.
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(bits, 0x7F800001)


@triton.jit
def _codes(values, scales, offsets, LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr):
    units = tl.div_rn(values - offsets, scales)
    shifted = units - SHIFT
    # Selections rather than min and max: a NaN stays one.
    shifted = tl.where(shifted < LOW, LOW, shifted)
    shifted = tl.where(shifted > HIGH, HIGH, shifted)
    return units, _round_even(shifted) + SHIFT


@triton.jit
def _scales(scale, group, is_group, SMALLEST: tl.constexpr):
    scales = tl.load(scale + group, mask=is_group, other=1.0).to(tl.float32)
    return tl.where(scales < SMALLEST, SMALLEST, scales)


@triton.jit
def fake_quant_fwd_kernel(
    weight, scale, offset, out, num_groups, group_length,
    segment_length, segments_per_group,
    LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, SMALLEST: tl.constexpr,
    HAS_OFFSET: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round a tile of short groups, or one segment of a long one."""
    program = tl.program_id(0).to(tl.int64)
    group = program // segments_per_group * GROUPS + tl.arange(0, GROUPS)
    begin = program % segments_per_group * segment_length
    end = tl.minimum(begin + segment_length, group_length)
    is_group = group < num_groups
    scales = _scales(scale, group, is_group, SMALLEST)[:, None]
    offsets = tl.zeros([GROUPS, 1], tl.float32)
    if HAS_OFFSET:
        offsets = tl.load(offset + group, mask=is_group, other=0.0).to(tl.float32)[:, None]
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = is_group[:, None] & (column < end)[None, :]
        at = group[:, None] * group_length + column[None, :]
        values = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        _, codes = _codes(values, scales, offsets, LOW, HIGH, SHIFT)
        result = codes * scales + offsets
        tl.store(out + at, result, mask=inside)


@triton.jit
def fake_quant_bwd_kernel(
    grad, weight, scale, offset, weight_grad, scale_sums, offset_sums, num_groups, group_length,
    segment_length, segments_per_group,
    LOW: tl.constexpr, HIGH: tl.constexpr, SHIFT: tl.constexpr, SMALLEST: tl.constexpr,
    EDGE_LOW: tl.constexpr, EDGE_HIGH: tl.constexpr, STRAIGHT: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
    HAS_OFFSET: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All gradients of the same piece, its sums for scale and offset written apart."""
    program = tl.program_id(0).to(tl.int64)
    group = program // segments_per_group * GROUPS + tl.arange(0, GROUPS)
    segment = program % segments_per_group
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, group_length)
    is_group = group < num_groups
    scales = _scales(scale, group, is_group, SMALLEST)[:, None]
    offsets = tl.zeros([GROUPS, 1], tl.float32)
    if HAS_OFFSET:
        offsets = tl.load(offset + group, mask=is_group, other=0.0).to(tl.float32)[:, None]
    to_scale = tl.zeros([GROUPS, BLOCK], tl.float32)
    to_offset = tl.zeros([GROUPS, BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = is_group[:, None] & (column < end)[None, :]
        at = group[:, None] * group_length + column[None, :]
        values = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        grads = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        units, codes = _codes(values, scales, offsets, LOW, HIGH, SHIFT)
        passes = (units >= EDGE_LOW) & (units <= EDGE_HIGH)
        of_scale = grads * (codes - tl.where(passes, units, 0.0))
        of_offset = tl.where(passes, 0.0, grads)
        of_weight = grads
        if not STRAIGHT:
            of_weight = tl.where(passes, grads, 0.0)
        if NEEDS_WEIGHT:
            tl.store(weight_grad + at, of_weight, mask=inside)
        # Past the end a gradient is 0, but the offset may make the code there NaN.
        to_scale += tl.where(inside, of_scale, 0.0)
        to_offset += of_offset
    at_sum = group * segments_per_group + segment
    tl.store(scale_sums + at_sum, tl.sum(to_scale, 1), mask=is_group)
    if HAS_OFFSET:
        tl.store(offset_sums + at_sum, tl.sum(to_offset, 1), mask=is_group)


@triton.jit
def int8_activations_kernel(
    tokens, out, steps, length, SMALLEST: tl.constexpr, AS_CODES: tl.constexpr, BLOCK: tl.constexpr
):
    """One token: its largest magnitude, then its codes or what they stand for."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(tokens + row * length + column, mask=column < length, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, _magnitude(values))
    top = tl.max(largest, 0).to(tl.float32, bitcast=True)
    top = tl.where(top < SMALLEST, SMALLEST, top)
    factor = tl.div_rn(tl.full([], 127.0, tl.float32), top)
    step = tl.div_rn(top, tl.full([], 127.0, tl.float32))
    tl.store(steps + row, step)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(tokens + row * length + column, mask=column < length, other=0.0).to(tl.float32)
        codes = values * factor
        codes = tl.where(codes < -128.0, -128.0, codes)
        codes = _round_even(tl.where(codes > 127.0, 127.0, codes))
        if AS_CODES:
            codes = tl.where(codes == codes, codes, 0.0)
            tl.store(out + row * length + column, codes.to(tl.int8), mask=column < length)
        else:
            tl.store(out + row * length + column, codes * step, mask=column < length)


def forward(weight: Tensor, scale: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    """`naive.forward` for a contiguous weight."""
    scale, offset = scale.contiguous(), None if offset is None else offset.contiguous()
    out = torch.empty_like(weight)
    shape, programs, tile = _layout(weight, scale)
    fake_quant_fwd_kernel[(programs,)](
        weight, scale, scale if offset is None else offset, out, *shape,
        LOW=float(grid.low), HIGH=float(grid.high), SHIFT=grid.shift, SMALLEST=SMALLEST_SCALE,
        HAS_OFFSET=offset is not None, **_OPTIONS, **tile,
    )  # fmt: skip
    return out


def gradients(
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    grid: Grid,
    grad_scale: float,
    straight_through: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`naive.gradients` for contiguous tensors; no weight gradient is written unless needed."""
    scale, offset = scale.contiguous(), None if offset is None else offset.contiguous()
    shape, programs, tile = _layout(weight, scale)
    out = torch.empty_like(weight) if needs_weight else None
    sums = weight.new_empty((2, scale.numel(), shape[-1]), dtype=torch.float32)
    low, high = grid.edges
    fake_quant_bwd_kernel[(programs,)](
        grad, weight, scale, scale if offset is None else offset,
        weight if out is None else out, sums[0], sums[1], *shape,
        LOW=float(grid.low), HIGH=float(grid.high), SHIFT=grid.shift, SMALLEST=SMALLEST_SCALE,
        EDGE_LOW=low, EDGE_HIGH=high, STRAIGHT=straight_through, NEEDS_WEIGHT=needs_weight,
        HAS_OFFSET=offset is not None, **_OPTIONS, **tile,
    )  # fmt: skip
    used = sums if offset is not None else sums[:1]
    totals = used.sum(-1, dtype=torch.float64) if shape[-1] > 1 else used.squeeze(-1)
    totals = totals.mul(grad_scale)
    # Copies: an operator's outputs may not share memory.
    scale_grad = totals[0].to(scale.dtype, copy=True).view(scale.shape)
    return out, scale_grad, None if offset is None else totals[1].to(offset.dtype, copy=True).view(offset.shape)


def activations(tokens: Tensor, smallest: float, *, as_codes: bool) -> tuple[Tensor, Tensor]:
    """Codes, or fake-quantised values, of contiguous tokens [..., in], and steps [..., 1]."""
    length = tokens.shape[-1]
    steps = tokens.new_empty((*tokens.shape[:-1], 1), dtype=torch.float32)
    out = torch.empty_like(tokens, dtype=torch.int8 if as_codes else tokens.dtype)
    block = min(_TILE, triton.next_power_of_2(length))
    int8_activations_kernel[(steps.numel(),)](
        tokens, out, steps, length, SMALLEST=smallest, AS_CODES=as_codes, BLOCK=block,
        num_warps=max(1, min(8, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return out, steps


def _layout(weight: Tensor, scale: Tensor) -> tuple[tuple[int, int, int, int], int, dict[str, int]]:
    """(groups, group length, segment length, segments a group), the number of programs, and the tile."""
    num_groups = scale.numel()
    group_length = weight.numel() // num_groups
    segments = triton.cdiv(group_length, _SEGMENT)
    block = min(_TILE, triton.next_power_of_2(group_length))
    groups = max(1, _TILE // block) if segments == 1 else 1
    programs = triton.cdiv(num_groups, groups) * segments
    return (num_groups, group_length, _SEGMENT, segments), programs, {"GROUPS": groups, "BLOCK": block}
