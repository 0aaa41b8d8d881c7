"""Schedules against values worked out by hand."""

import math

import pytest
from pydantic import ValidationError

from leanmill.optim.config import ScheduleConfig
from leanmill.optim.schedules import decays, lr_factor, warmup_steps


def _curve(num_steps: int, **settings: object) -> list[float]:
    config = ScheduleConfig(**settings)  # type: ignore[arg-type]
    return [lr_factor(config, step, num_steps) for step in range(num_steps)]


def test_cosine_by_hand() -> None:
    curve = _curve(9, type="cosine", warmup_steps=4, min_factor=0.2)
    # W = 4, N - 1 - W = 4: p = 0, 1/4, 1/2, 3/4, 1.
    half_root = math.sqrt(2) / 2
    expected = [0.2, 0.4, 0.6, 0.8, 1.0, 0.2 + 0.4 * (1 + half_root), 0.6, 0.2 + 0.4 * (1 - half_root), 0.2]
    assert curve == pytest.approx(expected, abs=1e-12)


def test_linear_by_hand() -> None:
    curve = _curve(7, type="linear", warmup_steps=2, min_factor=0.0)
    assert curve == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25, 0.0], abs=1e-12)


def test_constant_by_hand() -> None:
    assert _curve(4, type="constant", warmup_steps=1) == [0.5, 1.0, 1.0, 1.0]


def test_wsd_by_hand() -> None:
    curve = _curve(10, type="wsd", warmup_steps=1, decay_fraction=0.4, min_factor=0.2)
    # D = 4: q = 0 at step 5, then 1/4 .. 1.
    assert curve == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], abs=1e-12)


def test_infinite_by_hand() -> None:
    curve = _curve(
        11, type="infinite", warmup_steps=1, cooldown_fraction=0.364, constant_factor=0.4, decay_fraction=0.182,
        min_factor=0.1,
    )  # fmt: skip
    # Cooldown over 4 steps from step 1, anneal over the last 2: 0.4 * 0.25^q.
    half_root = math.sqrt(2) / 2
    cooldown = [1.0, 0.4 + 0.3 * (1 + half_root), 0.7, 0.4 + 0.3 * (1 - half_root), 0.4]
    assert curve == pytest.approx([0.5, *cooldown, 0.4, 0.4, 0.4, 0.2, 0.1], abs=1e-12)


def test_a_lower_peak_in_the_second_half_by_hand() -> None:
    curve = _curve(9, type="linear", warmup_steps=0, min_factor=0.0, drop_at=0.5, drop_factor=0.5)
    # Linear to 0 over 8 steps; from step round(0.5 * 9) = 4 on half of that.
    assert curve == pytest.approx([1, 7 / 8, 6 / 8, 5 / 8, 2 / 8, 1.5 / 8, 1 / 8, 0.5 / 8, 0], abs=1e-12)
    assert _curve(4, type="constant", warmup_steps=0, drop_at=0.5) == pytest.approx([1, 1, 2 / 3, 2 / 3])


def test_weight_decay_ends_where_asked() -> None:
    assert [decays(ScheduleConfig(weight_decay_until=0.67), step, 6) for step in range(6)] == [True] * 4 + [False] * 2
    assert all(decays(ScheduleConfig(), step, 6) for step in range(6))


def test_the_constant_phase_of_infinite_does_not_know_how_the_run_ends() -> None:
    short = _curve(1000, type="infinite", warmup_steps=10, cooldown_fraction=0.2, decay_fraction=0.1)
    assert set(short[300:800]) == {0.4}


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "infinite", "constant"])
@pytest.mark.parametrize("num_steps", [1000, 1733])
def test_continuous_bounded_and_never_rising_after_warmup(kind: str, num_steps: int) -> None:
    curve = _curve(num_steps, type=kind, warmup_steps=0.1)
    warmup = warmup_steps(ScheduleConfig(warmup_steps=0.1), num_steps)
    assert max(abs(b - a) for a, b in zip(curve, curve[1:], strict=False)) <= 1.001 / warmup
    assert all(a < b for a, b in zip(curve[:warmup], curve[1 : warmup + 1], strict=False))
    assert all(a >= b for a, b in zip(curve[warmup:], curve[warmup + 1 :], strict=False))
    assert curve[warmup] == 1.0
    assert curve[-1] == pytest.approx(1.0 if kind == "constant" else 0.1, abs=1e-12)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "infinite", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0, 2, 5])
def test_tiny_runs_stay_in_range(kind: str, num_steps: int, warmup: int) -> None:
    assert all(0 < factor <= 1 for factor in _curve(num_steps, type=kind, warmup_steps=warmup))


def test_warmup_in_steps_and_as_a_share() -> None:
    assert warmup_steps(ScheduleConfig(warmup_steps=7), 1000) == 7
    assert warmup_steps(ScheduleConfig(warmup_steps=0.02), 1000) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 1.5}, "below 1"),
        ({"type": "infinite", "min_factor": 0.0}, "above 0"),
        ({"type": "infinite", "min_factor": 0.5, "constant_factor": 0.4}, "at most"),
        ({"type": "infinite", "cooldown_fraction": 0.7, "decay_fraction": 0.4}, "at most 1"),
        ({"drop_factor": 0.5}, r"set schedule\.drop_at"),
        ({"drop_at": 1.0}, "less than 1"),
        ({"weight_decay_until": 1.5}, "less than 1"),
    ],
)
def test_impossible_schedules_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**settings)  # type: ignore[arg-type]
