"""Documents are shared out so that ranks have equal work and as few are cut as that takes."""

from __future__ import annotations

import itertools
import random

import pytest

from leanmill.parallel.context_shares import MAX_TOKENS, Share, balance_of, choose_shares, part_bounds, work


def _lengths(total: int, seed: int, longest: int) -> list[int]:
    """Log-normal, as documents of real text are, together `total`."""
    generator, found = random.Random(seed), []
    while (left := total - sum(found)) > 0:
        found.append(min(int(generator.lognormvariate(5.5, 1.5)) + 1, left, longest))
    return found


@pytest.mark.parametrize(("length", "degree"), [(7, 3), (2, 4), (9, 1), (8, 8)])
def test_parts_follow_each_other(length: int, degree: int) -> None:
    bounds = [part_bounds(length, degree, index) for index in range(degree)]
    assert [place for first, end in bounds for place in range(first, end)] == list(range(length))
    sizes = [end - first for first, end in bounds]
    assert max(sizes) - min(sizes) <= 1


def test_equal_documents_stay_whole() -> None:
    shares = choose_shares([100] * 8, 4, pair_cost=1e-3)
    assert sorted(share.first_rank for share in shares) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {share.degree for share in shares} == {1}


def test_one_long_document_is_cut_into_all_parts_and_one_of_half_the_batch_into_half_of_them() -> None:
    assert choose_shares([1000], 4, pair_cost=0.0) == [Share(4, 0)]
    assert choose_shares([500, 250, 250], 4, pair_cost=0.0) == [Share(2, 0), Share(1, 2), Share(1, 3)]


def test_a_divisor_that_is_no_power_of_two() -> None:
    assert choose_shares([300, 300], 6, pair_cost=0.0) == [Share(3, 0), Share(3, 3)]


@pytest.mark.parametrize("pair_cost", [0.0, 1e-4, 1e-3])
@pytest.mark.parametrize(("num_ranks", "total"), [(2, 4000), (4, 9000), (8, 40_000), (12, 60_000)])
def test_no_rank_works_much_longer_than_the_others_or_has_many_more_tokens(
    num_ranks: int, total: int, pair_cost: float
) -> None:
    for seed in range(5):
        lengths = _lengths(total, seed, longest=total // 2)
        shares = choose_shares(lengths, num_ranks, pair_cost)
        found = balance_of(lengths, shares, num_ranks, pair_cost)
        assert found.bound < 1.15
        tokens = [0.0] * num_ranks
        for length, share in zip(lengths, shares, strict=True):
            assert share.first_rank % share.degree == num_ranks % share.degree == 0
            for rank in range(share.first_rank, share.first_rank + share.degree):
                tokens[rank] += length / share.degree
        assert max(tokens) <= (MAX_TOKENS + 0.1) * total / num_ranks
        assert found.travelling < 1 - 1 / num_ranks


def test_close_to_the_best_of_all_choices() -> None:
    pair_cost, num_ranks = 1e-3, 4
    every = [Share(degree, first) for degree in (1, 2, 4) for first in range(0, num_ranks, degree)]
    for seed in range(3):
        lengths = _lengths(6000, seed, longest=3000)[:5]
        loads = [
            max(balance_of(lengths, choice, num_ranks, pair_cost).loads)
            for choice in itertools.product(every, repeat=len(lengths))
        ]
        found = max(balance_of(lengths, choose_shares(lengths, num_ranks, pair_cost), num_ranks, pair_cost).loads)
        assert min(loads) <= found <= 1.15 * min(loads)


def test_work_counts_pairs_once() -> None:
    assert work(3, 0.5) == 3 + 0.5 * 6
