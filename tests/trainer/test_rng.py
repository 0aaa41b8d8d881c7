"""Randomness derived from (seed, step, rank)."""

import random

import numpy as np
import torch

from leanmill.trainer.rng import seed_step


def _draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_same_step_draws_the_same_numbers_whatever_came_before() -> None:
    seed_step(3, 10, 1)
    first = _draw()
    _draw()
    seed_step(3, 10, 1)
    assert _draw() == first


def test_seed_step_and_rank_each_change_every_generator() -> None:
    draws = []
    for arguments in [(3, 10, 1), (4, 10, 1), (3, 11, 1), (3, 10, 2), (31, 0, 1)]:
        seed_step(*arguments)
        draws.append(_draw())
    for generator in range(3):
        assert len({draw[generator] for draw in draws}) == len(draws)
