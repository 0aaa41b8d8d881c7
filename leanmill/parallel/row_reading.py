"""Which rows of a step's micro-batches were kept on disk, where computing the others is a collective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from leanmill.core.batches import Batch
from leanmill.parallel.collectives import sum_over_ranks


_Record = TypeVar("_Record")


@dataclass(frozen=True)
class RowsRead(Generic[_Record]):
    """Of one step."""

    records: dict[int, _Record]
    """What was read of this rank's rows."""
    is_missing: list[bool]
    """Of each micro-batch, whether any rank misses a row of its own: where the model that computes them is sharded, its
    forward is a collective, so then all ranks compute theirs."""
    share_read: float
    """Of the rows of all ranks."""


def read_rows(batches: Sequence[Batch], read: Callable[[int], _Record | None]) -> RowsRead[_Record]:
    """Read the records of a step's rows. A collective.

    Args:
        batches: Micro-batches of this rank; every rank has equally many.
        read: Gives the record of a row, by number.
    """
    rows = [batch["row_ids"].tolist() for batch in batches]
    found = {row: read(row) for of_batch in rows for row in of_batch}
    records = {row: record for row, record in found.items() if record is not None}
    missing = torch.tensor([sum(row not in records for row in of_batch) for of_batch in rows])
    *per_batch, num_rows = sum_over_ranks(torch.cat([missing, torch.tensor([len(found)])])).tolist()
    return RowsRead(records, [bool(number) for number in per_batch], 1 - sum(per_batch) / num_rows)
