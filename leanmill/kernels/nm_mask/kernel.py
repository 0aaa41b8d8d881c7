"""N:M masks in Triton: one read of the weight, one write of the result.

All types are compared as fp32, to which they convert exactly: without their sign, its bits order
like integers, NaNs after infinity.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from leanmill.kernels.nm_mask import naive


_MASK = tl.constexpr(0)
_PROJECT = tl.constexpr(1)
_DECAY = tl.constexpr(2)
_NUM_PATTERNS = tl.constexpr(len(naive.TILE_PATTERNS))
_PATTERNS = tl.constexpr(naive.TILE_PATTERNS)
_PATTERN_BITS = tl.constexpr(
    tuple(
        sum(1 << 4 * row + column for row, pair in enumerate(rows) for column in naive.PAIRS[pair])
        for rows in naive.TILE_PATTERNS
    )
)


@triton.jit
def _key(value):
    key = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(key, 0x7F800001)  # NaNs tie with each other


@triton.jit
def _split4(x, NUM_GROUPS: tl.constexpr):
    """Entries 0 to 3 of all groups. A thread loads whole groups, so nothing moves between threads."""
    even, odd = tl.split(tl.reshape(x, (NUM_GROUPS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _join4(a, b, c, d, NUM_GROUPS: tl.constexpr):
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (4 * NUM_GROUPS,))


@triton.jit
def _keep_fours(value, num_kept, NUM_GROUPS: tl.constexpr):
    """Whether each entry of [4 * NUM_GROUPS] stays: fewer than `num_kept` of its group come before it."""
    a, b, c, d = _split4(_key(value), NUM_GROUPS)
    ba, ca, da = (b > a).to(tl.int32), (c > a).to(tl.int32), (d > a).to(tl.int32)
    cb, db, dc = (c > b).to(tl.int32), (d > b).to(tl.int32), (d > c).to(tl.int32)
    before = _join4(ba + ca + da, 1 - ba + cb + db, 2 - ca - cb + dc, 3 - da - db - dc, NUM_GROUPS)
    return before < num_kept


@triton.jit
def _keep_any(value, weight, groups, lanes, is_inside, num_kept, SIZE: tl.constexpr):
    """The same for a tile [groups, lanes] of any group size; what it compares with comes from the first-level cache."""
    key = _key(value)
    before = tl.zeros(value.shape, tl.int32)
    for k in range(SIZE):
        other = _key(tl.load(weight + groups * SIZE + k, mask=is_inside, other=0.0).to(tl.float32))
        # Of equal keys the lower index is before.
        before += (other + (k < lanes).to(tl.int32) > key).to(tl.int32)
    return before < num_kept


@triton.jit
def _emit(value, keep, grad, decay, out, offsets, is_inside, WHAT: tl.constexpr):
    if WHAT == _MASK:
        tl.store(out + offsets, keep.to(tl.uint8), mask=is_inside)
    elif WHAT == _PROJECT:
        tl.store(out + offsets, tl.where(keep, value, 0.0).to(out.dtype.element_ty), mask=is_inside)
    else:
        g = tl.load(grad + offsets, mask=is_inside, other=0.0).to(tl.float32)
        pulled = g + tl.load(decay).to(tl.float32) * value
        tl.store(out + offsets, tl.where(keep, g, pulled).to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _fours_kernel(weight, grad, decay, out, num_groups, num_kept, WHAT: tl.constexpr, NUM_GROUPS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * NUM_GROUPS
    offsets = first * 4 + tl.arange(0, 4 * NUM_GROUPS)
    is_inside = offsets < num_groups * 4
    value = tl.load(weight + offsets, mask=is_inside, other=0.0).to(tl.float32)
    keep = _keep_fours(value, num_kept, NUM_GROUPS)
    _emit(value, keep, grad, decay, out, offsets, is_inside, WHAT)


@triton.jit
def _groups_kernel(
    weight,
    grad,
    decay,
    out,
    num_groups,
    num_kept,
    WHAT: tl.constexpr,
    SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    groups = tl.program_id(0).to(tl.int64) * NUM_GROUPS + tl.arange(0, NUM_GROUPS)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    is_group = groups < num_groups
    is_inside = is_group & (lanes < SIZE)
    value = tl.load(weight + groups * SIZE + lanes, mask=is_inside, other=0.0).to(tl.float32)
    keep = _keep_any(value, weight, groups, lanes, is_group, num_kept, SIZE)
    _emit(value, keep, grad, decay, out, groups * SIZE + lanes, is_inside, WHAT)


@triton.jit
def _pair_sums(value, NUM_TILES: tl.constexpr):
    magnitude = tl.abs(value)
    a, b, c, d = _split4(tl.where(magnitude == magnitude, magnitude, float("inf")), NUM_TILES)
    return a + b, a + c, a + d, b + c, b + d, c + d


@triton.jit
def _tiles_kernel(weight, grad, decay, out, width, WHAT: tl.constexpr, NUM_TILES: tl.constexpr):
    columns = tl.program_id(1) * (4 * NUM_TILES) + tl.arange(0, 4 * NUM_TILES)
    is_inside = columns < width
    first = tl.program_id(0).to(tl.int64) * 4 * width + columns
    r0 = tl.load(weight + first, mask=is_inside, other=0.0).to(tl.float32)
    r1 = tl.load(weight + first + width, mask=is_inside, other=0.0).to(tl.float32)
    r2 = tl.load(weight + first + 2 * width, mask=is_inside, other=0.0).to(tl.float32)
    r3 = tl.load(weight + first + 3 * width, mask=is_inside, other=0.0).to(tl.float32)
    sums = (_pair_sums(r0, NUM_TILES), _pair_sums(r1, NUM_TILES), _pair_sums(r2, NUM_TILES), _pair_sums(r3, NUM_TILES))
    best = tl.full((NUM_TILES,), -1.0, tl.float32)
    kept = tl.zeros((NUM_TILES,), tl.int32)
    for p in tl.static_range(_NUM_PATTERNS):
        upper = sums[0][_PATTERNS[p][0]] + sums[1][_PATTERNS[p][1]]
        total = upper + (sums[2][_PATTERNS[p][2]] + sums[3][_PATTERNS[p][3]])
        # The first of equal sums stays.
        kept = tl.where(total > best, _PATTERN_BITS[p], kept)
        best = tl.maximum(total, best)
    rows = (r0, r1, r2, r3)
    for row in tl.static_range(4):
        bits = kept >> 4 * row
        keep = _join4(bits & 1, bits >> 1 & 1, bits >> 2 & 1, bits >> 3 & 1, NUM_TILES) != 0
        _emit(rows[row], keep, grad, decay, out, first + row * width, is_inside, WHAT)


@triton.jit
def _compress_kernel(
    weight,
    values,
    indices,
    num_groups,
    num_kept,
    SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    groups = tl.program_id(0).to(tl.int64) * NUM_GROUPS + tl.arange(0, NUM_GROUPS)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    is_group = groups < num_groups
    is_inside = is_group & (lanes < SIZE)
    value = tl.load(weight + groups * SIZE + lanes, mask=is_inside, other=0.0).to(tl.float32)
    keep = _keep_any(value, weight, groups, lanes, is_group, num_kept, SIZE) & is_inside
    places = groups * num_kept + tl.cumsum(keep.to(tl.int32), axis=1) - 1
    tl.store(values + places, value.to(values.dtype.element_ty), mask=keep)
    tl.store(indices + places, (lanes + tl.zeros(value.shape, tl.int32)).to(tl.uint8), mask=keep)


@triton.jit
def _expand_kernel(
    values,
    indices,
    weight,
    num_groups,
    groups_a_row,
    bytes_a_row,
    num_kept,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    groups = tl.program_id(0).to(tl.int64) * NUM_GROUPS + tl.arange(0, NUM_GROUPS)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    is_group = groups < num_groups
    rows = groups // groups_a_row
    out = tl.zeros((NUM_GROUPS, LANES), tl.float32)
    for k in range(num_kept):
        bit = ((groups - rows * groups_a_row) * num_kept + k) * BITS
        packed = tl.load(indices + rows * bytes_a_row + bit // 8, mask=is_group, other=0).to(tl.int32)
        index = packed >> (bit % 8).to(tl.int32) & ((1 << BITS) - 1)
        value = tl.load(values + groups * num_kept + k, mask=is_group, other=0.0).to(tl.float32)
        out = tl.where(lanes == index, value, out)
    tl.store(weight + groups * SIZE + lanes, out.to(weight.dtype.element_ty), mask=is_group & (lanes < SIZE))


def nm_mask(weight: Tensor, num_kept: int, group_size: int, transposable: bool) -> Tensor:
    """Return the bool mask [..., in] of `naive.nm_mask`."""
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    _launch(_MASK, weight, None, None, mask.view(torch.uint8), num_kept, group_size, transposable)
    return mask


def project(weight: Tensor, num_kept: int, group_size: int, transposable: bool) -> Tensor:
    """Return the weight [..., in] with 0.0 for what the mask prunes."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _launch(_PROJECT, weight, None, None, out, num_kept, group_size, transposable)
    return out


def decayed_grad(
    grad: Tensor, weight: Tensor, decay: Tensor, num_kept: int, group_size: int, transposable: bool
) -> Tensor:
    """Return g + decay * (1 - M) * W [..., in]; `decay` is read by the kernel, without a wait for the device."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    _launch(_DECAY, weight, grad.contiguous(), decay, out, num_kept, group_size, transposable)
    return out


def compress(weight: Tensor, num_kept: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return kept values [..., in * N / M] and packed indices, uint8 [..., bytes]."""
    num_groups = weight.numel() // group_size
    values = weight.new_empty(*weight.shape[:-1], weight.shape[-1] // group_size * num_kept)
    indices = torch.empty(values.shape, dtype=torch.uint8, device=weight.device)
    if num_groups:
        grid, block = _tiling(num_groups, group_size)
        with _on(weight):
            _compress_kernel[grid](weight.contiguous(), values, indices, num_groups, num_kept, SIZE=group_size, **block)
    return values, naive.pack_indices(indices, group_size)


def expand(values: Tensor, indices: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Return the weight [..., in] whose kept entries are `values`, 0.0 elsewhere."""
    groups_a_row = values.shape[-1] // num_kept
    weight = values.new_empty(*values.shape[:-1], groups_a_row * group_size)
    num_groups = weight.numel() // group_size
    if num_groups:
        grid, block = _tiling(num_groups, group_size)
        sizes = (num_groups, groups_a_row, indices.shape[-1], num_kept)
        block["BITS"] = naive.index_bits(group_size)
        with _on(weight):
            _expand_kernel[grid](values.contiguous(), indices.contiguous(), weight, *sizes, SIZE=group_size, **block)
    return weight


def _launch(
    what: Any,
    weight: Tensor,
    grad: Tensor | None,
    decay: Tensor | None,
    out: Tensor,
    num_kept: int,
    group_size: int,
    transposable: bool,
) -> None:
    if out.numel() == 0:
        return
    weight = weight.contiguous()
    # Not read unless the gradient is asked for.
    pointers = (weight, weight if grad is None else grad, weight if decay is None else decay, out)
    # Without contraction a decay rounds as it does on the CPU.
    options = {"WHAT": what, "enable_fp_fusion": False}
    num_groups = weight.numel() // group_size
    with _on(weight):
        if transposable:
            width = weight.shape[-1]
            num_tiles = min(128, triton.next_power_of_2(width // 4))
            bands = weight.numel() // (4 * width), triton.cdiv(width, 4 * num_tiles)
            _tiles_kernel[bands](*pointers, width, NUM_TILES=num_tiles, **options)
        elif group_size == 4:
            # 64 bytes a thread of the 128, in loads of 16.
            num_in_block = 2048 // weight.element_size()
            blocks = (triton.cdiv(num_groups, num_in_block),)
            _fours_kernel[blocks](*pointers, num_groups, num_kept, NUM_GROUPS=num_in_block, **options)
        else:
            grid, block = _tiling(num_groups, group_size)
            _groups_kernel[grid](*pointers, num_groups, num_kept, SIZE=group_size, **block, **options)


def _tiling(num_groups: int, group_size: int) -> tuple[tuple[int], dict[str, int]]:
    lanes = triton.next_power_of_2(group_size)
    num_in_block = 1024 // lanes
    return (triton.cdiv(num_groups, num_in_block),), {"NUM_GROUPS": num_in_block, "LANES": lanes}


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    # Triton launches on the current device, whatever device its arguments are on.
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
