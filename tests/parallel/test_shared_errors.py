"""Ranks that fail alike tell it once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from leanmill.core.errors import RunError
from leanmill.parallel import shared_errors
from leanmill.parallel.shared_errors import is_mine_to_tell, leave_when_told, linger, lost_rank, write_error_file


ROOT = Path(__file__).parents[2]


def _tellers(monkeypatch: pytest.MonkeyPatch, messages: dict[int, str], world_size: int = 3) -> list[int]:
    """The ranks that would print, where rank r fails with messages[r]."""
    store, local = dist.HashStore(), threading.local()

    class OfThread:
        def __getattr__(self, name: str) -> object:
            return getattr(local.ranks, name)

    monkeypatch.setattr(shared_errors, "_ranks", OfThread())
    tellers: list[int] = []

    def fail(rank: int, message: str) -> None:
        local.ranks = shared_errors._Ranks(store, rank, world_size)
        if is_mine_to_tell(message):
            tellers.append(rank)
            linger(message)

    threads = [threading.Thread(target=fail, args=item) for item in messages.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(tellers)


def test_rank_0_tells_what_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    assert _tellers(monkeypatch, {2: "batch", 1: "batch", 0: "batch"}) == [0]
    assert time.monotonic() - started < shared_errors.LINGER_SECONDS, "all heard, nobody need wait"


def test_what_rank_0_has_not_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(_tellers(monkeypatch, {1: "disk", 2: "disk"})) == 1


def test_different_errors_are_all_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _tellers(monkeypatch, {0: "disk", 1: "batch"}) == [0, 1]


def test_without_ranks_or_with_a_dead_store_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dead:
        def check(self, *_: object) -> bool:
            raise dist.DistNetworkError("gone")

        add = set = check

    monkeypatch.setattr(shared_errors, "_ranks", None)
    assert is_mine_to_tell("x")
    monkeypatch.setattr(shared_errors, "_ranks", shared_errors._Ranks(Dead(), 1, 2))
    assert is_mine_to_tell("x")
    linger("x")


GLOO = "[.../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:2468: Connection reset by peer. GLHF!"


def test_a_failed_collective_says_that_a_rank_is_lost() -> None:
    lost = lost_rank(RuntimeError(GLOO))
    assert "another rank ended or hangs (Connection reset by peer)" in str(lost)
    assert lost_rank(RuntimeError("shapes differ")) is None
    assert lost_rank(RunError(GLOO)) is None, "somebody has explained it already"


def test_what_follows_from_an_error_is_not_told_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store, lost = dist.HashStore(), lost_rank(RuntimeError(GLOO))
    assert lost is not None
    monkeypatch.setattr(shared_errors, "CAUSE_SECONDS", 0.1)
    monkeypatch.setattr(shared_errors, "LINGER_SECONDS", 0.1)
    monkeypatch.setattr(shared_errors, "_ranks", shared_errors._Ranks(store, 1, 2))
    assert not shared_errors.is_told_by_its_cause(lost), "nobody has told anything: killed, perhaps"
    linger("disk full")
    assert shared_errors.is_told_by_its_cause(lost)
    assert not shared_errors.is_told_by_its_cause(RunError("of its own"))


def test_torchrun_reads_the_error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    write_error_file("error: too big")
    assert "traceback : error: too big" in str(ChildFailedError("x", {0: ProcessFailure(0, 1, 2, str(path))}))
    assert json.loads(path.read_text())["message"]["message"] == "error: too big"


@pytest.mark.parametrize(("environment", "code"), [({"LOCAL_RANK": "1"}, 0), ({"LOCAL_RANK": "0"}, 2)])
def test_a_silent_rank_leaves_with_0_when_torchrun_tells_it(environment: dict[str, str], code: int) -> None:
    script = (
        "import os; from leanmill.parallel.shared_errors import leave_when_told\n"
        "import signal, threading\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "leave_when_told(seconds=20); os._exit(2)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x", **environment}
    assert subprocess.run([sys.executable, "-c", script], env=env, check=False).returncode == code


def test_a_silent_rank_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "1")
    before = signal.getsignal(signal.SIGTERM)
    try:
        leave_when_told(seconds=0.01)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_store_whose_machine_is_gone_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not refuse: whoever asks it waits."""

    class Silent:
        def check(self, *_: Any) -> bool:
            time.sleep(60)
            return True

        add = set = check

    monkeypatch.setattr(shared_errors, "ANSWER_SECONDS", 0.05)
    monkeypatch.setattr(shared_errors, "_ranks", shared_errors._Ranks(Silent(), 1, 2))  # type: ignore[arg-type]
    began = time.monotonic()
    assert shared_errors.is_mine_to_tell("lost")
    shared_errors.linger("lost")
    assert not shared_errors.is_told_by_its_cause(shared_errors.LostRankError("lost"))
    assert time.monotonic() - began < 5
