"""Signals that ask a run to stop, and how its ranks agree on it."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.core.errors import EXIT_INTERRUPTED
from leanmill.parallel.collectives import begin_max_over_ranks
from leanmill.parallel.low_comm.outer import OuterSteps


log = logging.getLogger(__name__)

GRACE_SECONDS = 3.0
"""What the run has to put its records in order once it is told to quit."""


class Stop(IntEnum):
    """What signals have asked for so far; over ranks the highest counts."""

    NOT_ASKED = 0
    STOPPED = 1
    """A scheduler: finish the step, save, exit with 0."""
    INTERRUPTED = 2
    """Ctrl-C: the same within a limit, exit with 130."""


class StopSignals:
    """Turns signals into a request to stop, inside a `with` block on the main thread.

    SIGTERM, SIGUSR1 (schedulers before they pre-empt) and SIGHUP (the terminal went) set `level` to
    STOPPED, SIGINT sets it to INTERRUPTED. After a SIGINT a second one, or SIGTERM (what torchrun
    makes of the second), raises KeyboardInterrupt in the main thread. Should that be deep in native code, a
    thread ends the process after GRACE_SECONDS. `limit_seconds` after the first SIGINT a second one
    is made.
    """

    def __init__(self, *, limit_seconds: float, leave: Callable[[int], Any] = os._exit) -> None:
        self.level = Stop.NOT_ASKED
        self._limit_seconds, self._leave = limit_seconds, leave
        self._previous: dict[signal.Signals, Any] = {}
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> StopSignals:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # The interpreter writes the number of each signal here at once, even while native code runs.
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
            # nohup and background jobs of a script ignore these two; so they stay ignored.
            if name in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(name) == signal.SIG_IGN:
                continue
            self._previous[name] = signal.signal(name, self._receive)
        _active.append(self)
        self._main = threading.get_ident()
        self._watcher = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _active.remove(self)
        self.put_back()
        if kind is not KeyboardInterrupt:
            self.release()

    def put_back(self) -> None:
        """Leave signals to whoever had them before."""
        for name, handler in self._previous.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(self._previous_fd)

    def release(self) -> None:
        """End the thread: after a KeyboardInterrupt left the block, the process ends unless this is called."""
        if self._watcher is not None:
            os.write(self._writer, b"\0")
            self._watcher.join()
            os.close(self._reader)
            os.close(self._writer)
            self._watcher = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.level, quits = _next(self.level, number)
        if quits:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        level, deadline, quitting = Stop.NOT_ASKED, float("inf"), False
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0 and quitting:
                os.write(2, b"error: interrupted; what was not saved yet is lost\n")
                self._leave(EXIT_INTERRUPTED)
                return
            if remaining <= 0:
                # The limit has passed: as if Ctrl-C had come once more.
                deadline = float("inf")
                signal.pthread_kill(self._main, signal.SIGINT)
                continue
            ready = poll.poll(1000 * min(remaining, 3600.0))
            for number in os.read(self._reader, 64) if ready else b"":
                if number == 0:
                    return
                if number not in self._previous:
                    continue
                before = level
                level, quits = _next(level, number)
                if quits and not quitting:
                    quitting, deadline = True, time.monotonic() + GRACE_SECONDS
                elif level > before:
                    self._announce(signal.Signals(number).name, level)
                    if level is Stop.INTERRUPTED:
                        deadline = time.monotonic() + self._limit_seconds

    def _announce(self, name: str, level: Stop) -> None:
        limit = f", for {self._limit_seconds:g} s at most; again to quit at once" if level is Stop.INTERRUPTED else ""
        if "TORCHELASTIC_RUN_ID" in os.environ:
            limit += " (a signalled torchrun kills after its --shutdown-timeout, 30 s by default)"
        log.info("%s: stopping after this step and its checkpoint%s", name, limit)


_active: list[StopSignals] = []


def _forget_in_child() -> None:
    # A forked worker shares the pipe: Ctrl-C reaches the whole foreground group, and would count twice.
    for signals in _active:
        signals.put_back()


os.register_at_fork(after_in_child=_forget_in_child)


def _next(level: Stop, number: int) -> tuple[Stop, bool]:
    """Return the level after signal `number`, and whether it says to quit at once."""
    if level is Stop.INTERRUPTED:
        return level, number in (signal.SIGINT, signal.SIGTERM)
    return (Stop.INTERRUPTED if number == signal.SIGINT else Stop.STOPPED), False


class Agreement:
    """Has all ranks learn in the same step what any of them was asked.

    On the CPU the answer is that of this very moment. With CUDA the host runs ahead of the device
    and must not wait for other hosts either: the answer is that of the step before, whose reduction
    has travelled between the hosts (gloo, CPU tensors) meanwhile. No device is waited for.
    """

    def __init__(
        self, *, deferred: bool, begin: Callable[[Tensor], Callable[[], Tensor]] = begin_max_over_ranks
    ) -> None:
        self._deferred, self._begin = deferred, begin
        self._pending: Callable[[], Tensor] | None = None

    def reached(self, level: Stop) -> Stop:
        """Return the highest level of any rank. A collective."""
        result = self._begin(torch.tensor(float(level)))
        due, self._pending = (self._pending, result) if self._deferred else (result, None)
        return Stop.NOT_ASKED if due is None else Stop(int(due()))


def agreement_for(device: torch.device, outer: OuterSteps | None = None) -> Agreement:
    """Return the agreement that costs a loop on `device` no waiting it does not do anyway.

    Workers that step without each other ask where they meet; `outer` is what they do there. Where training goes on
    meanwhile, they learn it where they meet next.
    """
    if outer is not None:
        return Agreement(deferred=outer.overlaps, begin=outer.begin_max)
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Agreement(deferred=device.type == "cuda" and several)
