from __future__ import annotations

import numpy as np
import pytest

from leanmill.study.positions import dropped_by_capacity, rate_by_position
from leanmill.study.routed import Routed


def routed(experts: np.ndarray, num_experts: int, is_real: np.ndarray | None = None) -> Routed:
    real = np.ones(experts.shape[:2], dtype=bool) if is_real is None else is_real
    return Routed(
        tokens=np.zeros(experts.shape[:2], dtype=np.int64), experts=experts, is_real=real, num_experts=num_experts
    )


def by_hand(one: Routed, factor: float) -> np.ndarray:
    rows, length, top_k = one.experts.shape
    capacity = -(-int(round(factor * top_k * length * 1e6)) // int(one.num_experts * 1e6))
    dropped = np.zeros(one.experts.shape, dtype=bool)
    for row in range(rows):
        taken = [0] * one.num_experts
        for token in range(length):
            for choice in range(top_k):
                expert = one.experts[row, token, choice]
                if expert == one.num_experts or not one.is_real[row, token]:
                    continue
                dropped[row, token, choice] = taken[expert] >= capacity
                taken[expert] += 1
    return dropped


def test_experts_take_the_first_that_come():
    draw = np.random.default_rng(0)
    experts = np.sort(draw.integers(0, 6, (5, 24, 2)), axis=1)  # 5 of 5 may also have been dropped already
    is_real = draw.random((5, 24)) < 0.8
    for factor in (0.5, 1.0, 1.25):
        one = routed(experts, 5, is_real)
        np.testing.assert_array_equal(dropped_by_capacity(one, factor), by_hand(one, factor))


def test_a_collapsed_router_drops_the_end_of_the_row():
    one = routed(np.zeros((3, 16, 1), dtype=np.int64), 4)
    rates = rate_by_position(dropped_by_capacity(one, 1.0), one.is_real, 4)
    assert rates == [0, 1, 1, 1]  # 4 of 16 fit


def test_a_router_in_turns_drops_nothing():
    one = routed(np.broadcast_to(np.arange(16)[:, None] % 4, (3, 16, 1)).copy(), 4)
    assert not dropped_by_capacity(one, 1.0).any()


def test_rates_are_of_real_choices():
    is_dropped = np.zeros((2, 8, 2), dtype=bool)
    is_dropped[0, 4:, 0] = True
    is_real = np.ones((2, 8), dtype=bool)
    is_real[1, 4:] = False
    is_dropped[1, 6] = True  # padding
    assert rate_by_position(is_dropped, is_real, 2) == [0, 0.5]
    assert rate_by_position(is_dropped, is_real & False, 2) == [0, 0]


@pytest.mark.parametrize("length", [1, 5])
def test_rows_shorter_than_the_stretches(length):
    is_dropped = np.ones((1, length, 1), dtype=bool)
    assert rate_by_position(is_dropped, np.ones((1, length), dtype=bool), 16) == [1] * length
