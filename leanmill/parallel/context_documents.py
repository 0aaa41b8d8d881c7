"""Attention of ranks that have whole documents and parts of longer ones, document by document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.core.documents import places_seen
from leanmill.parallel.context_exchange import all_places, heads_for_rows, rows_for_heads
from leanmill.parallel.context_plan import repeats
from leanmill.parallel.context_shares import part_bounds


Groups = Mapping[int, dist.ProcessGroup]
"""Of each degree above 1 that documents may be cut into, the ranks that share those which this rank has a part of."""


@dataclass(frozen=True)
class Cut:
    """The documents that a group of ranks shares, of which this rank has part `index` each.

    To travel, parts are padded: parts of a document differ by a token. What is padded is one zero at the end.
    """

    lengths: tuple[int, ...]
    """Tokens of each whole document."""
    degree: int
    index: int
    device: torch.device
    widths: tuple[int, ...] = field(init=False)
    """Tokens of each part, with padding."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(-(-length // self.degree) for length in self.lengths))

    def bounds(self, index: int) -> list[tuple[int, int]]:
        """Return the places [first, end) that rank `index` has of each document."""
        return [part_bounds(length, self.degree, index) for length in self.lengths]

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank has of them."""
        return sum(end - first for first, end in self.bounds(self.index))

    def own_to_padded(self) -> Tensor:
        """Return for each padded place the own token there, or the zero's place [P] int64."""
        index = torch.full((sum(self.widths),), self.num_tokens, dtype=torch.int64)
        index[self._padded_places(self.index)] = torch.arange(self.num_tokens)
        return index.to(self.device)

    def padded_to_own(self) -> Tensor:
        """Return for each own token its padded place [T] int64."""
        return self._padded_places(self.index).to(self.device)

    def all_to_whole(self) -> Tensor:
        """Return for each place of whole documents where it is among the padded parts of all ranks [sum of lengths]."""
        size = sum(self.widths)
        places = [(self._padded_places(rank) + rank * size).split(self._sizes(rank)) for rank in range(self.degree)]
        return torch.cat([part for document in zip(*places, strict=True) for part in document]).to(self.device)

    def whole_to_all(self) -> Tensor:
        """Return the reverse of `all_to_whole`, with the zero's place for padding [degree P] int64."""
        whole = self.all_to_whole()
        index = torch.full((self.degree * sum(self.widths),), len(whole), dtype=torch.int64, device=self.device)
        index[whole] = torch.arange(len(whole), device=self.device)
        return index

    def _sizes(self, index: int) -> list[int]:
        return [end - first for first, end in self.bounds(index)]

    def _padded_places(self, index: int) -> Tensor:
        begins, at = [], 0
        for width, size in zip(self.widths, self._sizes(index), strict=True):
            begins.append(torch.arange(at, at + size))
            at += width
        return torch.cat(begins)


class DocumentAttention:
    """Attention to documents that are whole here, and to those that some ranks of the group share.

    Args:
        groups: See `Groups`.
        kind: How ranks that share a document come to keys and values, see `layout.cp_attention`.
    """

    def __init__(self, groups: Groups, kind: Literal["ulysses", "all_gather"]) -> None:
        self._groups, self._kind = groups, kind
        self._parts: Tensor | None = None
        self._cuts: list[_Level] = []

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, parts: Tensor, window: int | None, scaling: float | None
    ) -> Tensor:
        """Return what was attended to [1, H, T, Dv].

        Args:
            query: [1, H, T, D], this rank's documents and parts, one after the other.
            key: [1, G, T, D]; G divides H.
            value: [1, G, T, Dv].
            parts: [number of them, 2] int64: the ranks that share it, 1 of what is whole, and its whole length; the
                most shared ones first. The same tensor in all layers.
            window: Places that a token sees, itself among them; None for its document up to itself.
            scaling: Of the products.
        """
        if self._parts is not parts:
            self._parts, self._cuts = parts, self._levels(parts, query.device)
        sizes = [level.cut.num_tokens for level in self._cuts]
        queries, keys, values = (tensor.split(sizes, 2) for tensor in (query, key, value))
        found = [
            self._attend(level, q, k, v, window, scaling)
            for level, q, k, v in zip(self._cuts, queries, keys, values, strict=True)
        ]
        return torch.cat(found, 2)

    def _levels(self, parts: Tensor, device: torch.device) -> list[_Level]:
        lengths: dict[int, list[int]] = {}
        for degree, length in parts.tolist():
            lengths.setdefault(degree, []).append(length)
        return [
            _Level(Cut(tuple(of_degree), degree, self._groups[degree].rank() if degree > 1 else 0, device))
            for degree, of_degree in lengths.items()
        ]

    def _attend(
        self, level: _Level, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float | None
    ) -> Tensor:
        cut = level.cut
        if cut.degree == 1:
            whole = [(0, length) for length in cut.lengths]
            return _attend_documents((query, key, value), cut.lengths, whole, window, scaling)
        group = self._groups[cut.degree]
        if self._kind == "all_gather":
            key, value = (
                all_places(_taken(tensor, level.own_to_padded), group).index_select(2, level.all_to_whole)
                for tensor in (key, value)
            )
            return _attend_documents((query, key, value), cut.lengths, cut.bounds(cut.index), window, scaling)
        copies = repeats(query.shape[1], key.shape[1], cut.degree)
        key, value = (tensor.repeat_interleave(copies, 1) for tensor in (key, value))
        query, key, value = (
            heads_for_rows(_taken(tensor, level.own_to_padded), group).index_select(2, level.all_to_whole)
            for tensor in (query, key, value)
        )
        whole = [(0, length) for length in cut.lengths]
        found = _attend_documents((query, key, value), cut.lengths, whole, window, scaling)
        return rows_for_heads(_taken(found, level.whole_to_all), group).index_select(2, level.padded_to_own)


class _Level:
    """Documents of one degree with the orders that they travel in, which all layers share."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        if cut.degree > 1:
            self.own_to_padded, self.padded_to_own = cut.own_to_padded(), cut.padded_to_own()
            self.all_to_whole, self.whole_to_all = cut.all_to_whole(), cut.whole_to_all()


def _taken(tensor: Tensor, index: Tensor) -> Tensor:
    """Return places of [1, H, T, D] in another order; place T is zero."""
    return F.pad(tensor, (0, 0, 0, 1)).index_select(2, index)


def _attend_documents(
    operands: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[int, ...],
    bounds: list[tuple[int, int]],
    window: int | None,
    scaling: float | None,
) -> Tensor:
    """Attend with queries of the places `bounds` of each document to its keys, [1, H, T, Dv]."""
    query, key, value = operands
    copies = query.shape[1] // key.shape[1]
    queries = query.split([end - first for first, end in bounds], 2)
    found = []
    for one, k, v, (first, end) in zip(queries, key.split(lengths, 2), value.split(lengths, 2), bounds, strict=True):
        if first == end:
            # Its gradient is still what other ranks wait for.
            found.append(v[:, :, :0].repeat_interleave(copies, 1) + k[:, :, :0].sum())
            continue
        begin = 0 if window is None else max(0, first - window + 1)
        k, v = (tensor[:, :, begin:end].repeat_interleave(copies, 1) for tensor in (k, v))
        mask = places_seen(first - begin, end - begin, window, one.device)
        found.append(F.scaled_dot_product_attention(one, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling))
    return torch.cat(found, 2)
