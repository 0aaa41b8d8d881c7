"""N:M masks of the pieces of a weight that ranks hold, also where a piece cuts through a group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from leanmill.core.views import Box, Span, View
from leanmill.kernels.nm_mask.op import nm_mask


class PieceMasks:
    """Masks the N largest of every M neighbours of a weight, as far as a rank holds it.

    Groups are neighbours in the flattened weight, and so are the four rows of a band of tiles. What lies whole on a
    rank is masked there; the others, two at most where a piece is all in a row, are put together by a reduction.
    Which those are does not change in a run, and is found once.

    Args:
        transposable: Two of every row and column of each 4 x 4 tile instead.
    """

    def __init__(self, *, transposable: bool = False) -> None:
        self.transposable = transposable
        self._cut: dict[tuple[str, int, tuple[_Range, ...]], Tensor] = {}

    def of(self, weight: View, num_kept: int, group_size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the mask of a view's value, bool of its shape. A collective.

        Args:
            weight: Its groups must not reach over the end of a row.
            num_kept: N.
            group_size: M.
            dtype: Which the value is rounded to first, as a forward rounds it; None leaves it.
        """
        value = weight.value.detach().flatten()
        value = value if dtype is None else value.to(dtype)
        width = weight.piece.shape[-1]
        unit = 4 * width if self.transposable else group_size
        make = self._make(width, num_kept, group_size)
        mask, ranges, first = torch.zeros_like(value, dtype=torch.bool), _ranges(weight.piece), 0
        for start, stop in ranges:
            here = slice(first + -start % unit, first + stop - start - stop % unit)
            if here.start < here.stop:
                mask[here] = make(value[here])
            first += stop - start
        cut = self._cut_units(weight, ranges, unit)
        if len(cut):
            places = (cut.unsqueeze(1) * unit + torch.arange(unit, device=cut.device)).flatten()
            local, is_here = _found(places, ranges)
            values = value.new_zeros(len(places))
            values[is_here] = value[local[is_here]]
            # Each entry lies on one rank, so the sum is that entry.
            mask[local[is_here]] = make(weight.reduce(values, "sum"))[is_here]
        return mask.view(weight.value.shape)

    def _make(self, width: int, num_kept: int, group_size: int) -> Callable[[Tensor], Tensor]:
        if self.transposable:
            return lambda flat: nm_mask(flat.view(-1, width), transposable=True).flatten()
        return partial(nm_mask, num_kept=num_kept, group_size=group_size)

    def _cut_units(self, weight: View, ranges: tuple[_Range, ...], unit: int) -> Tensor:
        key = (weight.name, unit, ranges)
        if key not in self._cut:
            is_cut = torch.zeros(weight.numel // unit, dtype=torch.uint8, device=weight.value.device)
            is_cut[[edge // unit for edges in ranges for edge in edges if edge % unit]] = 1
            self._cut[key] = weight.reduce(is_cut, "max").nonzero().flatten()
        return self._cut[key]


_Range = tuple[int, int]
"""Start and stop in the flattened weight."""


def _ranges(piece: Box | Span) -> tuple[_Range, ...]:
    """What of the flattened weight a piece is, in the order of its elements; none is empty."""
    if isinstance(piece, Span):
        return ((piece.start, piece.stop),) if piece.start < piece.stop else ()
    if 0 in piece.sizes:
        return ()
    last = max((dim for dim, size in enumerate(piece.shape) if piece.sizes[dim] != size), default=0)
    strides = [math.prod(piece.shape[dim + 1 :]) for dim in range(len(piece.shape))]
    start = sum(offset * stride for offset, stride in zip(piece.offsets, strides, strict=True))
    firsts = (
        start + sum(i * stride for i, stride in zip(at, strides[:last], strict=True))
        for at in itertools.product(*map(range, piece.sizes[:last]))
    )
    return tuple((first, first + piece.sizes[last] * strides[last]) for first in firsts)


def _found(places: Tensor, ranges: tuple[_Range, ...]) -> tuple[Tensor, Tensor]:
    """Return where in a piece of these ranges each of `places` lies, and whether it does."""
    if not ranges:
        return places, torch.zeros_like(places, dtype=torch.bool)
    starts, stops = places.new_tensor(ranges).unbind(1)
    sizes = stops - starts
    which = (torch.searchsorted(starts, places, right=True) - 1).clamp(min=0)
    inside = places - starts[which]
    return (sizes.cumsum(0) - sizes)[which] + inside, (inside >= 0) & (inside < sizes[which])
