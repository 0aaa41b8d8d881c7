"""A run ends when most of its steps are skipped, and not for a few bad batches."""

import pytest

from leanmill.trainer.skipping import SkipWatch


def follow(skipped, every=1, first=0):
    """Return the step after which a run that skips where `skipped(step)` ends, None where it does not."""
    watch, count = SkipWatch(first, 0), 0
    for step in range(first + 1, first + 1001):
        count += skipped(step)
        if step % every == 0 and watch.is_stuck(step, count):
            return step
    return None


@pytest.mark.parametrize("every", [1, 7, 20, 100, 400])
def test_a_run_that_skips_everything_ends_at_the_first_record_after_a_window(every):
    assert follow(lambda step: True, every) == -(-100 // every) * every


@pytest.mark.parametrize("every", [1, 7, 20, 100])
def test_trouble_that_begins_late_is_seen_within_two_windows(every):
    end = follow(lambda step: step > 500, every)
    assert end is not None
    assert 550 < end <= 500 + 51 + 2 * every


def test_a_run_that_skips_half_goes_on():
    assert follow(lambda step: step % 2 == 0) is None
    assert follow(lambda step: step < 30) is None


def test_the_window_begins_where_a_run_is_resumed():
    assert follow(lambda step: True, first=730) == 830
