"""From what ranks tell of themselves to a sentence on who keeps the others waiting. No processes here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from leanmill.parallel.flight import Standing


_NUM_NAMED = 4
"""Ranks that are told of one by one."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a rank last told of itself."""

    host: str
    pid: int
    beat: int
    """How often it has told something; one that stands still is a rank that is gone or frozen."""
    phase: str
    step: int
    phase_seconds: float
    standings: Mapping[str, Standing]
    """By group, where it has had a collective."""

    def state(self) -> dict[str, Any]:
        """JSON-able, for `from_state`."""
        return {**self.__dict__, "standings": {group: one.state() for group, one in self.standings.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Seen:
        """Return what `state` was taken of."""
        standings = {group: Standing.from_state(one) for group, one in state["standings"].items()}
        return cls(**{**state, "standings": standings})

    def where(self) -> str:
        """What the rank is doing, in a person's words."""
        return f"{self.phase} of step {self.step} for {self.phase_seconds:.0f} s" if self.step else self.phase


def verdict(rank: int, everyone: Mapping[int, Seen | None], silent: Collection[int]) -> str:
    """Say which ranks are not in the collective that a rank waits in, and where they are.

    Args:
        rank: The one that waits: one of its collectives is not done.
        everyone: What the ranks tell, by rank; None of one that never has.
        silent: Those of them that have gone quiet.
    """
    mine = everyone[rank]
    assert mine is not None
    group, own = next((group, one) for group, one in mine.standings.items() if not one.is_done)
    waited = _shared(own, group, everyone)
    lines = {other: _line(seen, other in silent, group, waited) for other, seen in sorted(everyone.items())}
    found = [f"rank {other}{line}" for other, line in lines.items() if line is not None]
    if not found:
        return f"every rank is in {waited} of {group}, which does not end: look at the network between their machines"
    rest = [f"and {len(found) - _NUM_NAMED} more"] if len(found) > _NUM_NAMED else []
    return "; ".join([f"{_ranks(len(everyone) - len(found))} in {waited} of {group}", *found[:_NUM_NAMED], *rest])


def _shared(own: Standing, group: str, everyone: Mapping[int, Seen | None]) -> Standing:
    """The collective that most ranks have as this number of a group; where two branches are equal, the first rank's."""
    standings = [seen.standings[group] for _, seen in sorted(everyone.items()) if seen and group in seen.standings]
    return Counter(one for one in standings if one.number == own.number).most_common(1)[0][0]


def _ranks(number: int) -> str:
    return f"{number} ranks wait" if number > 1 else "1 rank waits"


def _line(seen: Seen | None, is_silent: bool, group: str, waited: Standing) -> str | None:
    """What is to say of another rank, None where it waits in the same collective or is of another group."""
    if seen is None:
        return " has never been heard of"
    machine = f" ({seen.host}, process {seen.pid})"
    there = seen.standings.get(group)
    if is_silent:
        return f"{machine} is silent: stopped, or its machine is; last heard in {seen.where()}{_last(there)}"
    if there is None:
        return _elsewhere(seen, machine)
    if there.number < waited.number:
        return f"{machine} is not there: it is in {seen.where()}{_last(there)}"
    if there.number == waited.number and (there.operation, there.sizes) != (waited.operation, waited.sizes):
        return f"{machine} took another branch: it is in {there} in its {seen.where()}"
    if there.number > waited.number:
        return f"{machine} is past it: it is in {seen.where()}{_last(there)}"
    return None


def _elsewhere(seen: Seen, machine: str) -> str | None:
    """A rank without a collective in the group may not be of it; one that waits in another group is worth a word."""
    waits = next(((group, one) for group, one in seen.standings.items() if not one.is_done), None)
    return None if waits is None else f"{machine} waits in {waits[1]} of {waits[0]} in its {seen.where()}"


def _last(standing: Standing | None) -> str:
    return "" if standing is None else f", its last there {standing}"


def silent_ranks(before: Mapping[int, Seen | None], after: Mapping[int, Seen | None]) -> set[int]:
    """Return the ranks that have told nothing between two looks."""
    return {
        rank
        for rank, seen in after.items()
        if seen is not None and (earlier := before.get(rank)) is not None and earlier.beat == seen.beat
    }
