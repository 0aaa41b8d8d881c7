"""Ternary levels on a GPU: sums of magnitudes, then one pass that writes the levels."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


_TILE = 4096
_SEGMENT = 16384
"""Longest run of weights one program sums up, in fp32; the sums of a group are added up in fp64."""


@triton.jit
def magnitude_sums_kernel(
    weight, threshold, sums, counts, num_groups, group_length, segment_length, segments_per_group,
    HAS_THRESHOLD: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum and number of the magnitudes above the group's threshold, for a piece of the weight."""
    program = tl.program_id(0).to(tl.int64)
    group = program // segments_per_group * GROUPS + tl.arange(0, GROUPS)
    segment = program % segments_per_group
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, group_length)
    is_group = group < num_groups
    least = tl.full([GROUPS, 1], -1.0, tl.float32)
    if HAS_THRESHOLD:
        least = tl.load(threshold + group, mask=is_group, other=0.0)[:, None]
    total = tl.zeros([GROUPS, BLOCK], tl.float32)
    number = tl.zeros([GROUPS, BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = is_group[:, None] & (column < end)[None, :]
        at = group[:, None] * group_length + column[None, :]
        magnitude = tl.abs(tl.load(weight + at, mask=inside, other=0.0).to(tl.float32))
        kept = inside & (magnitude > least)
        # What stays below enters as 0 times itself, so that a NaN or an infinity shows.
        total += magnitude * kept.to(tl.float32)
        number += kept.to(tl.int32)
    at_sum = group * segments_per_group + segment
    tl.store(sums + at_sum, tl.sum(total, 1), mask=is_group)
    tl.store(counts + at_sum, tl.sum(number, 1), mask=is_group)


@triton.jit
def levels_kernel(
    weight, out, level, divisor, threshold, num_groups, group_length, segment_length, segments_per_group,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the levels of a piece of the weight."""
    program = tl.program_id(0).to(tl.int64)
    group = program // segments_per_group * GROUPS + tl.arange(0, GROUPS)
    begin = program % segments_per_group * segment_length
    end = tl.minimum(begin + segment_length, group_length)
    is_group = group < num_groups
    levels = tl.load(level + group, mask=is_group, other=0.0)[:, None]
    divisors = tl.load(divisor + group, mask=is_group, other=1.0)[:, None]
    thresholds = tl.load(threshold + group, mask=is_group, other=0.0)[:, None]
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = is_group[:, None] & (column < end)[None, :]
        at = group[:, None] * group_length + column[None, :]
        values = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        codes = tl.where(values < 0.0, -1.0, 1.0)
        codes = tl.where(tl.div_rn(tl.abs(values), divisors + tl.zeros_like(values)) > thresholds, codes, 0.0)
        tl.store(out + at, codes * levels, mask=inside)


def magnitude_sums(weight: Tensor, group_length: int, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum (fp64) and number (int64) of |w| above `threshold` [groups], all without one, in every group [groups]."""
    shape, programs, tile = _layout(weight, group_length)
    sums = weight.new_empty((shape[0], shape[-1]), dtype=torch.float32)
    counts = weight.new_empty((shape[0], shape[-1]), dtype=torch.int32)
    magnitude_sums_kernel[(programs,)](
        weight, sums if threshold is None else threshold, sums, counts, *shape,
        HAS_THRESHOLD=threshold is not None, num_warps=8, **tile,
    )  # fmt: skip
    return sums.sum(-1, dtype=torch.float64), counts.sum(-1, dtype=torch.int64)


def ternary_levels(weight: Tensor, group_length: int, level: Tensor, divisor: Tensor, threshold: Tensor) -> Tensor:
    """sign(w) * level where |w| / divisor > threshold and 0 elsewhere; all fp32 [groups]."""
    shape, programs, tile = _layout(weight, group_length)
    out = torch.empty_like(weight)
    levels_kernel[(programs,)](weight, out, level, divisor, threshold, *shape, num_warps=8, **tile)
    return out


def _layout(weight: Tensor, group_length: int) -> tuple[tuple[int, int, int, int], int, dict[str, int]]:
    """(groups, group length, segment length, segments a group), the number of programs, and the tile."""
    num_groups = weight.numel() // group_length
    segments = triton.cdiv(group_length, _SEGMENT)
    block = min(_TILE, triton.next_power_of_2(group_length))
    groups = max(1, _TILE // block) if segments == 1 else 1
    programs = triton.cdiv(num_groups, groups) * segments
    return (num_groups, group_length, _SEGMENT, segments), programs, {"GROUPS": groups, "BLOCK": block}
