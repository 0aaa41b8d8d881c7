"""A rank that is slower than the others is named, although all of them take as long for a step.

Ranks wait for each other in collectives, so a slow one hides: its steps are as long as anybody's. What tells it apart
is the time it spends outside of collectives, as C4 has it (Dong et al., arXiv:2406.04594). Gloo's record says when a
rank asked for a collective, not when it was done; but nobody is past one before the last has asked for it, so the
latest of all ranks' times is its end for all. Ranks count from the reduction before forward, which they leave together.

Nothing is sent for this alone: the times ride on the maximum that a record takes over ranks anyway, and what came of
them on the next record's. Reading the flight recorder costs a part of a second, so that happens every half a minute.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from leanmill.parallel import flight
from leanmill.parallel.pulse import Pulse


log = logging.getLogger(__name__)

EVERY_SECONDS = 30.0
"""Between two looks."""
LOOKS = 3
"""In a row that a rank is slow in before it is named."""
SLOTS = 512
"""Collectives of a step that are looked at; the first ones."""
LEAST_SECONDS = 0.01
"""Slower than the median by less is not worth a word."""
PHASES = ("reading data", "forward and backward", "update")


@dataclass(kw_only=True)
class SlowRanks:
    """Looks at this rank beside the others.

    Args:
        pulse: What this rank is doing.
        rank: This rank.
        world_size: Ranks that the maximum is taken over, or more.
        factor: Times the median of ranks from which on one is slow.
        waits_between: Whether a rank waits for each collective before it asks for the next, as gathers make it do;
            gradients that are reduced beside backward are waited for once, at its end.
        every_seconds: Between two looks.
    """

    pulse: Pulse
    rank: int
    world_size: int
    factor: float
    waits_between: bool = True
    every_seconds: float = EVERY_SECONDS
    found: dict[str, float] = field(default_factory=dict)
    """Of the last look: the slowest rank, and how many times the median it took."""

    def __post_init__(self) -> None:
        self._looks = False
        self._looked = time.monotonic()
        self._own: list[float] | None = None
        self._begun: list[float] = []
        self._data_seconds = self._until_update = 0.0
        self._in_a_row = 0

    def arrive(self) -> None:
        """Say that this rank is about to meet the others for a record."""
        self._arrived_ns = time.time_ns()

    def told(self) -> list[float]:
        """Return what this rank adds to the maximum; as long on all ranks."""
        wants = self.rank == 0 and time.monotonic() - self._looked > self.every_seconds
        message = [float(wants)]
        if self._own is not None:
            message += [0.0] * len(PHASES) * self.world_size
            first = 1 + len(PHASES) * self.rank
            message[first : first + len(PHASES)] = self._own
        if self._looks:
            self._look()
            number = len(self._begun)
            message += [number, -number, *self._begun[:SLOTS], *[0.0] * (SLOTS - number)]
        return message

    def hear(self, message: Sequence[float], step: int) -> None:
        """Take the maximum over ranks of what `told` returned.

        Args:
            message: The maximum.
            step: Of the record.
        """
        looks, rest = bool(message[0]), message[1:]
        if self._own is not None:
            size = len(PHASES) * self.world_size
            self._judge([rest[i : i + len(PHASES)] for i in range(0, size, len(PHASES))], step)
            self._own, rest = None, rest[size:]
        if self._looks:
            most, fewest, *ends = rest
            if most == -fewest:  # else ranks take different ways, and times do not belong together
                within, after = own_seconds(
                    self._begun[:SLOTS], ends, self._until_update, waits_between=self.waits_between
                )
                self._own = [self._data_seconds, within, after]
        self._looks = looks
        if looks:
            self._looked = time.monotonic()

    def _look(self) -> None:
        """Read when this rank asked for the collectives of the last step."""
        marks = dict(self.pulse.marks)
        began, together = marks.get(PHASES[0], 0), marks.get(PHASES[1], 0)
        asked = [at for at in begun(flight.recorded().get("entries", ())) if at >= began]
        before = [at for at in asked if at < together]
        self._data_seconds = ((before[-1] if before else together) - began) / 1e9
        self._until_update = (marks.get(PHASES[2], self._arrived_ns) - together) / 1e9
        later = [at for at in asked if together <= at < self._arrived_ns][: SLOTS - 1]
        self._begun = [(at - together) / 1e9 for at in [*later, self._arrived_ns]]

    def _judge(self, everyone: Sequence[Sequence[float]], step: int) -> None:
        """Name this rank where it has been slow for some looks."""
        here = {rank: own for rank, own in enumerate(everyone) if any(own)}
        totals = {rank: sum(own) for rank, own in here.items()}
        if self.rank not in totals or len(totals) < 2:
            return
        usual = statistics.median_low(totals.values())
        slowest = max(totals, key=totals.__getitem__)
        self.found = {"rank": float(slowest), "times_the_median": totals[slowest] / max(usual, 1e-9)}
        mine = totals[self.rank]
        is_slow = mine > self.factor * usual and mine - usual > LEAST_SECONDS
        self._in_a_row = self._in_a_row + 1 if is_slow else 0
        if self._in_a_row and self._in_a_row % LOOKS == 0:
            middle = [statistics.median_low(own[index] for own in here.values()) for index in range(len(PHASES))]
            worst = max(range(len(PHASES)), key=lambda index: here[self.rank][index] - middle[index])
            log.warning(
                "rank %d (%s, process %d) is slow, %.2g times the median of ranks: outside of collectives a step of it "
                "takes %.3g s, the median's %.3g s; most of that in %s, %.3g s against %.3g s. Seen %d times in a row, "
                "by step %d",
                *(self.rank, socket.gethostname(), os.getpid(), mine / max(usual, 1e-9), mine, usual),
                *(PHASES[worst], here[self.rank][worst], middle[worst], self._in_a_row, step),
            )


def begun(entries: Sequence[Any]) -> list[int]:
    """Return when a rank asked for each collective, nanoseconds since 1970, in order."""
    return sorted(entry["time_created_ns"] for entry in entries if not entry["is_p2p"])


def own_seconds(
    asked: Sequence[float], ends: Sequence[float], until_update: float, *, waits_between: bool
) -> tuple[float, float]:
    """Return what a rank spent outside of collectives in forward and backward, and in the update.

    Args:
        asked: Seconds after the common start at which it asked for each collective.
        ends: The latest of all ranks' for each: before that nobody goes on.
        until_update: Seconds after the start at which its update began.
        waits_between: See `SlowRanks`.
    """
    parts = [0.0, 0.0]
    number_within = sum(at < until_update for at in asked)
    last = 0.0
    for index, (at, end) in enumerate(zip(asked, ends, strict=False)):
        # Beside backward only the last reduction is waited for: until then a rank's time is its own.
        is_waited_for = waits_between or index >= number_within - 1
        parts[index >= number_within] += max(0.0, at - last)
        last = max(at, end) if is_waited_for else at
    return parts[0], parts[1]
