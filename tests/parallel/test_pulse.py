"""Ranks tell what they do, and one of those that wait names who does not come."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from leanmill.parallel import flight, shared_errors
from leanmill.parallel.flight import Standing
from leanmill.parallel.pulse import Pulse, PulseWatch


@pytest.fixture(autouse=True)
def _no_hang_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_errors, "_known_of_hang", str)


def test_the_waiting_rank_names_the_other_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    where = {0: 5, 1: 4}
    store, pulses = dist.HashStore(), [Pulse(), Pulse()]
    watches = [
        PulseWatch(pulse, store, rank=rank, world_size=2, hang_seconds=0.06, folder=tmp_path / "hang", then="; ends")
        for rank, pulse in enumerate(pulses)
    ]

    def beat(rank: int) -> None:
        one = Standing(number=where[rank], operation="all_reduce", sizes=((4,),), is_done=where[rank] == 4)
        monkeypatch.setattr(flight, "standings", lambda: {"all ranks": one})
        watches[rank]._beat_once()

    pulses[1].enter("reading data", 57)
    beat(1)
    beat(0)
    assert not caplog.records  # nothing has stood still for long
    watches[0]._moved = watches[0].pulse.since = time.monotonic() - 1
    with caplog.at_level(logging.WARNING):
        beat(0)
        beat(0)
    (told,) = [record.getMessage() for record in caplog.records]
    # The other one has told nothing meanwhile.
    assert "1 rank waits in all_reduce [4] (number 5) of all ranks; rank 1 (" in told
    assert "is silent" in told
    assert "last heard in reading data of step 57" in told
    assert told.endswith(f"{tmp_path}/hang; ends")
    beat(1)
    assert {path.name for path in (tmp_path / "hang").iterdir()} == {
        f"rank-{rank}.{what}" for rank in range(2) for what in ("stacks.txt", "flight.json")
    }
    assert "test_pulse.py" in (tmp_path / "hang" / "rank-1.stacks.txt").read_text()
    shared_errors.ask_of_hangs(watches[1].known)
    lost = shared_errors.lost_rank(RuntimeError("Timed out waiting 300000ms for recv"))
    assert "(Timed out waiting): 1 rank waits in all_reduce [4]" in str(lost)


def test_a_phase_that_may_wait_for_long_is_given_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits = Standing(number=5, operation="all_reduce", sizes=((4,),), is_done=False)
    monkeypatch.setattr(flight, "standings", lambda: {"workers": waits})
    watch = PulseWatch(Pulse(), dist.HashStore(), rank=0, world_size=2, hang_seconds=0.06, folder=tmp_path / "hang")
    watch.pulse.enter("exchange between workers", patience_seconds=1000)
    for phase_seconds, is_told in ((100, False), (2000, True)):
        watch._moved = watch.pulse.since = time.monotonic() - phase_seconds
        with caplog.at_level(logging.WARNING):
            watch._beat_once()
        assert bool(caplog.records) == is_told
    watch.pulse.enter("reading data")
    assert watch.pulse.patience_seconds == 0


def test_a_rank_that_waits_for_nobody_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done = Standing(number=5, operation="all_reduce", sizes=((4,),), is_done=True)
    monkeypatch.setattr(flight, "standings", lambda: {"all ranks": done})
    watch = PulseWatch(Pulse(), dist.HashStore(), rank=0, world_size=2, hang_seconds=0.06, folder=tmp_path / "hang")
    watch._moved = watch.pulse.since = time.monotonic() - 100
    watch._beat_once()
    assert not caplog.records
    assert not (tmp_path / "hang").exists()


def test_collectives_that_go_on_within_a_phase_are_a_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch = PulseWatch(Pulse(), dist.HashStore(), rank=0, world_size=2, hang_seconds=0.06, folder=tmp_path / "hang")
    watch._moved = watch.pulse.since = time.monotonic() - 100
    for number in (1, 2):
        one = Standing(number=number, operation="all_reduce", sizes=((4,),), is_done=number == 1)
        monkeypatch.setattr(flight, "standings", lambda one=one: {"all ranks": one})
        watch._beat_once()
    assert not caplog.records


def test_a_store_that_does_not_answer_is_known_from(tmp_path: Path) -> None:
    watch = PulseWatch(Pulse(), dist.HashStore(), rank=1, world_size=2, hang_seconds=1, folder=tmp_path / "hang")
    assert watch.known() == ""
    watch._asked = time.monotonic() - 30
    assert watch.known() == "the machine where the ranks met, rank 0's or torchrun's first, has not answered for 30 s"
    watch._beat_once()
    assert watch.known() == ""


def test_a_full_disk_does_not_end_the_watch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "hang").write_text("a file where the folder should be")
    PulseWatch(Pulse(), dist.HashStore(), rank=0, world_size=2, hang_seconds=1, folder=tmp_path / "hang")._write()
    assert "could not be written" in caplog.text


@pytest.mark.slow
def test_three_ranks_late_frozen_and_on_another_branch(tmp_path: Path) -> None:
    script = Path(__file__).with_name("hanging.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False)
    told = [line for line in done.stdout.splitlines() if line.startswith("nothing has moved")]
    assert len(told) == 3, done.stdout + done.stderr
    late, frozen, other = told
    assert "2 ranks wait in all_reduce [3] (number 2) of all ranks; rank 2 (" in late
    assert "is not there: it is in reading data of step 57" in late
    assert "2 ranks wait in all_reduce [4] (number 3) of all ranks; rank 1 (" in frozen
    assert "is silent" in frozen
    assert "2 ranks wait in all_reduce [5] (number 4) of all ranks; rank 1 (" in other
    assert "took another branch: it is in broadcast [5] (number 4) in its checkpoint of step 58" in other
    for rank in range(3):
        assert json.loads((tmp_path / f"rank-{rank}.flight.json").read_text())["entries"]
        assert "hanging.py" in (tmp_path / f"rank-{rank}.stacks.txt").read_text()
