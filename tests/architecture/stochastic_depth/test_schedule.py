from __future__ import annotations

import math

import pytest

from leanmill.architecture.stochastic_depth.schedule import (
    exit_scales,
    exit_weights,
    is_exit,
    layer_factor,
    time_factor,
)


@pytest.mark.parametrize("num_layers", [2, 7, 32])
def test_rates_are_those_of_the_papers(num_layers):
    for layer in range(num_layers):
        expected = math.exp(layer * math.log(2) / (num_layers - 1)) - 1
        assert layer_factor(layer, num_layers, "exponential") == pytest.approx(expected)
        # Stochastic depth numbers blocks from 1 and gives the survival rate 1 - l / L (1 - p_L).
        survival = 1 - (layer + 1) / num_layers * (1 - 0.5)
        assert 0.5 * layer_factor(layer, num_layers, "linear") == pytest.approx(1 - survival)
        assert layer_factor(layer, num_layers, "uniform") == 1
    assert time_factor(0, num_layers, "exponential") == 0
    assert time_factor(num_layers - 1, num_layers, "exponential") == 1
    assert time_factor(1, num_layers, "constant") == 1


def test_one_layer_and_one_step_have_the_whole_rate():
    assert layer_factor(0, 1, "exponential") == time_factor(0, 1, "exponential") == 1
    assert exit_weights(1, 0, 1, scale=0.2, curriculum="all", rotation=1) == [1.0]


@pytest.mark.parametrize(("num_layers", "scale"), [(2, 1.0), (8, 0.2), (32, 0.1)])
def test_scales_of_exits(num_layers, scale):
    expected = [scale * sum(range(layer + 1)) for layer in range(num_layers - 1)]
    expected.append(num_layers - 1 + scale * sum(range(num_layers - 1)))
    assert exit_scales(num_layers, scale) == pytest.approx(expected)


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "all"])
def test_weights_add_up_to_one_and_keep_the_proportions_of_their_scales(curriculum):
    scales = exit_scales(9, 0.2)
    for step in range(30):
        weights = exit_weights(9, step, 30, scale=0.2, curriculum=curriculum, rotation=4)
        assert sum(weights) == pytest.approx(1)
        assert weights[-1] > 0
        for weight, scale in zip(weights, scales, strict=True):
            assert weight == 0 or weight / weights[-1] == pytest.approx(scale / scales[-1])


def test_rotation_moves_on_by_a_block_a_step_and_comes_back():
    on = [[is_exit(layer, 9, step, 100, "rotational", 4) for layer in range(8)] for step in range(5)]
    assert [[layer for layer in range(8) if row[layer]] for row in on] == [[0, 4], [1, 5], [2, 6], [3, 7], [0, 4]]
    assert all(is_exit(8, 9, step, 100, "rotational", 4) for step in range(5))


def test_gradual_adds_a_block_every_2l_th_of_the_run_from_the_last():
    num_layers, num_steps = 5, 40  # a block every 4 steps
    for step in range(num_steps):
        on = [layer for layer in range(num_layers - 1) if is_exit(layer, num_layers, step, num_steps, "gradual", 1)]
        assert on == list(range(max(0, num_layers - step // 4), num_layers - 1)), step
