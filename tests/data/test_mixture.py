"""Proportions of a mixture."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.data.mixture import MixtureSchedule


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=7), st.integers(0, 9))
def test_every_prefix_has_the_right_proportions_within_a_row(weights, seed):
    schedule = MixtureSchedule(weights, seed)
    for row in range(1, 400):
        schedule.next()
        for weight, count in zip(weights, schedule.counts, strict=True):
            assert abs(count - row * weight / sum(weights)) < 1


def test_rows_of_a_source_are_numbered_without_gaps():
    schedule = MixtureSchedule([3, 1, 1], seed=0)
    rows = [schedule.next() for _ in range(50)]
    for source in range(3):
        assert [n for s, n in rows if s == source] == list(range(sum(s == source for s, _ in rows)))


@pytest.mark.parametrize("stop", [0, 1, 7, 33])
def test_counts_are_the_whole_state(stop):
    whole = MixtureSchedule([5, 2, 1], seed=1)
    expected = [whole.next() for _ in range(60)]
    resumed = MixtureSchedule([5, 2, 1], seed=1)
    for _ in range(stop):
        resumed.next()
    again = MixtureSchedule([5, 2, 1], seed=1)
    again.counts = list(resumed.counts)
    assert [again.next() for _ in range(60 - stop)] == expected[stop:]
