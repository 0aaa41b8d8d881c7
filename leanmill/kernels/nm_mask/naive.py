"""N:M masks, projections and their compressed form in plain tensor code: the definitions.

An entry's magnitude orders it within its group; -0.0 ties with 0.0, all NaNs tie and count as
larger than infinity, and of equal magnitudes the lower index comes first.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


LARGEST_GROUP = 256
"""What counters and packed indices of one byte hold."""
_KEYS = {
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.float32: (torch.int32, 0x7FFF_FFFF, 0x7F80_0000),
    torch.float64: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}
"""Integer type of equal size, its bits without the sign, and infinity's bits."""
PAIRS = tuple(itertools.combinations(range(4), 2))
"""Pairs of columns that a row of a tile may keep."""
TILE_PATTERNS = tuple(
    rows
    for rows in itertools.product(range(6), repeat=4)
    if all(sum(column in PAIRS[row] for row in rows) == 2 for column in range(4))
)
"""The 90 masks of a 4 x 4 tile that keep two of every row and column: a pair of `PAIRS` a row, in
lexicographic order."""


def nm_mask_by_sort(weight: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Return a bool mask [..., in], true for the `num_kept` largest magnitudes of each group.

    Groups are `group_size` neighbours along the last dim. Ties keep the lower index; -0.0 ties with
    0.0 and NaN counts as larger than infinity, so every group keeps exactly `num_kept`.
    """
    groups = _grouped(weight.detach().abs(), group_size)
    kept = groups.sort(dim=-1, descending=True, stable=True).indices[..., :num_kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2).contiguous()


def nm_mask_by_rank(weight: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Same mask without sorting: an entry stays if fewer than `num_kept` of its group come before it.

    Sorting rows of 4 spends nearly all its time on bookkeeping. Here entry i of all groups at once
    is compared with the entries after it, M - 1 vectorised steps in all.
    """
    integer, magnitude_bits, infinity = _KEYS[weight.dtype]
    # Without their sign bit, floats order like integers, NaNs after infinity.
    bits = weight.detach().contiguous().view(integer).bitwise_and(magnitude_bits).clamp_(max=infinity + 1)
    keys = _grouped(bits, group_size).movedim(-1, 0).contiguous()
    num_before = torch.zeros_like(keys, dtype=torch.uint8)
    for i in range(group_size - 1):
        is_after = keys[i] < keys[i + 1 :]
        num_before[i] += is_after.sum(0, dtype=torch.uint8)
        num_before[i + 1 :] += is_after.logical_not_()
    return (num_before < num_kept).movedim(0, -1).flatten(-2).contiguous()


def tile_mask(weight: Tensor) -> Tensor:
    """Return the transposable 2:4 bool mask [..., out, in] of a weight whose last dims 4 divides.

    Each 4 x 4 tile keeps two of every row and of every column: of the 90 ways, the one with the
    largest sum of magnitudes, and of equal sums the first in lexicographic order of the kept pairs
    of its rows, top row first. Sums are taken in fp32 (fp64 for fp64), within each row, then of
    the upper two rows and the lower two, then of both; NaN counts as infinity, and so does a sum beyond
    the type's range.
    """
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).abs()
    exact = torch.where(exact.isnan(), torch.inf, exact)
    tiles = exact.unflatten(-2, (exact.shape[-2] // 4, 4)).unflatten(-1, (exact.shape[-1] // 4, 4))
    # [row][pair] of [..., out / 4, in / 4]
    sums = [[tiles[..., row, :, i] + tiles[..., row, :, j] for i, j in PAIRS] for row in range(4)]
    best = torch.full_like(sums[0][0], -1.0)
    choice = torch.zeros_like(best, dtype=torch.int64)
    for number, (a, b, c, d) in enumerate(TILE_PATTERNS):
        total = (sums[0][a] + sums[1][b]) + (sums[2][c] + sums[3][d])
        is_better = total > best
        best = torch.where(is_better, total, best)
        choice.masked_fill_(is_better, number)
    masks = tile_pattern_masks(weight.device)[choice]
    return masks.movedim(-2, -3).flatten(-2).flatten(-3, -2).contiguous()


def tile_pattern_masks(device: torch.device) -> Tensor:
    """The masks of `TILE_PATTERNS`, bool [90, 4, 4]."""
    rows = [[[column in PAIRS[row] for column in range(4)] for row in rows] for rows in TILE_PATTERNS]
    return torch.tensor(rows, dtype=torch.bool, device=device)


def nm_mask(weight: Tensor, num_kept: int, group_size: int, transposable: bool) -> Tensor:
    """Return the bool mask [..., in] by whichever formulation is quick in tensor code."""
    return tile_mask(weight) if transposable else nm_mask_by_rank(weight, num_kept, group_size)


def project(weight: Tensor, num_kept: int, group_size: int, transposable: bool) -> Tensor:
    """Return `weight` with 0.0 where the mask is false: a pruned infinity or NaN leaves no NaN."""
    return torch.where(nm_mask(weight, num_kept, group_size, transposable), weight, 0.0).contiguous()


def decayed_grad(
    grad: Tensor, weight: Tensor, decay: Tensor, num_kept: int, group_size: int, transposable: bool
) -> Tensor:
    """Return g + decay * (1 - M) * W (Zhou et al. 2021, eq. 9), computed in fp32 (fp64 for fp64), rounded once.

    Where the mask keeps, that is g itself, whatever W is.
    """
    exact = torch.promote_types(weight.dtype, torch.float32)
    pulled = grad.to(exact) + decay.to(exact) * weight.to(exact)
    mask = nm_mask(weight, num_kept, group_size, transposable)
    return torch.where(mask, grad, pulled.to(grad.dtype)).contiguous()


def index_bits(group_size: int) -> int:
    """Bits of one packed index: 1, 2, 4 or 8."""
    return next(bits for bits in (1, 2, 4, 8) if group_size <= 1 << bits)


def packed_width(num_values: int, group_size: int) -> int:
    """Bytes that the indices of a row of `num_values` kept entries take."""
    return -(-num_values * index_bits(group_size) // 8)


def compress(weight: Tensor, num_kept: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Return the kept values [..., in * N / M] and their packed indices, uint8 [..., bytes]."""
    groups = _grouped(weight, group_size)
    mask = nm_mask_by_rank(weight, num_kept, group_size).view(groups.shape)
    kept = mask.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :num_kept]
    return groups.gather(-1, kept).flatten(-2).contiguous(), pack_indices(kept.flatten(-2), group_size)


def gather(weight: Tensor, indices: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Return the values [..., in * N / M] at packed `indices` of a weight [..., in]."""
    groups = _grouped(weight, group_size)
    kept = unpack_indices(indices, weight.shape[-1] // group_size * num_kept, group_size)
    return groups.gather(-1, _grouped(kept, num_kept)).flatten(-2).contiguous()


def expand(values: Tensor, indices: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Undo `compress`: the weight [..., in] with 0.0 in place of what was pruned."""
    kept = _grouped(unpack_indices(indices, values.shape[-1], group_size), num_kept)
    groups = values.new_zeros(*kept.shape[:-1], group_size)
    return groups.scatter(-1, kept, _grouped(values, num_kept)).flatten(-2)


def pack_indices(indices: Tensor, group_size: int) -> Tensor:
    """Pack indices [..., n] into uint8: the first of a byte in its lowest bits, zeros at the end of a row."""
    bits = index_bits(group_size)
    per_byte = 8 // bits
    padded = F.pad(indices.to(torch.uint8), (0, -indices.shape[-1] % per_byte))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=indices.device)
    return (_grouped(padded, per_byte) << shifts).sum(-1, dtype=torch.uint8)


def unpack_indices(packed: Tensor, num_values: int, group_size: int) -> Tensor:
    """Undo `pack_indices`: int64 [..., num_values]."""
    bits = index_bits(group_size)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    lanes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return lanes.flatten(-2)[..., :num_values].to(torch.int64)


def _grouped(tensor: Tensor, group_size: int) -> Tensor:
    # Not -1 for the number of groups: it is ambiguous where there are none.
    return tensor.unflatten(-1, (tensor.shape[-1] // group_size, group_size))
