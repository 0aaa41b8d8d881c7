"""Choices under budgets beside all of them."""

import itertools

import numpy as np
import pytest

from leanmill.core.program import cheapest_choices


@pytest.mark.parametrize("seed", range(4))
def test_choices_are_the_cheapest_of_all_that_keep_to_the_budgets(seed):
    generator = np.random.default_rng(seed)
    cost = np.sort(generator.random((5, 3)))[:, ::-1] * 1e-9  # more bits, less error
    taken, most = generator.random((5, 1)) * np.array([2.0, 3.0, 4.0]), 7.0
    special = np.tile([0.0, 1.0, 0.0], (5, 1))

    def sums(table, choices):
        return sum(table[row, choice] for row, choice in enumerate(choices))

    allowed = [
        choices
        for choices in itertools.product(range(3), repeat=5)
        if sums(taken, choices) <= most and sums(special, choices) >= 1
    ]
    found = cheapest_choices(cost, [(taken, 0, most), (special, 1, np.inf)])
    assert sums(cost, found) == pytest.approx(min(sums(cost, choices) for choices in allowed), rel=1e-6)


def test_nothing_is_chosen_where_nothing_fits():
    assert cheapest_choices(np.ones((2, 2)), [(np.ones((2, 2)), 0, 1)]) is None
