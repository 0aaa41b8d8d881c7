"""Signals ask a run to stop; its ranks agree on the step."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from leanmill.trainer import stop
from leanmill.trainer.stop import Agreement, Stop, StopSignals
from tests.distributed import run_ranks


NAMES = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, which is respected
    before = [signal.getsignal(name) for name in NAMES]
    yield
    after = [signal.getsignal(name) for name in NAMES]
    signal.signal(signal.SIGHUP, hang_up)
    assert after == before, "the block must put them back"
    fd = signal.set_wakeup_fd(-1)
    assert fd == -1, "the block must put it back"


def send(name: signal.Signals) -> None:
    signal.raise_signal(name)  # in this thread: one sent to the process may reach another first


@contextmanager
def interrupted(signals: StopSignals) -> Iterator[None]:
    """The block under `signals`, which has to end in a KeyboardInterrupt."""
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117 - the order is the point
        with signals:
            yield


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_scheduler_asks_to_stop_however_often(name: signal.Signals) -> None:
    with StopSignals(limit_seconds=60) as signals:
        assert signals.level is Stop.NOT_ASKED
        for _ in range(3):
            send(name)
            assert signals.level is Stop.STOPPED


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_ctrl_c_quits(second: signal.Signals) -> None:
    """torchrun makes SIGTERM of the second."""
    left: list[int] = []
    signals = StopSignals(limit_seconds=60, leave=left.append)
    with interrupted(signals):
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert signals.level is Stop.INTERRUPTED
        send(second)
    signals.release()
    assert left == []


def test_other_signals_ask_for_nothing() -> None:
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with StopSignals(limit_seconds=60) as signals:
            send(signal.SIGINT)
            send(signal.SIGUSR2)
            send(signal.SIGUSR2)
            assert signals.level is Stop.INTERRUPTED
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(limit_seconds=60) as signals:
            send(signal.SIGHUP)
            assert signals.level is Stop.NOT_ASKED
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_has_a_limit() -> None:
    started = time.monotonic()
    signals = StopSignals(limit_seconds=0.2)
    with interrupted(signals):
        send(signal.SIGINT)
        time.sleep(30)
    signals.release()
    assert time.monotonic() - started < 15


def test_native_code_does_not_hold_up_the_second_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python runs a signal's handler between bytecodes only: a hung collective would never see it."""
    monkeypatch.setattr(stop, "GRACE_SECONDS", 0.1)
    left: list[tuple[int, float]] = []
    signals = StopSignals(limit_seconds=60, leave=lambda code: left.append((code, time.monotonic())))
    with interrupted(signals):
        send(signal.SIGINT)
        threading.Timer(0.1, send, (signal.SIGINT,)).start()
        hashlib.pbkdf2_hmac("sha512", b"x", b"y", 800_000)  # over a second, without a bytecode
        raise AssertionError("the handler runs as soon as native code is over")
    ended = time.monotonic()
    assert [code for code, _ in left] == [130]
    assert left[0][1] < ended


def test_a_caller_that_catches_the_interrupt_lives_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "GRACE_SECONDS", 0.2)
    left: list[int] = []
    signals = StopSignals(limit_seconds=60, leave=left.append)
    with interrupted(signals):
        send(signal.SIGINT)
        send(signal.SIGINT)
    signals.release()
    time.sleep(0.4)
    assert left == []


def test_ctrl_c_in_a_forked_worker_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The terminal sends it to the whole group."""
    monkeypatch.setattr(stop, "GRACE_SECONDS", 0.1)
    left: list[int] = []
    with StopSignals(limit_seconds=60, leave=left.append) as signals:
        child = os.fork()
        if child == 0:
            try:
                send(signal.SIGINT)
                time.sleep(10)
            except KeyboardInterrupt:
                os._exit(42)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        assert signals.level is Stop.NOT_ASKED
        send(signal.SIGINT)
        time.sleep(0.4)
    assert signals.level is Stop.INTERRUPTED
    assert left == []


@pytest.mark.parametrize(("deferred", "step"), [(False, 3), (True, 4)])
def test_ranks_learn_of_it_in_the_same_step(deferred: bool, step: int) -> None:
    def body() -> list[Stop]:
        agreement = Agreement(deferred=deferred)
        asked = {1: Stop.STOPPED, 2: Stop.INTERRUPTED}
        mine = asked.get(dist.get_rank(), Stop.NOT_ASKED)
        return [agreement.reached(mine if step >= 3 else Stop.NOT_ASKED) for step in range(1, 6)]

    results = run_ranks(body, 3)
    assert results[0] == results[1] == results[2]
    assert results[0].index(Stop.INTERRUPTED) + 1 == step
    assert set(results[0][: step - 1]) == {Stop.NOT_ASKED}
