"""A teacher whose largest probabilities are read from disk, and computed and kept where they are not there yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from leanmill.core.batches import Batch, BatchRule, Score
from leanmill.core.errors import RunError
from leanmill.core.rules import StepContext
from leanmill.distill.logits.cache import Record, TopKCache
from leanmill.kernels.linear_kl.op import TopK
from leanmill.parallel.collectives import reduced
from leanmill.parallel.row_reading import read_rows


class CachedTeacher(BatchRule):
    """Gets the records of a step's rows before it trains on them; batches stay as they are.

    What is trained on is always what a record gives back, so a run that wrote it and one that reads it take
    the same steps.

    Args:
        folder: Of the cache.
        opened: Opens the cache, given the tokens of a row; called in the first step.
        compute: The teacher's probabilities [B, S, k] of a micro-batch, a collective; None where there is no teacher.
    """

    name = "distill_cache"

    def __init__(
        self, folder: Path, opened: Callable[[int], TopKCache], compute: Callable[[Batch], TopK] | None
    ) -> None:
        self._folder, self._opened, self._compute = folder, opened, compute
        self._cache: TopKCache | None = None
        self._records: dict[int, Record] = {}
        self._share_read: float | None = None

    def change_batches(self, batches: Sequence[Batch], context: StepContext, score: Score) -> Sequence[Batch]:
        """See `BatchRule`.

        Raises:
            RunError: A row is missing and there is no teacher.
        """
        if self._cache is None:
            self._cache = self._opened(batches[0]["input_ids"].shape[1])
        read = read_rows(batches, self._cache.read)
        self._records, self._share_read = read.records, read.share_read
        for batch, is_missing in zip(batches, read.is_missing, strict=True):
            if is_missing:
                self._add(self._cache, batch)
        return batches

    def _add(self, cache: TopKCache, batch: Batch) -> None:
        rows = batch["row_ids"].tolist()
        if self._compute is None:
            mine = min((row for row in rows if row not in self._records), default=torch.iinfo(torch.int64).max)
            row = int(reduced(torch.tensor(mine), "min"))
            raise RunError(
                f"distill.cache_dir {str(self._folder)!r} has no whole record of row {row}; add distill.teacher, which "
                f"writes what is missing, or train for no longer than the run that wrote it"
            )
        found = self._compute(batch)
        assert found.log_tail is not None
        for index, row in enumerate(rows):
            if row not in self._records:
                self._records[row] = record = _record(found, index)
                cache.write(row, record)

    def extras(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return indices [B, S, k] int64, log-probabilities [B, S, k] and log-tails [B, S] fp32 of a micro-batch."""
        records, device = [self._records[row] for row in batch["row_ids"].tolist()], batch["row_ids"].device
        return {
            "teacher_indices": torch.from_numpy(np.stack([one.indices for one in records])).to(device),
            "teacher_log_probs": torch.from_numpy(np.stack([one.log_probs for one in records])).to(device).float(),
            "teacher_log_tail": torch.from_numpy(np.stack([one.log_tail for one in records])).to(device),
        }

    def metrics(self) -> Mapping[str, float]:
        """Return the share of the last step's rows, on all ranks, that were read."""
        return {} if self._share_read is None else {"share_read": self._share_read}


def _record(found: TopK, index: int) -> Record:
    assert found.log_tail is not None
    return Record(
        found.indices[index].cpu().numpy(),
        found.log_probs[index].half().cpu().numpy(),
        found.log_tail[index].float().cpu().numpy(),
    )
