"""Budgets met with whole sizes."""

import pytest

from leanmill.sparse.structured.budgets import shared_out


@pytest.mark.parametrize(
    ("wanted", "most", "total", "multiple_of", "expected"),
    [
        ([2.6, 3.4, 2.0], [4, 4, 4], 8, 1, [3, 3, 2]),
        ([2.5, 2.5, 3.0], [4, 4, 4], 8, 1, [3, 2, 3]),  # of equal ones the first
        ([20.0, 40.0], [56, 56], 64, 8, [24, 40]),
        ([0.1, 7.9], [4, 4], 5, 1, [1, 4]),  # at least one, at most all
        ([3.9, 3.9], [4, 4], 5, 1, [3, 2]),  # what is wanted exceeds the budget
        ([50.0, 60.0], [60, 60], 116, 8, [56, 60]),  # all of a layer, which is no multiple
        ([3.0, 0.0], [4, 0], 3, 1, [3, 0]),  # a layer that has none
    ],
)
def test_sizes_meet_their_budget(wanted, most, total, multiple_of, expected):
    assert shared_out(wanted, most, total, multiple_of=multiple_of) == expected
