"""Which ranks of a context-parallel group compute which documents of a micro-batch. Imports no torch.

Cutting every row into equal parts makes every token travel in attention, though most documents of real text fit one
rank. Here a document stays on one rank where that leaves ranks equal work, and is cut into no more parts than balance
takes: sequence-parallel degrees are mixed within a micro-batch as in FlexSP (Wang et al. 2024, arXiv:2412.01523), and
shards follow the data as in ByteScale (Ge et al. 2025, arXiv:2502.21231). Both solve for groups of whole sequences (an
integer program; a heuristic); this is a greedy rule over documents, longest first, which is enough where many short
ones are there to fill gaps with. `bound` says how far from the best a choice is at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


SLACK = 1.05
"""A document is cut further only where it would take a rank this far above its equal share of the work."""
MAX_TOKENS = 1.25
"""Tokens of a rank, of its equal share, that are exceeded only where nothing else is possible: they are its memory."""


@dataclass(frozen=True)
class Share:
    """Who computes a document: ranks [`first_rank`, `first_rank` + `degree`) of the group, a part each."""

    degree: int
    first_rank: int


def part_bounds(length: int, degree: int, index: int) -> tuple[int, int]:
    """Return the places [first, end) of part `index` of a document cut into `degree`, as equal as whole tokens are."""
    base, more = divmod(length, degree)
    first = index * base + min(index, more)
    return first, first + base + (index < more)


def work(length: int, pair_cost: float) -> float:
    """Return what a document costs in tokens: its own, and `pair_cost` for each pair of a token and one it sees."""
    return length + pair_cost * length * (length + 1) / 2


def choose_shares(lengths: Sequence[int], num_ranks: int, pair_cost: float) -> list[Share]:
    """Share documents out, the same on all ranks that ask with the same lengths.

    Args:
        lengths: Tokens of each document.
        num_ranks: Of the group; a document is cut into a divisor of it, for ranks that begin at a multiple of that.
        pair_cost: See `work`.
    """
    degrees = [degree for degree in range(1, num_ranks + 1) if num_ranks % degree == 0]
    loads, tokens = np.zeros(num_ranks), np.zeros(num_ranks)
    most_work = SLACK * sum(work(length, pair_cost) for length in lengths) / num_ranks
    most_tokens = MAX_TOKENS * sum(lengths) / num_ranks
    shares: dict[int, Share] = {}
    for document in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length, cost = lengths[document], work(lengths[document], pair_cost)
        found: list[tuple[bool, float, Share]] = []
        for degree in degrees:
            is_full = np.greater(tokens + -(-length // degree), most_tokens)
            found.append(_lightest(loads, is_full, degree, cost / degree))
            has_no_room, load, share = found[-1]
            if load <= most_work and not has_no_room:
                break
        else:
            share = min(found, key=lambda one: one[:2])[2]
        ranks = slice(share.first_rank, share.first_rank + share.degree)
        loads[ranks] += cost / share.degree
        tokens[ranks] += length / share.degree
        shares[document] = share
    return [shares[document] for document in range(len(lengths))]


def _lightest(
    loads: NDArray[np.float64], full: NDArray[np.bool_], degree: int, cost: float
) -> tuple[bool, float, Share]:
    """Return the neighbours that would end lowest with a document cut among them, of those that are not full if any.

    Returns:
        Whether they are full, the work of the last of them with `cost` more, and the share.
    """
    highest = loads.reshape(-1, degree).max(1)
    is_full: NDArray[np.bool_] = np.logical_or.reduce(full.reshape(-1, degree), axis=1)
    block = int(np.lexsort((highest, is_full))[0])
    return bool(is_full[block]), float(highest[block] + cost), Share(degree, block * degree)


@dataclass(frozen=True)
class Balance:
    """What sharing a micro-batch out comes to."""

    loads: tuple[float, ...]
    """Work of each rank, in tokens; see `work`."""
    travelling: float
    """Of its tokens, the share whose keys, values and queries leave their rank, on average over ranks that cut them."""

    @property
    def idle(self) -> float:
        """Share of all ranks' time that they wait for the last one."""
        return 1.0 - sum(self.loads) / (len(self.loads) * max(self.loads))

    @property
    def bound(self) -> float:
        """The last rank's work over the least that any way of cutting can come to."""
        return max(self.loads) * len(self.loads) / sum(self.loads)


def balance_of(lengths: Sequence[int], shares: Sequence[Share], num_ranks: int, pair_cost: float) -> Balance:
    """Return what `choose_shares` came to."""
    loads = np.zeros(num_ranks)
    travelling = 0.0
    for length, share in zip(lengths, shares, strict=True):
        loads[share.first_rank : share.first_rank + share.degree] += work(length, pair_cost) / share.degree
        travelling += length * (share.degree - 1) / share.degree
    return Balance(tuple(loads.tolist()), travelling / sum(lengths))
