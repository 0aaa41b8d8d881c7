"""Selecting the largest by counting digits, against sorting."""

import math

import pytest
import torch

from leanmill.core.selection import distinct_keys, kth_largest


AWKWARD = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0000001]


def test_keys_have_the_order_of_values_and_then_of_the_index():
    values = torch.tensor(AWKWARD + AWKWARD)
    keys = distinct_keys(values, torch.arange(len(values)))
    by_key = keys.argsort(descending=True).tolist()
    by_value = sorted(range(len(values)), key=lambda i: (-values[i].item(), i))
    assert by_key == by_value
    assert keys.unique().numel() == len(values)
    assert keys.min() > 0


def test_what_is_no_number_comes_first():
    keys = distinct_keys(torch.tensor([1.0, math.nan, 3e38]), torch.arange(3))
    assert keys.argmax() == 1


def test_an_index_beyond_31_bits_still_tells_neighbours_apart():
    index = 2**40 - 2 + torch.arange(4)
    assert distinct_keys(torch.zeros(4), index).unique().numel() == 4


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (1000,)])
def test_the_kth_largest_is_that_of_a_sort(shape):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(2**62, shape, generator=generator)
    keys.view(-1)[::3] >>= 40  # long runs of equal leading digits
    for k in {1, keys.numel() // 2 + 1, keys.numel()}:
        expected = keys.flatten().sort(descending=True).values[k - 1]
        assert kth_largest(keys, torch.tensor(k)) == expected


def test_ranks_find_the_kth_largest_of_all_from_counts():
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randint(2**62, (n,), generator=generator) for n in (5, 0, 11)]
    whole, k = torch.cat(parts), torch.tensor(6)
    seen = []
    kth_largest(whole, k, lambda counts: (seen.append(counts), counts)[1])
    shares = [[] for _ in parts]
    for part, share in zip(parts, shares, strict=True):
        everyone = iter(seen)  # what a sum over ranks would give each of them
        found = kth_largest(part, k, lambda counts, s=share, e=everyone: (s.append(counts), next(e))[1])
        assert found == whole.sort(descending=True).values[k - 1]
    assert all(torch.equal(sum(s[:257] for s in step), total) for *step, total in zip(*shares, seen, strict=True))
