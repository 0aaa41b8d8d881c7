"""Exact selection of the largest values over all ranks, by counts instead of a gather or a sort.

`kth_largest` never waits for the device, for values of every step (losses of tokens). `largest` waits, and in
return looks at fewer elements from digit to digit: over millions of weights now and then it is 30 times as fast.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leanmill.core.views import View


_DIGIT_BITS = 8
_INDEX_BITS = 31
_WIDE_DIGIT_BITS = 11
"""Of `largest`: 16 KiB are reduced at a time."""
_MAGNITUDE_BITS = 31
"""Of a non-negative fp32 number, whose bit pattern orders as the number does."""


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


@torch.no_grad()
def largest(score: Tensor, count: int, *, among: Tensor | None = None, view: View | None = None) -> Tensor:
    """Mark the `count` elements of the whole tensor with the largest score; of equal ones, those that come first.

    The same elements are marked however the tensor is cut and on however many ranks. A threshold is found
    digit by digit from histograms of bit patterns, summed over ranks: three small reductions, and a few
    more where equal scores must be told apart by their index. Reading them waits for the device.

    Args:
        score: This rank's piece, fp32, not negative; NaN counts as larger than any number.
        count: Elements to mark in the whole, the same on all ranks.
        among: Bool like `score`: what may be marked; None is everything.
        view: Whose piece it is; None means that `score` is whole. A collective with a view.

    Returns:
        Bool like `score`.

    Raises:
        ValueError: Fewer than `count` elements may be marked.
    """
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    # -0 would be the smallest pattern.
    key = score.abs().view(torch.int32)
    if among is not None:
        key = key.masked_fill(~among, -1)
    threshold, missing, num_tied = _shrinking(key[key >= 0], count, _MAGNITUDE_BITS, view)
    above, tied = key > threshold, key == threshold
    if num_tied == missing:
        return above | tied
    index = torch.arange(score.numel(), device=score.device).view(score.shape) if view is None else view.index()
    last = (score.numel() if view is None else view.numel) - 1
    first_ones = last - index
    bound, _, _ = _shrinking(first_ones[tied], missing, max(1, last.bit_length()), view)
    return above | (tied & (first_ones >= bound))


def _shrinking(keys: Tensor, count: int, bits: int, view: View | None) -> tuple[int, int, int]:
    """Find the `count`-th largest of all ranks' `keys`, integers of [0, 2^bits).

    Returns:
        It, how many keys equal to it belong to the `count` largest, and how many there are.
    """
    found, available = 0, 0
    while bits:
        width = min(_WIDE_DIGIT_BITS, bits)
        bits -= width
        digits = (keys >> bits) & (2**width - 1)
        numbers = torch.bincount(digits, minlength=2**width)
        numbers = numbers if view is None else view.reduce(numbers, "sum")
        from_top = numbers.flip(0).cumsum(0)
        place = int((from_top < count).sum())
        if place == len(from_top):
            raise ValueError(f"{count} elements asked for, and only {int(from_top[-1])} may be taken")
        digit = len(from_top) - 1 - place
        available = int(numbers[digit])
        count -= int(from_top[place]) - available
        found |= digit << bits
        keys = keys[digits == digit]
    return found, count, available
