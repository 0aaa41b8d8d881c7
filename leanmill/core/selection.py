"""Exact selection of the largest values over all ranks, by counts instead of a gather or a sort.

`kth_largest` never waits for the device, for values of every step (losses of tokens). `largest` waits, and in
return looks at fewer elements from digit to digit: over millions of weights now and then it is 30 times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    ordered = _ordered(values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf))
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
    """Mark the `count` elements of the whole tensor with the largest score; see `largest_of_all`."""
    allowed, views = None if among is None else [among], None if view is None else [view]
    (mask,) = largest_of_all([score], count, among=allowed, views=views)
    return mask


@torch.no_grad()
def largest_of_all(
    scores: Sequence[Tensor],
    count: int,
    *,
    among: Sequence[Tensor] | None = None,
    views: Sequence[View] | None = None,
    is_signed: bool = False,
) -> list[Tensor]:
    """Mark the `count` elements of all tensors together with the largest score; of equal ones, those that come first.

    The same elements are marked however the tensors are cut and on however many ranks. A threshold is found
    digit by digit from histograms of bit patterns, summed over ranks: three small reductions a tensor, and a few
    more where equal scores must be told apart by their index. Reading them waits for the device.

    Args:
        scores: This rank's pieces, fp32, not negative; NaN counts as larger than any number.
        count: Elements to mark in the wholes, the same on all ranks.
        among: Bool like `scores`: what may be marked; None is everything.
        views: Whose pieces they are; None means that `scores` are whole. A collective with views.
        is_signed: Whether scores may be negative. Those of a NaN whose sign is set are the least then.

    Returns:
        Bool like `scores`.

    Raises:
        ValueError: Fewer than `count` elements may be marked.
    """
    if count == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    keys = [_ordered(score) if is_signed else score.abs().view(torch.int32) for score in scores]
    if among is not None:
        keys = [key.masked_fill(~allowed, -1) for key, allowed in zip(keys, among, strict=True)]
    num_bits = _MAGNITUDE_BITS + is_signed
    threshold, missing, num_tied = _shrinking([key[key >= 0] for key in keys], count, num_bits, views)
    above, tied = [key > threshold for key in keys], [key == threshold for key in keys]
    if num_tied == missing:
        return [a | t for a, t in zip(above, tied, strict=True)]
    sizes = [score.numel() if views is None else views[i].numel for i, score in enumerate(scores)]
    left, first_ones = sum(sizes), []
    for i, (score, size) in enumerate(zip(scores, sizes, strict=True)):
        flat = torch.arange(size, device=score.device).view(score.shape) if views is None else views[i].index()
        first_ones.append(left - 1 - flat)
        left -= size
    bits = max(1, (sum(sizes) - 1).bit_length())
    bound, _, _ = _shrinking([f[t] for f, t in zip(first_ones, tied, strict=True)], missing, bits, views)
    return [a | (t & (f >= bound)) for a, t, f in zip(above, tied, first_ones, strict=True)]


@torch.no_grad()
def largest_within(score: Tensor, cost: Tensor, budget: float, *, among: Tensor, view: View | None = None) -> Tensor:
    """Mark elements of the whole tensor from the largest score down, as long as their costs add up to `budget`.

    Of equal scores all are marked or none; those with the largest always are. Costs are added in fp64, so that two
    cuttings of a tensor differ only where a sum meets the budget to its last bits.

    Args:
        score: This rank's piece, fp32, not negative.
        cost: What marking takes, shaped like it, not negative.
        budget: Of the whole.
        among: Bool: what may be marked.
        view: Whose piece it is; None means that `score` is whole. A collective with a view.
    """
    keys = score.abs().view(torch.int32).masked_fill(~among, -1)
    held, costs = keys[among], cost[among].double()
    threshold, bits, spent = 0, _MAGNITUDE_BITS, 0.0
    while bits:
        width = min(_WIDE_DIGIT_BITS, bits)
        bits -= width
        digits = ((held >> bits) & (2**width - 1)).long()
        # bincount would give integers where a rank holds nothing.
        sums = costs.new_zeros(2**width).index_add_(0, digits, costs)
        from_top = spent + (sums if view is None else view.reduce(sums, "sum")).flip(0).cumsum(0)
        place = int((from_top <= budget).sum())
        if place == len(from_top):
            # All that is left, which only at the first digit is more than rounding.
            return keys >= threshold
        spent = float(from_top[place - 1]) if place else spent
        digit = 2**width - 1 - place
        threshold |= digit << bits
        held, costs = held[digits == digit], costs[digits == digit]
    top = keys.max().reshape(1) if keys.numel() else keys.new_full((1,), -1)
    top = top if view is None else view.reduce(top, "max")
    return (keys > threshold) | ((keys == top) & among)


def _ordered(score: Tensor) -> Tensor:
    """Return int64 in [0, 2^32) in the order of fp32 numbers, of which only the negative ones have it reversed."""
    bits = (score + 0.0).view(torch.int32).long()  # 0.0 joins -0.0
    return torch.where(bits < 0, -1 - bits, bits + 2**31)


def _shrinking(keys: Sequence[Tensor], count: int, bits: int, views: Sequence[View] | None) -> tuple[int, int, int]:
    """Find the `count`-th largest of all ranks' `keys`, integers of [0, 2^bits).

    Returns:
        It, how many keys equal to it belong to the `count` largest, and how many there are.
    """
    found, available = 0, 0
    while bits:
        width = min(_WIDE_DIGIT_BITS, bits)
        bits -= width
        digits = [(key >> bits) & (2**width - 1) for key in keys]
        numbers = [torch.bincount(digit, minlength=2**width) for digit in digits]
        if views is not None:
            numbers = [view.reduce(number, "sum") for view, number in zip(views, numbers, strict=True)]
        all_numbers = torch.stack(numbers).sum(0)
        from_top = all_numbers.flip(0).cumsum(0)
        place = int((from_top < count).sum())
        if place == len(from_top):
            raise ValueError(f"{count} elements asked for, and only {int(from_top[-1])} may be taken")
        digit = len(from_top) - 1 - place
        available = int(all_numbers[digit])
        count -= int(from_top[place]) - available
        found |= digit << bits
        keys = [key[agrees == digit] for key, agrees in zip(keys, digits, strict=True)]
    return found, count, available
