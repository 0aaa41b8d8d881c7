from __future__ import annotations

import math

import pytest

from leanmill.report.page.scale import fit, smooth, thin


@pytest.mark.parametrize("values", [[], [3.0], [0.0], [-2.0, -2.0], [0.0, 0.0], [1e-9, 2e-9], [1.0, 1e6], [-5.0, 5.0]])
@pytest.mark.parametrize("options", [{}, {"from_zero": True}, {"allow_log": True}])
def test_every_series_has_a_scale_that_holds_it(values: list[float], options: dict[str, bool]) -> None:
    scale = fit(values, **options)
    assert scale.high > scale.low
    assert all(0 <= scale(value) <= 1 for value in values)
    ticks = scale.ticks()
    assert ticks
    assert all(-1e-9 <= scale(tick) <= 1 + 1e-9 for tick in ticks)
    assert len(ticks) <= 12


def test_ticks_are_round() -> None:
    assert fit([0.0, 1.0], from_zero=True).ticks() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert fit([1.0, 1000.0], allow_log=True).ticks() == [1.0, 10.0, 100.0, 1000.0]


def test_logarithm_is_for_wide_positive_values_only() -> None:
    assert fit([0.1, 100.0], allow_log=True).log
    assert not fit([0.0, 100.0], allow_log=True).log
    assert not fit([1.0, 2.0], allow_log=True).log


def test_zero_stays_on_the_axis_where_asked() -> None:
    assert fit([5.0, 9.0], from_zero=True).low == 0.0
    assert fit([5.0, 9.0]).low > 4.0


def test_thinning_keeps_spikes_and_the_end() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[8765] = (8765.0, -3.0)
    kept = thin(points, 200)
    assert len(kept) <= 201
    assert {(4321.0, 99.0), (8765.0, -3.0), points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert thin(points[:5], 200) == points[:5]


def test_smoothing_is_the_weighted_mean_it_says() -> None:
    values = [math.sin(step) + step / 10 for step in range(120)]
    smoothed = smooth([(float(step), value) for step, value in enumerate(values)])
    decay = 1 - 2 / (120 / 50 + 1)
    for place in (0, 7, 119):
        weights = [decay ** abs(place - step) for step in range(120)]
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert smoothed[place] == (float(place), pytest.approx(expected))


def test_smoothing_leaves_a_line_straight_in_the_middle() -> None:
    smoothed = smooth([(float(step), 3.0 * step) for step in range(200)])
    assert smoothed[100][1] == pytest.approx(300.0, rel=1e-6)
