"""Lengths in steps and as a share of the run."""

import pytest

from leanmill.core.lengths import steps_of


@pytest.mark.parametrize(
    ("given", "num_steps", "at_least", "expected"),
    [(7, 3, 0, 7), (0, 3, 1, 0), (0.25, 8, 0, 2), (0.02, 10, 0, 0), (0.02, 10, 1, 1), (0.0, 10, 1, 0)],
)
def test_by_hand(given, num_steps, at_least, expected):
    assert steps_of(given, num_steps, at_least=at_least) == expected
