"""Which rank owns an expert, and which ranks hold a copy of it for one micro-batch. No communication.

Owners keep an expert's weights and optimizer state; they are chosen from recent loads, rarely. Copies live
for one micro-batch, and each rank chooses its own from the tokens that it has.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


Owners = list[int]
"""The owning rank of each expert of a layer."""


@dataclass(frozen=True)
class Prices:
    """Bytes that one rank's choice puts on the wires in a training micro-batch, whoever sends them."""

    row: float
    """Of a token that travels to another rank, there and back, with its gradients."""
    expert: float
    """Of a copy of an expert: its weights, again for backward where they are not kept, and their gradient."""

    @classmethod
    def of(
        cls,
        *,
        hidden_size: int,
        top_k: int,
        parameters_per_expert: int,
        bytes_per_value: int,
        bytes_per_weight: int,
        rematerialise: bool,
        trains: bool = True,
    ) -> Prices:
        """Return what travels in training without recomputed blocks.

        Args:
            hidden_size: Values of a token.
            top_k: Experts of a token.
            parameters_per_expert: Of all its matrices.
            bytes_per_value: Of the dtype that is computed in.
            bytes_per_weight: Of a combine weight.
            rematerialise: Whether copies are dropped after forward and fetched again for backward.
            trains: Whether experts get gradients; frozen ones are fetched once, and kept for backward.
        """
        return cls(
            row=4 * hidden_size * bytes_per_value + top_k * (2 * bytes_per_weight + 4),
            expert=(1 + trains * (1 + rematerialise)) * parameters_per_expert * bytes_per_value,
        )


def contiguous_owners(num_experts: int, num_ranks: int) -> Owners:
    """Return the owners that a DTensor sharded along dim 0 has: the next experts to each rank, the last ranks fewer."""
    each = -(-num_experts // num_ranks)
    return [expert // each for expert in range(num_experts)]


def choose_owners(loads: Sequence[Sequence[float]], num_ranks: int) -> list[Owners]:
    """Choose owners of the experts of all layers, from what the experts of each are to be balanced by.

    In each layer the next most loaded expert goes to a rank with the fewest experts so far, over all layers; among
    those to the one with the least load in this layer. So ranks own the same number of experts in all, to within
    one, however few a layer has, and hot experts of a layer lie on different ranks.

    Args:
        loads: Of each expert of each layer.
        num_ranks: Ranks to own them.
    """
    counts, totals = [0] * num_ranks, [0.0] * num_ranks
    chosen: list[Owners] = []
    for layer in loads:
        owners = [0] * len(layer)
        queue = [(counts[rank], 0.0, totals[rank], rank) for rank in range(num_ranks)]
        heapq.heapify(queue)
        for expert in sorted(range(len(layer)), key=lambda one: (-layer[one], one)):
            count, load, total, rank = heapq.heappop(queue)
            owners[expert] = rank
            counts[rank], totals[rank] = count + 1, total + layer[expert]
            heapq.heappush(queue, (counts[rank], load + layer[expert], totals[rank], rank))
        chosen.append(owners)
    return chosen


def imbalance(loads: Sequence[Sequence[float]], owners: Sequence[Owners], num_ranks: int) -> float:
    """Return the most loaded rank's load over the mean, layers weighted by their load; 1 where there is none."""
    most = total = 0.0
    for layer, owned in zip(loads, owners, strict=True):
        by_rank = [0.0] * num_ranks
        for load, owner in zip(layer, owned, strict=True):
            by_rank[owner] += load
        most, total = most + max(by_rank), total + sum(by_rank)
    return most * num_ranks / total if total else 1.0


def loaded(top_k_index: Tensor, owners: Tensor, rank: int) -> Tensor:
    """Return which experts `rank` has tokens for and does not own, bool [E].

    Args:
        top_k_index: [T, K] int64; the number of experts stands for a dropped copy.
        owners: [E] int64.
        rank: That has the tokens.
    """
    return (_counts(top_k_index.flatten(), len(owners)) > 0) & (owners != rank)


def fewest_bytes(top_k_index: Tensor, owners: Tensor, rank: int, prices: Prices) -> Tensor:
    """Return which experts `rank` copies so that least travels between it and each owner, bool [E].

    A token travels once to an owner however many of its experts lie there, so a copy of one of them alone may save
    nothing. Of each owner the most loaded experts are copied, as many of them as cost least: a token stays where all
    its experts of that owner are copied. None is copied where rows cost less, so never more travels than without.

    Args:
        top_k_index: [T, K] int64; the number of experts stands for a dropped copy.
        owners: [E] int64.
        rank: That has the tokens.
        prices: Bytes of a row and of an expert.
    """
    num_experts = len(owners)
    counts = _counts(top_k_index.flatten(), num_experts)
    # Experts by owner, and by falling count within.
    order = torch.argsort(owners * (top_k_index.numel() + 1) - counts, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(num_experts, device=order.device))
    rows = _counts(_coldest(top_k_index, owners, place), num_experts)[order]
    owner = owners[order]
    first = torch.searchsorted(owner, owner)  # where each expert's owner begins
    before = rows.cumsum(0) - rows
    per_owner = torch.zeros_like(rows).scatter_add_(0, first, rows)[first]
    copied = torch.arange(num_experts, device=order.device) - first
    kept = per_owner - (before - before[first])
    cost = copied.double() * prices.expert + kept.double() * prices.row  # of the experts before this one being copied
    # Copying all of an owner's comes last: its cost has no place of its own.
    size = torch.zeros_like(rows).scatter_add_(0, first, torch.ones_like(rows))[first]
    best = torch.full_like(cost, torch.inf).scatter_reduce_(0, first, cost, "amin")[first]
    all_cost = size.double() * prices.expert
    number = torch.where(cost <= best, copied, num_experts)
    fewest = torch.full_like(number, num_experts).scatter_reduce_(0, first, number, "amin")[first]
    chosen = torch.where(all_cost < best, size, fewest)
    wanted = (copied < chosen) & (owner != rank)
    return torch.zeros_like(wanted).scatter_(0, order, wanted)


def _coldest(top_k_index: Tensor, owners: Tensor, place: Tensor) -> Tensor:
    """Return, once a token and owner, the last of the token's experts there by `place`; "dropped" for other copies."""
    num_experts = len(owners)
    nobody, late = owners.new_full((1,), -1), place.new_full((1,), -1)
    owner, at = torch.cat([owners, nobody])[top_k_index], torch.cat([place, late])[top_k_index]
    same = owner.unsqueeze(2) == owner.unsqueeze(1)
    is_last = at.unsqueeze(2) >= torch.where(same, at.unsqueeze(1), -1)
    # Of two copies of one expert, the first.
    is_repeated = (top_k_index.unsqueeze(2) == top_k_index.unsqueeze(1)).tril(-1).any(2)
    return top_k_index.masked_fill(~is_last.all(2) | is_repeated, num_experts).flatten()


def _counts(index: Tensor, num_experts: int) -> Tensor:
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, index, torch.ones_like(index))[:num_experts]
