"""LoRA-LEGO on factors: the paper's formula, written out, and what merging must leave as it is."""

from __future__ import annotations

import itertools

import pytest
import torch

from leanmill.peft_ext.lego.units import Factors, cluster, merge_factors


OUT, IN = 7, 5


def factors(rank: int, seed: int, scaling: float = 2.0, dtype: torch.dtype = torch.float32) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator)
    return Factors(a.to(dtype), b.to(dtype), scaling)


def product(one: Factors) -> torch.Tensor:
    return one.scaling * one.b.float() @ one.a.float()


def best_grouping(units: torch.Tensor, num_groups: int) -> tuple[float, list[list[int]], torch.Tensor]:
    """The least sum of squared distances to means over all groupings and signs, by trying them."""
    best = (float("inf"), [[0]], units)
    for group in itertools.product(range(num_groups), repeat=len(units)):
        if len(set(group)) < num_groups:
            continue
        for sign in itertools.product((1.0, -1.0), repeat=len(units) - 1):
            signed = units * torch.tensor([1.0, *sign]).unsqueeze(1)
            members = [[i for i in range(len(units)) if group[i] == k] for k in range(num_groups)]
            spread = sum(float((signed[m] - signed[m].mean(0)).square().sum()) for m in members)
            if spread < best[0] - 1e-6:
                best = (spread, members, signed)
    return best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_are_means_with_mean_length_and_the_sum_keeps_its_variance(dtype: torch.dtype):
    """u = [a; b]; groups by k-means; centre x mean ||u|| / ||centre||; scaled by sqrt(r / k)."""
    one, two = factors(3, 1, dtype=dtype), factors(2, 2, dtype=dtype)
    merged = merge_factors([one, two], 2)
    units = torch.cat([torch.cat([f.a.float(), f.b.float().T], 1) for f in (one, two)])
    _, members, signed = best_grouping(units, 2)
    expected = torch.zeros(OUT, IN)
    for group in members:
        centre = signed[group].mean(0)
        unit = centre / centre.norm() * signed[group].norm(dim=1).mean()
        expected += torch.outer(unit[IN:], unit[:IN])
    torch.testing.assert_close(product(merged), 2.0 * (2.5 / 2) ** 0.5 * expected, rtol=1e-4, atol=1e-5)
    assert merged.a.dtype == torch.float32
    assert len(merged.a) == 2


def test_one_adapter_and_its_copies_merge_to_itself():
    one = factors(4, 3)
    order, sign = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -1.0, -1.0, 1.0])
    turned = Factors(one.a[order] * sign.unsqueeze(1), one.b[:, order] * sign, 2.0)
    torch.testing.assert_close(product(merge_factors([one], 4)), product(one))
    torch.testing.assert_close(product(merge_factors([one, turned, one], 4)), product(one), rtol=1e-4, atol=1e-5)


def test_room_for_all_is_the_sum_scaled_down():
    one, two = factors(2, 4), factors(2, 5, scaling=6.0)
    merged = merge_factors([one, two], 4)
    torch.testing.assert_close(product(merged), 0.5**0.5 * (product(one) + product(two)), rtol=1e-4, atol=1e-5)


def test_an_untrained_adapter_and_equal_units_are_no_trouble():
    none = Factors(torch.zeros(3, IN), torch.zeros(OUT, 3), 2.0)
    merged = merge_factors([none, none], 3)
    assert product(merged).isfinite().all()
    assert product(merged).count_nonzero() == 0
    group, _ = cluster(torch.ones(6, 4), 3, seed=0)
    assert group.unique().numel() == 3


def test_the_same_seed_gives_the_same_and_the_global_generator_is_left_alone():
    adapters = [factors(8, seed) for seed in range(4)]
    state = torch.random.get_rng_state()
    first, again = merge_factors(adapters, 5, seed=1), merge_factors(adapters, 5, seed=1)
    assert torch.equal(first.a, again.a)
    assert torch.equal(torch.random.get_rng_state(), state)
