"""Merging low-rank factors by clustering their ranks (Zhao et al. 2024, LoRA-LEGO, arXiv:2409.16167).

A unit is what one rank of an adapter is made of: row j of A and column j of B, side by side. B A is the sum of its
units' outer products, in any order, so units of several adapters can be pooled, grouped by similarity, and each group
replaced with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


_ROUNDS = 100
_STARTS = 8


@dataclass(frozen=True)
class Factors:
    """The weight gains `scaling` x `b` x `a`."""

    a: Tensor
    """[rank, in]."""
    b: Tensor
    """[out, rank]."""
    scaling: float


def merge_factors(adapters: Sequence[Factors], rank: int, seed: int = 0) -> Factors:
    """Merge adapters of one weight into one of at most `rank`.

    A unit and its negative are the same outer product, so distances and means are taken up to sign; k-means on units as
    they stand would cancel two alike. Where adapters differ in their scaling, the first one's is used, and the others'
    B is multiplied up to it.

    Args:
        adapters: At least one; any ranks.
        rank: Groups. With no more units than that, units stay as they are.
        seed: Of the first centres.

    Returns:
        fp32 factors; each group is its mean with the mean length of its members, and the scaling is multiplied by
        sqrt(mean rank of the adapters / rank), which keeps the variance of what is added.
    """
    scaling, num_in = adapters[0].scaling, adapters[0].a.shape[1]
    units = torch.cat([torch.cat([one.a.float(), one.b.float().t() * (one.scaling / scaling)], 1) for one in adapters])
    mean_rank = len(units) / len(adapters)
    if len(units) > rank:
        group, sign = cluster(units, rank, seed)
        units = _means(units, group, sign, rank)
    return Factors(units[:, :num_in], units[:, num_in:].t(), scaling * (mean_rank / len(units)) ** 0.5)


def cluster(units: Tensor, num_groups: int, seed: int) -> tuple[Tensor, Tensor]:
    """Group lines by k-means up to sign, the best of some starts.

    Args:
        units: [N, D] fp32, more than `num_groups`.
        num_groups: None of them stays empty.
        seed: Of the first centres.

    Returns:
        Group of each unit, int64 [N], and its sign against the group's centre, [N].
    """
    generator = torch.Generator().manual_seed(seed)
    found = [_lloyd(units, _first_centres(units, num_groups, generator)) for _ in range(_STARTS)]
    return min(found, key=lambda one: one[0])[1:]


def _first_centres(units: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre is a unit, drawn by its squared distance to those there are."""
    first = torch.randint(len(units), (), generator=generator)
    centres = units[first].unsqueeze(0)
    while len(centres) < num_groups:
        nearest = _distances(units, centres).amin(1)
        shares = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        centres = torch.cat([centres, units[torch.multinomial(shares, 1, generator=generator)]])
    return centres


def _lloyd(units: Tensor, centres: Tensor) -> tuple[float, Tensor, Tensor]:
    group = torch.full((len(units),), -1)
    for _ in range(_ROUNDS):
        distances = _distances(units, centres)
        nearest, new = distances.min(1)
        new = _without_empty(new, nearest, len(centres))
        if torch.equal(new, group):
            break
        group = new
        sign = _signs(units, centres, group)
        centres = torch.zeros_like(centres).index_add_(0, group, units * sign.unsqueeze(1))
        centres /= group.bincount(minlength=len(centres)).unsqueeze(1)
    spread = _distances(units, centres).gather(1, group.unsqueeze(1)).sum()
    return float(spread), group, _signs(units, centres, group)


def _without_empty(group: Tensor, nearest: Tensor, num_groups: int) -> Tensor:
    """Give each empty group the unit that lies farthest from its own centre among those that are not alone."""
    group = group.clone()
    for empty in range(num_groups):
        sizes = group.bincount(minlength=num_groups)
        if sizes[empty] == 0:
            may_go = torch.where(sizes[group] > 1, nearest, -1.0)
            taken = may_go.argmax()
            group[taken], nearest[taken] = empty, 0.0
    return group


def _distances(units: Tensor, centres: Tensor) -> Tensor:
    """Squared distance [N, K] of each unit to the nearer of each centre and its negative."""
    squares = units.square().sum(1, keepdim=True) + centres.square().sum(1)
    return (squares - 2 * (units @ centres.t()).abs()).clamp_(min=0)


def _signs(units: Tensor, centres: Tensor, group: Tensor) -> Tensor:
    return torch.where((units * centres[group]).sum(1) < 0, -1.0, 1.0)


def _means(units: Tensor, group: Tensor, sign: Tensor, num_groups: int) -> Tensor:
    """The mean of each group, as long as its members are on average: means of vectors are shorter."""
    sizes = group.bincount(minlength=num_groups).unsqueeze(1)
    mean = torch.zeros(num_groups, units.shape[1]).index_add_(0, group, units * sign.unsqueeze(1)) / sizes
    length = torch.zeros(num_groups, 1).index_add_(0, group, units.norm(dim=1, keepdim=True)) / sizes
    return mean * (length / mean.norm(dim=1, keepdim=True).clamp(min=torch.finfo(mean.dtype).tiny))
