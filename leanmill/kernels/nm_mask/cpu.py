"""The N:M mask on the CPU for groups of 2, 4 and 8, in vectorised passes over contiguous memory.

Sorting or `topk` over rows of 4 spends nearly all its time on bookkeeping. Here each entry is
compared with its neighbours 1 .. M-1 places on, in flat memory, which gives a byte of 0 or 1 each;
the M bytes of a group are then one machine word, and the number of entries that each entry beats is
counted for all M lanes of the word at once.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor


_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_KEYS = {
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFF_FFFF),
    torch.float64: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF),
}


def is_supported(weight: Tensor, group_size: int) -> bool:
    """Whether `nm_mask` below covers this weight."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.device.type == "cpu"
        and weight.numel() >= group_size
        and group_size in _WORDS
        and weight.dtype in _KEYS
        and sys.byteorder == "little"
    )


@torch.no_grad()
def nm_mask(weight: Tensor, num_kept: int, group_size: int) -> Tensor:
    """Return the bool mask of `naive.nm_mask_by_sort` for a weight [..., in]; see `is_supported`."""
    key_dtype, magnitude_bits = _KEYS[weight.dtype]
    # Without their sign bit, floats order like integers; NaNs come after infinity.
    keys = weight.detach().contiguous().view(key_dtype).view(-1).bitwise_and(magnitude_bits)
    wins: Tensor | None = None
    total = 0
    for distance in range(1, group_size):
        # Lane i of a word says whether entry i beats entry i + distance (ties: the lower index
        # does); the last `distance` lanes look into the next group and are cleared.
        lanes = _ones(group_size - distance)
        words = torch.empty(keys.numel(), dtype=torch.bool)
        torch.ge(keys[:-distance], keys[distance:], out=words[:-distance])
        beats = words.view(_WORDS[group_size]).bitwise_and_(lanes)
        # wins += beats for lane i, and wins += (1 - beats) for lane i + distance, as one product;
        # the ones are constants, collected in `total`.
        factor = 1 - (1 << 8 * distance)
        wins = beats.mul_(factor) if wins is None else wins.add_(beats, alpha=factor)
        total += lanes << 8 * distance
    assert wins is not None
    # An entry stays if it beats at least M - N others: carry that into the lane's top bit.
    threshold = _ones(group_size) * (0x80 - (group_size - num_kept))
    wins.add_(total + threshold).bitwise_right_shift_(7).bitwise_and_(_ones(group_size))
    return wins.view(torch.bool).view(weight.shape)


def _ones(num_lanes: int) -> int:
    """A word with 1 in each of its lowest `num_lanes` bytes."""
    return int.from_bytes(b"\x01" * num_lanes, "little")
