"""Owners follow the load and stay balanced in number; a rank fetches the experts that cost least."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from leanmill.parallel.fssdp_placement import (
    Prices,
    choose_owners,
    contiguous_owners,
    fewest_bytes,
    imbalance,
    loaded,
)


@pytest.mark.parametrize(("num_experts", "num_ranks", "num_layers"), [(8, 4, 3), (10, 4, 3), (3, 8, 5), (64, 8, 1)])
def test_ranks_own_as_many_experts_to_within_one(num_experts: int, num_ranks: int, num_layers: int) -> None:
    loads = torch.rand(num_layers, num_experts, generator=torch.Generator().manual_seed(0)).tolist()
    owned = [0] * num_ranks
    for so_far, owners in enumerate(choose_owners(loads, num_ranks), start=1):
        for owner in owners:
            owned[owner] += 1
        assert max(owned) - min(owned) <= 1, f"after {so_far} layers"


def test_hot_experts_are_apart_and_beside_cold_ones() -> None:
    loads = [[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]
    assert choose_owners(loads, 4) == [[0, 1, 2, 3, 3, 2, 1, 0]]
    assert imbalance(loads, choose_owners(loads, 4), 4) == 1.0
    assert imbalance(loads, [contiguous_owners(8, 4)], 4) == 4 * 15 / 36


def test_contiguous_owners_are_those_of_a_sharded_dim() -> None:
    for num_experts, num_ranks in itertools.product((1, 5, 8, 10), (2, 3, 4, 8)):
        parts = torch.arange(num_experts).chunk(num_ranks)
        assert contiguous_owners(num_experts, num_ranks) == [r for r, part in enumerate(parts) for _ in part]


def bytes_of(index: Tensor, owners: Tensor, rank: int, copied: Tensor, prices: Prices) -> float:
    """Written out: each token sends a row to each other rank that owns one of its experts that is no copy here."""
    rows = 0
    for token in index.tolist():
        rows += len({int(owners[e]) for e in token if e < len(owners) and not copied[e]} - {rank})
    return rows * prices.row + int(copied.sum()) * prices.expert


@pytest.mark.parametrize("price", [0.5, 3.0, 9.0, 1e9])
@pytest.mark.parametrize("seed", range(6))
def test_no_number_of_an_owners_most_loaded_experts_costs_less(price: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_experts, rank = 9, seed % 3
    weights = 1 / torch.arange(1, num_experts + 1)[torch.randperm(num_experts, generator=generator)]
    index = torch.multinomial(weights.expand(20, -1), 3, generator=generator)
    index[torch.rand(index.shape, generator=generator) < 0.1] = num_experts
    owners = torch.randint(3, (num_experts,), generator=generator)
    prices = Prices(row=1.0, expert=price)
    chosen = fewest_bytes(index, owners, rank, prices)
    assert not chosen[owners == rank].any()
    counts = index.flatten().bincount(minlength=num_experts + 1)[:num_experts]
    best = 0.0
    for owner in {0, 1, 2} - {rank}:
        theirs = sorted(torch.nonzero(owners == owner).flatten().tolist(), key=lambda e: (-counts[e], e))
        found = []
        for number in range(len(theirs) + 1):
            copied = owners != owner  # tokens for other owners are not counted here
            copied[theirs[:number]] = True
            found.append(bytes_of(index, owners, rank, copied, prices) - int((owners != owner).sum()) * price)
        best += min(found)
    assert bytes_of(index, owners, rank, chosen, prices) == pytest.approx(best)
    assert bytes_of(index, owners, rank, chosen, prices) <= bytes_of(index, owners, rank, owners < 0, prices)


def test_without_tokens_nothing_is_fetched_and_all_that_is_loaded_where_that_is_asked() -> None:
    owners = torch.tensor([0, 0, 1, 1])
    nothing = torch.empty(0, 2, dtype=torch.int64)
    prices = Prices(row=1.0, expert=0.1)
    assert not fewest_bytes(nothing, owners, 0, prices).any()
    assert not loaded(nothing, owners, 0).any()
    index = torch.tensor([[0, 3], [4, 3]])  # one copy is dropped
    assert loaded(index, owners, 0).tolist() == [False, False, False, True]
    assert loaded(index, owners, 1).tolist() == [True, False, False, False]


def test_prices_are_those_of_the_guide() -> None:
    """Two rows there and two back, weights, experts' numbers and their gradients; three times an expert's weights."""
    sizes = {"hidden_size": 10, "top_k": 2, "parameters_per_expert": 60, "bytes_per_value": 2, "bytes_per_weight": 4}
    assert Prices.of(**sizes, rematerialise=True) == Prices(row=80 + 24, expert=360)  # type: ignore[arg-type]
    assert Prices.of(**sizes, rematerialise=False).expert == 240  # type: ignore[arg-type]


def test_frozen_experts_cost_their_weights_once():
    sizes = {"hidden_size": 8, "top_k": 2, "parameters_per_expert": 100, "bytes_per_value": 2, "bytes_per_weight": 4}
    costs = [
        Prices.of(**sizes, rematerialise=again, trains=trains).expert
        for trains in (False, True)
        for again in (False, True)
    ]
    assert costs == [200, 200, 400, 600]
