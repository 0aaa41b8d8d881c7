"""Rows drawn from a seed, of several documents each, with unequal numbers of targets on the ranks."""

from __future__ import annotations

import torch
from torch import Tensor


IGNORED = -100


class DrawnRows:
    """Stands in for a run's data: row g is the same on any number of ranks and micro-batches.

    Rows hold documents of unequal lengths, and from one target to all of them.

    Args:
        vocab_size: Tokens are below it.
        sequence_length: Tokens of a row.
        num_rows: Rows of a step over all ranks.
        num_micro_batches: Parts of a step; each has the same rows over all ranks, however many those are.
        packed: Whether rows hold several documents; else each is one.
    """

    def __init__(
        self, *, vocab_size: int, sequence_length: int, num_rows: int, num_micro_batches: int, packed: bool = True
    ) -> None:
        self.vocab_size, self.sequence_length, self.packed = vocab_size, sequence_length, packed
        self.num_rows, self.num_micro_batches = num_rows, num_micro_batches
        self._position_rows = 0

    @property
    def position_tokens(self) -> int:
        """Tokens handed out so far over all ranks."""
        return self._position_rows * self.sequence_length

    def next_rows(self, num_rows: int, *, rank: int, world_size: int) -> dict[str, Tensor]:
        """Return this rank's share of the next rows, see `leanmill.core.batches.Batch`; every rank calls it."""
        first, self._position_rows = self._position_rows, self._position_rows + num_rows
        numbers = torch.arange(first, first + num_rows).view(self.num_micro_batches, world_size, -1)[:, rank].flatten()
        rows = [self._row(number) for number in numbers.tolist()]
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return batch | {"row_ids": numbers}

    def _row(self, number: int) -> dict[str, Tensor]:
        length = self.sequence_length
        generator = torch.Generator().manual_seed(1000 + number)
        ids = torch.randint(self.vocab_size, (length,), generator=generator)
        labels = torch.randint(self.vocab_size, (length,), generator=generator)
        positions = torch.arange(length)
        if self.packed:
            cut = 1 + number % (length - 2)
            positions[cut:] -= cut
            labels[cut - 1] = IGNORED  # the last token of a document predicts nothing
        labels[: (5 * number) % (length - 1)] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
