"""What each rank is doing, told to the others through the store they met at, and who keeps them waiting.

Ranks that wait in a collective cannot ask the one that does not come. A thread beside each rank's work can: it puts
the rank's phase, and once nothing moves also its standing in each group's collectives, where all can read them. After
`hang_seconds` without a move one of the waiting names the ranks that are somewhere else, silent, or in another
collective, and every rank that still can writes its stacks and its flight record.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from leanmill.parallel import flight, shared_errors
from leanmill.parallel.flight import Standing
from leanmill.parallel.hang import Seen, silent_ranks, verdict


log = logging.getLogger(__name__)

MAX_BEAT_SECONDS = 10.0
"""Time between two things a rank tells of itself, at most."""
BEATS_BEFORE_SILENCE = 3
"""Beats that a rank may miss before it counts as silent."""
_VERDICT = "verdict"


@dataclass
class Pulse:
    """What a rank is doing now; written by its main thread, read by the thread beside it."""

    phase: str = "starting"
    step: int = 0
    since: float = field(default_factory=time.monotonic)
    patience_seconds: float = 0.0
    """How long the phase may wait for other ranks, whatever a watch is told."""
    marks: list[tuple[str, int]] = field(default_factory=list)
    """Phases since the last step began, each with its beginning in nanoseconds since 1970."""

    def enter(self, phase: str, step: int | None = None, *, patience_seconds: float = 0.0) -> None:
        """Say that `phase` begins, of `step` where it is one of a step's."""
        self.phase, self.step, self.since = phase, self.step if step is None else step, time.monotonic()
        self.patience_seconds = patience_seconds
        if step is not None:
            self.marks = []
        self.marks.append((phase, time.time_ns()))


class PulseWatch:
    """The thread; a daemon, which the end of a run or of the store ends.

    Args:
        pulse: This rank's.
        store: That all ranks met at; the watch talks to it by a connection of its own.
        rank: This rank.
        world_size: Ranks of the run.
        hang_seconds: How long nothing may move while this rank waits.
        folder: Where stacks and flight records go, once somebody hangs.
        then: What comes of a rank that does not come back, as a sentence's end.
    """

    def __init__(
        self,
        pulse: Pulse,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        hang_seconds: float,
        folder: Path,
        then: str = "",
    ) -> None:
        self.pulse, self.rank, self.world_size = pulse, rank, world_size
        self.hang_seconds, self.folder, self.then = hang_seconds, folder, then
        self.beat_seconds = min(MAX_BEAT_SECONDS, hang_seconds / 6)
        # A main thread that waits for the store would make the watch wait with it.
        self._store = dist.PrefixStore("pulse", store.clone())  # type: ignore[attr-defined]
        self._host, self._beat, self._verdict, self._named = socket.gethostname(), 0, "", ""
        self._asked: float | None = None
        self._moved, self._last = time.monotonic(), self._now({})
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> PulseWatch:
        """Begin to beat."""
        shared_errors.ask_of_hangs(self.known)
        self._thread.start()
        return self

    def known(self) -> str:
        """Return who keeps this rank waiting, as far as is known now; empty where it is not."""
        asked = self._asked
        seconds = 0.0 if asked is None else time.monotonic() - asked
        if seconds > BEATS_BEFORE_SILENCE * self.beat_seconds:
            return (
                f"the machine where the ranks met, rank 0's or torchrun's first, has not answered for {seconds:.0f} s"
            )
        return self._verdict

    def end(self) -> None:
        """Stop beating; this rank is done."""
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(self.beat_seconds):
            try:
                self._beat_once()
            except RuntimeError:
                return  # The host of the store has left, and with it everybody.
            except Exception as error:  # noqa: BLE001 (the run goes on without being watched, and it is said)
                log.warning("ranks that hang will not be named: %s: %s", type(error).__name__, error)
                return
            self._asked = None

    def _beat_once(self) -> None:
        still_seconds = time.monotonic() - max(self._moved, self.pulse.since)
        limit_seconds = max(self.hang_seconds, self.pulse.patience_seconds)
        # Reading the record takes half a second of a core, so it waits until there is a reason.
        now = self._now(flight.standings() if still_seconds > self.hang_seconds / 2 else {})
        if self._has_moved(now):
            self._moved, still_seconds = time.monotonic(), 0.0
        self._last, self._asked = now, time.monotonic()
        self._store.set(str(self.rank), json.dumps(now.state()))
        is_waiting = any(not standing.is_done for standing in now.standings.values())
        if is_waiting and still_seconds > limit_seconds:
            self._name_who_is_missing(now)
        if self._store.check([_VERDICT]):
            told = self._store.get(_VERDICT).decode()
            if told != self._verdict:
                self._verdict = told
                self._write()

    def _now(self, standings: Mapping[str, Standing]) -> Seen:
        self._beat += 1
        return Seen(
            host=self._host,
            pid=os.getpid(),
            beat=self._beat,
            phase=self.pulse.phase,
            step=self.pulse.step,
            phase_seconds=time.monotonic() - self.pulse.since,
            standings=standings,
        )

    def _has_moved(self, now: Seen) -> bool:
        """Whether collectives went on within a phase, between two readings of the record."""
        last = self._last.standings
        return bool(last) and bool(now.standings) and now.standings != last

    def _name_who_is_missing(self, now: Seen) -> None:
        """Tell, on one of the ranks that wait, once a standstill."""
        where = ";".join(f"{group}:{standing.number}" for group, standing in sorted(now.standings.items()))
        if where == self._named or self._store.add(f"named/{where}", 1) > 1:
            self._named = where
            return
        self._named = where
        before = self._others()
        self._asked = None
        if self._ended.wait(BEATS_BEFORE_SILENCE * self.beat_seconds):
            return
        self._asked = time.monotonic()
        after = self._others()
        told = verdict(self.rank, {self.rank: now, **after}, silent_ranks(before, after))
        self._store.set(_VERDICT, told)
        seconds = time.monotonic() - max(self._moved, self.pulse.since)
        log.warning(
            "nothing has moved for %.0f s: %s. Stacks and flight records: %s%s", seconds, told, self.folder, self.then
        )

    def _others(self) -> dict[int, Seen | None]:
        found: dict[int, Seen | None] = {}
        for rank in range(self.world_size):
            if rank != self.rank:
                is_there = self._store.check([str(rank)])
                found[rank] = Seen.from_state(json.loads(self._store.get(str(rank)))) if is_there else None
        return found

    def _write(self) -> None:
        """Leave this rank's stacks and flight record in the folder; a full disk must not end the watch."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"rank-{self.rank}.stacks.txt", "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            record = json.dumps(flight.recorded())
            (self.folder / f"rank-{self.rank}.flight.json").write_text(record, encoding="utf-8")
        except OSError as error:
            log.warning("stacks and flight record could not be written to %s: %s", self.folder, error)
