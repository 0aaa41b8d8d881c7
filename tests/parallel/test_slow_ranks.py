"""A rank that is slower than the others is named, with the phase it is slow in; ranks that only wait are not."""

import logging
import time

import pytest
import torch
import torch.distributed as dist

from leanmill.parallel import flight
from leanmill.parallel.collectives import max_over_ranks
from leanmill.parallel.pulse import Pulse
from leanmill.parallel.slow_ranks import LOOKS, PHASES, SlowRanks, own_seconds
from tests.distributed import run_ranks


def test_own_time_is_what_lies_between_the_end_of_one_collective_and_the_next():
    # This rank asks at 1, 3, 6; the last of all ranks at 2, 5, 6. So it has its own 1, then 2 to 3, then 5 to 6.
    assert own_seconds([1.0, 3.0, 6.0], [2.0, 5.0, 6.0], 5.5, waits_between=True) == (2.0, 1.0)
    # The one that the others wait for has all of its time to itself.
    assert own_seconds([2.0, 5.0, 6.0], [2.0, 5.0, 6.0], 5.5, waits_between=True) == (5.0, 1.0)


def test_reductions_beside_backward_are_waited_for_at_its_end():
    found = own_seconds([1.0, 2.0, 3.0, 5.0], [1.5, 3.0, 4.5, 5.0], 4.6, waits_between=False)
    assert found == (3.0, 0.5)


def _steps(slow_in, slow_rank=1, number=LOOKS + 2, waits_between=True):
    """Steps with three collectives; one rank takes longer in one phase. Returns what each rank logged and found."""

    def body():
        rank, lines = dist.get_rank(), []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger("leanmill.parallel.slow_ranks").addHandler(handler)
        pulse = Pulse()
        slow = SlowRanks(
            pulse=pulse, rank=rank, world_size=3, factor=1.5, waits_between=waits_between, every_seconds=0.0
        )

        def work(phase):
            more = 0.1 if phase == PHASES[1] else 0.3  # the one comes three times
            time.sleep(0.02 + (more if phase == slow_in and rank == slow_rank else 0.0))

        for step in range(1, number + 3):
            pulse.enter(PHASES[0], step)
            work(PHASES[0])
            dist.all_reduce(torch.ones(1))
            pulse.enter(PHASES[1])
            for _ in range(3):
                work(PHASES[1])
                dist.all_reduce(torch.ones(1000))
            pulse.enter(PHASES[2])
            work(PHASES[2])
            slow.arrive()
            dist.all_reduce(torch.ones(1))
            slow.hear(max_over_ranks(torch.tensor(slow.told(), dtype=torch.float64)).tolist(), step)
        return lines, slow.found

    flight.start_recorder(is_dumped=False)
    return run_ranks(body, 3)


@pytest.mark.parametrize(
    "phase",
    [PHASES[1], pytest.param(PHASES[0], marks=pytest.mark.slow), pytest.param(PHASES[2], marks=pytest.mark.slow)],
)
def test_a_slow_rank_names_itself_and_where(phase):
    found = _steps(phase)
    assert [len(lines) > 0 for lines, _ in found] == [False, True, False]
    line = found[1][0][0]
    assert line.startswith("rank 1 (")
    assert f"most of that in {phase}" in line
    # All ranks know who, though each waits as long in total.
    assert all(known["rank"] == 1 and known["times_the_median"] > 1.5 for _, known in found)


@pytest.mark.slow
def test_equal_ranks_name_nobody():
    assert all(not lines for lines, _ in _steps("none of them"))


def test_ranks_that_take_different_ways_are_not_compared(monkeypatch):
    pulse = Pulse()
    slow = SlowRanks(pulse=pulse, rank=0, world_size=2, factor=1.5, every_seconds=0.0)
    monkeypatch.setattr(flight, "recorded", dict)
    slow.arrive()
    slow.hear([1.0], 1)
    pulse.enter(PHASES[0], 2)
    pulse.enter(PHASES[1])
    slow.arrive()
    message = slow.told()
    message[1] += 1  # another rank has asked for one collective more
    slow.hear(message, 2)
    assert slow.told()[1:] == slow.told()[1:]
    assert not slow.found
