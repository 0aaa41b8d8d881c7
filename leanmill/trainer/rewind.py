"""Going back to an earlier checkpoint and past the rows that led into trouble."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leanmill.checkpoint.manager import CheckpointManager
from leanmill.checkpoint.manifest import read_manifest
from leanmill.core.errors import RunError


MAX_IN_A_ROW = 3
"""Rewinds without a new checkpoint in between, after which a run ends."""


class RewindError(RunError):
    """A step asks the run to go back; caught where the run is begun.

    Args:
        step: The step.
        why: What was wrong with it, in a sentence's beginning.
        position_rows: Rows read by all ranks until then.
    """

    def __init__(self, step: int, why: str, position_rows: int) -> None:
        super().__init__(why)
        self.step, self.why, self.position_rows = step, why, position_rows


@dataclass(frozen=True, kw_only=True)
class Back:
    """Where a run goes back to."""

    path: Path | None
    """Its checkpoint; None is its beginning."""
    position_rows: int
    """Where it goes on in the data."""
    note: str
    """What happened, for the log."""


class Rewinds:
    """The rewinds of a run: each goes to the newest sound checkpoint before its step.

    Where none was saved since the last one, that has not helped: then it is the checkpoint before.
    """

    def __init__(self) -> None:
        self._newest_then, self._went_to = -1, 0
        self._in_a_row = 0

    def back(self, rewind: RewindError, manager: CheckpointManager) -> Back:
        """Choose where to go; a collective.

        Raises:
            RunError: It has gone back too often.
        """
        newest = manager.newest_sequence()
        self._in_a_row = self._in_a_row + 1 if newest == self._newest_then else 1
        if self._in_a_row > MAX_IN_A_ROW:
            raise RunError(
                f"{rewind.why}; {MAX_IN_A_ROW} rewinds have not got past it. Lower optimizer.lr, look at the data, or "
                f"start again from an earlier checkpoint with checkpoint.resume"
            )
        below = self._went_to if self._in_a_row > 1 else None
        path = manager.newest_before(rewind.step, below=below)
        self._newest_then, self._went_to = newest, 0 if path is None else read_manifest(path).sequence
        where = "the beginning" if path is None else str(path)
        note = f"rewound to {where}, going on in the data at row {rewind.position_rows:,}: {rewind.why}"
        return Back(path=path, position_rows=rewind.position_rows, note=note)
