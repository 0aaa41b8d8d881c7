"""How long a run takes, worked out by hand."""

import pytest

from leanmill.core.errors import ConfigError
from leanmill.plan.duration import duration


RUN = {"flops_per_token": 2e9, "tokens_per_step": 1_000_000, "total_tokens": 50_000_000_000, "world_size": 8}


def test_from_what_a_rank_sustains():
    found = duration(**RUN, rank_tflops=400, price_per_rank_hour=2.0)
    assert found.tokens_per_second == 8 * 400e12 / 2e9
    assert found.step_seconds == pytest.approx(0.625)
    assert found.days == pytest.approx(50_000 * 0.625 / 86_400)
    assert found.rank_hours == pytest.approx(24 * 8 * found.days)
    assert found.cost == pytest.approx(2 * found.rank_hours)


def test_from_a_measured_rate():
    found = duration(**RUN, tokens_per_second=500_000)
    assert found.step_seconds == 2
    assert found.days == pytest.approx(100_000 / 86_400)
    assert found.cost is None


def test_epochs_leave_the_end_open():
    found = duration(**RUN | {"total_tokens": None}, tokens_per_second=500_000, price_per_rank_hour=1.0)
    assert (found.step_seconds, found.days, found.rank_hours, found.cost) == (2, None, None, None)


def test_without_a_rate_there_is_none_and_with_two_it_is_refused():
    assert duration(**RUN) is None
    with pytest.raises(ConfigError, match="give one of them"):
        duration(**RUN, tokens_per_second=1.0, rank_tflops=1.0)
