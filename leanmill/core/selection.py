"""Exact selection of the largest values over all ranks, by counts instead of a gather or a sort."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


_DIGIT_BITS = 8
_INDEX_BITS = 31


def distinct_keys(values: Tensor, index: Tensor) -> Tensor:
    """Return int64 keys > 0 in the order of `values`; of equal values the lower index has the larger key.

    Args:
        values: fp32; NaN counts as infinity.
        index: int64, same shape, distinct modulo 2^31.
    """
    # 0.0 joins -0.0. Of IEEE numbers read as integers only the negative ones are in the wrong order.
    bits = (values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, -1 - bits, bits + 2**31)
    last = 2**_INDEX_BITS - 1
    return ordered << _INDEX_BITS | (last - (index & last))


def kth_largest(keys: Tensor, k: Tensor, reduce: Callable[[Tensor], Tensor] = lambda counts: counts) -> Tensor:
    """Return the k-th largest key of all ranks, an int64 scalar on the device; nothing waits for the device.

    A radix selection: eight times, keys that agree with the answer so far are counted by their next
    eight bits.

    Args:
        keys: int64 >= 0, any shape; this rank's.
        k: int64 scalar in [1, number of keys of all ranks], equal on all of them.
        reduce: Sums a small tensor over the ranks.
    """
    keys, digits = keys.flatten(), 2**_DIGIT_BITS
    found, left = torch.zeros_like(k), k
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        agrees = keys >> (shift + _DIGIT_BITS) == found if shift + _DIGIT_BITS < 64 else torch.ones_like(keys).bool()
        # From the largest digit down; keys that disagree are counted in a place of their own.
        place = torch.where(agrees, digits - 1 - (keys >> shift & digits - 1), digits)
        counts = keys.new_zeros(digits + 1).scatter_add_(0, place, torch.ones_like(keys))
        counts = reduce(counts)[:digits]
        is_above = counts.cumsum(0) < left
        left = left - (counts * is_above).sum()
        found = found << _DIGIT_BITS | (digits - 1 - is_above.sum()).clamp(min=0)
    return found
