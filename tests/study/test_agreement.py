from __future__ import annotations

import numpy as np
import pytest

from leanmill.study.agreement import overlap


def test_the_same_routing_in_any_order_overlaps_whole():
    one = np.array([[0, 1], [2, 3], [1, 3]])
    found = overlap(one, one[:, ::-1], 4)
    assert found.share == 1
    assert found.by_chance < 1


def test_by_hand():
    found = overlap(np.array([[0, 1], [2, 3]]), np.array([[0, 2], [0, 1]]), 4)
    assert found.share == 1 / 4
    # Shares of tokens at each expert: (1/2, 1/2, 1/2, 1/2) and (1, 1/2, 1/2, 0).
    assert found.by_chance == pytest.approx((0.5 * 1 + 0.5 * 0.5 + 0.5 * 0.5) / 2)


def test_independent_routers_overlap_by_chance():
    draw = np.random.default_rng(0)
    # Uneven loads: chance is more than K / E.
    one, two = (draw.random((20_000, 6)) + np.linspace(0, 1, 6) for _ in range(2))
    found = overlap(*(np.argsort(-scores, axis=1)[:, :2] for scores in (one, two)), 6)
    assert found.share == pytest.approx(found.by_chance, abs=0.01)
    assert found.by_chance > 2 / 6 + 0.05


def test_dropped_choices_are_nobody_s():
    found = overlap(np.array([[0, 4], [4, 4]]), np.array([[0, 4], [4, 4]]), 4)
    assert found.share == 1
    assert overlap(np.array([[4]]), np.array([[4]]), 4).share == 0
