"""Progressive Gradient Flow's schedules against the paper's tables and formulas."""

import math

import pytest

from leanmill.sparse.schedule import GrowingSparsity, Interval, MaskDecay, Masking, StructureDecay, geometric, stepwise


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ((1, 8), [7, 4, 2, 1]),
        ((2, 4), [3, 2]),
        ((1, 4), [3, 2, 1]),
        ((1, 16), [15, 8, 4, 2, 1]),
        ((1, 32), [31, 16, 8, 4, 2, 1]),
        ((3, 8), [7, 4, 3]),
        ((7, 8), [7]),
        ((1, 2), [1]),
        ((1, 6), [5, 3, 1]),
    ],
)
def test_stepwise_stages(pattern, kept):
    assert stepwise(*pattern) == tuple((n, pattern[1]) for n in kept)


def test_geometric_stages():
    assert geometric(1, 8, 4) == ((8, 64), (4, 32), (2, 16), (1, 8))
    assert geometric(2, 4, 2) == ((4, 8), (2, 4))


@pytest.mark.parametrize("form", ["linear", "exponential"])
def test_mask_decay_is_the_papers(form):
    num_steps, dense, fine_tune, beta = 200, 20, 40, 0.004
    interval = Interval(begin=dense / num_steps, end=1 - fine_tune / num_steps)
    rate = beta * (num_steps - dense - fine_tune)
    schedule = MaskDecay(num_kept=1, group_size=8, interval=interval, form=form, rate=rate)
    for step in range(num_steps):
        since = step - dense
        expected = max(0.0, 1 - beta * since) if form == "linear" else math.exp(-beta * since)
        if since < 0:
            expected = 1.0
        elif step >= num_steps - fine_tune:
            expected = 0.0
        assert schedule.at(step, num_steps) == Masking(1, 8, pytest.approx(expected, abs=1e-12))


def test_structure_decay_splits_the_interval_evenly():
    schedule = StructureDecay(stages=stepwise(1, 8), interval=Interval(begin=0.1, end=0.9))
    found = [schedule.at(step, 100) for step in range(100)]
    assert all(masking.left == 1 for masking in found[:10])
    assert [masking[:2] for masking in found[10:90]] == [(n, 8) for n in (7, 4, 2, 1) for _ in range(20)]
    assert set(found[90:]) == {Masking(1, 8, 0.0)}
    assert all(masking.left == 0 for masking in found[10:])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7])
def test_the_last_step_has_the_plain_mask_however_short_the_run(num_steps):
    interval = Interval(begin=0.0, end=1.0)
    for schedule in (
        MaskDecay(num_kept=1, group_size=4, interval=interval, form="exponential", rate=1.0),
        StructureDecay(stages=stepwise(1, 4), interval=interval),
    ):
        assert schedule.at(num_steps - 1, num_steps) == Masking(1, 4, 0.0)


def test_geometric_growth_leaves_the_same_share_each_time_as_anytime_progressive_pruning_does():
    # Its code prunes at the start of each of 8 parts of the data, down to 0.8^level, levels from 1 to 4.5.
    levels = [1 + 3.5 * part / 7 for part in range(8)]
    num_steps, every = 400, 50
    schedule = GrowingSparsity(
        initial=1 - 0.8,
        final=1 - 0.8**4.5,
        interval=Interval(begin=0.0, end=7 / 8),
        every_steps=every,
        growth="geometric",
    )
    due = [step for step in range(num_steps) if schedule.is_due(step, num_steps)]
    assert due == [every * part for part in range(8)]
    assert [schedule.sparsity(step, num_steps) for step in due] == pytest.approx([1 - 0.8**level for level in levels])
