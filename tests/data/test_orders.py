"""Shuffles: bijections, the same for ever, and without a table for long ranges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.data.orders import Shuffle, _mixed, _splitmix64, permutation


GOLDEN = [7, 0, 3, 1, 4, 9, 5, 8, 6, 2]
BILLION = [81502196, 152151039, 678908439]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(-3, 1 << 70), st.integers(0, 1 << 41))
def test_a_computed_shuffle_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    shuffle = Shuffle(size, seed, epoch, table_size=0)
    assert sorted(shuffle[index] for index in range(size)) == list(range(size))


def test_a_short_one_is_the_table_it_always_was() -> None:
    shuffle = Shuffle(100, 3, 1)
    assert [shuffle[index] for index in range(100)] == permutation(100, 3, 1).tolist()


def test_no_version_may_change_a_computed_one() -> None:
    shuffle = Shuffle(10, 1234, 3, table_size=0)
    assert [shuffle[index] for index in range(10)] == GOLDEN
    billion = Shuffle(10**9, 1234, 3)
    assert [billion[index] for index in (0, 1, 10**9 - 1)] == BILLION


def test_numbers_are_mixed_as_arrays_are() -> None:
    values = [0, 1, 1 << 40, (1 << 64) - 1]
    with np.errstate(over="ignore"):
        assert [_mixed(value) for value in values] == _splitmix64(np.array(values, dtype=np.uint64)).tolist()


def test_it_looks_random() -> None:
    size = 1 << 16
    shuffle = Shuffle(size, 5, 0, table_size=0)
    found = np.array([shuffle[index] for index in range(4000)])
    # Uniform (chi-squared of 16 cells: mean 15, deviation 5.5), and neighbours have nothing to do with each other.
    counts = np.bincount(found // (size // 16), minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 45
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.06
    other = np.array([Shuffle(size, 6, 0, table_size=0)[index] for index in range(4000)])
    assert (found == other).mean() < 0.002


@pytest.mark.parametrize("size", [10**9, 10**12])
def test_a_long_range_costs_no_memory_and_no_start(size: int) -> None:
    shuffle = Shuffle(size, 0, 0)
    assert shuffle._table is None
    found = {shuffle[index] for index in range(size - 200, size)}
    assert len(found) == 200
    assert all(0 <= value < size for value in found)
