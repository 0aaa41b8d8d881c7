"""What a reference thinks of the data's rows, on disk; see `leanmill.core.row_records`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanmill.core.batches import Batch
from leanmill.core.paths import expand_user
from leanmill.core.row_records import RecordWords, RowRecords, settled_manifest
from leanmill.core.technique import InstallContext
from leanmill.parallel.row_reading import read_rows


_VERSION = 1
_LOSSES = "losses"


class ReferenceCache:
    """Losses of tokens under the reference, fp32: a run that reads them takes the steps of the one that wrote them.

    Args:
        context: Knows what data, tokenizer and reference they must be of.
        technique: Registered name.
        reference: Folder or hub name.
        cache_dir: Where they are kept.
    """

    def __init__(self, context: InstallContext, technique: str, reference: str, cache_dir: str) -> None:
        self._context, self._technique, self._reference = context, technique, reference
        self._folder = expand_user(cache_dir)
        self._records: RowRecords | None = None
        self._share_read: float | None = None

    def losses(self, batches: Sequence[Batch], compute: Callable[[Batch], Tensor]) -> list[Tensor]:
        """Return the losses [B, S] of each micro-batch, 0 where there is no label. A collective.

        Args:
            batches: This rank's micro-batches of a step.
            compute: Asks the reference; called for those that any rank misses rows of.

        Raises:
            ConfigError: The folder holds what another reference said, or of other data.
            RunError: It cannot be written.
        """
        records = self._records or self._opened(batches[0]["input_ids"].shape[1])
        self._records = records

        def read(row: int) -> NDArray[np.float32] | None:
            found = records.read(row)
            return None if found is None else found[_LOSSES]

        of_rows = read_rows(batches, read)
        self._share_read = of_rows.share_read
        return [
            self._computed(records, of_rows.records, batch, compute) if is_missing else _stacked(of_rows.records, batch)
            for batch, is_missing in zip(batches, of_rows.is_missing, strict=True)
        ]

    def metrics(self) -> Mapping[str, float]:
        """Return the share of the last step's rows, on all ranks, that were read."""
        return {} if self._share_read is None else {"share_read": self._share_read}

    @staticmethod
    def _computed(
        records: RowRecords,
        known: dict[int, NDArray[np.float32]],
        batch: Batch,
        compute: Callable[[Batch], Tensor],
    ) -> Tensor:
        found = compute(batch).float().cpu().numpy()
        for row, losses in zip(batch["row_ids"].tolist(), found, strict=True):
            if row not in known:
                known[row] = losses
                records.write(row, {_LOSSES: losses})
        return _stacked(known, batch)

    def _opened(self, sequence_length: int) -> RowRecords:
        context, words = self._context, _words(self._technique)
        digest = context.fingerprint_of_model
        wanted = {
            "data": context.data_fingerprint,
            "tokenizer": context.tokenizer_fingerprint,
            "sequence_length": sequence_length,
            "vocab_size": context.vocab_size,
            "reference": self._reference,
            "reference_weights": None if digest is None else digest(self._reference),
        }
        settled_manifest(self._folder, wanted, version=_VERSION, model="reference", writes=True, words=words)
        return RowRecords(self._folder, [(_LOSSES, "<f4", (sequence_length,))], words)


def _stacked(known: Mapping[int, NDArray[np.float32]], batch: Batch) -> Tensor:
    rows = batch["row_ids"]
    return torch.from_numpy(np.stack([known[row] for row in rows.tolist()])).to(rows.device)


def _words(technique: str) -> RecordWords:
    return RecordWords(
        setting=f"{technique}.cache_dir",
        what="reference losses",
        model_setting=f"{technique}.reference",
        terms={"reference_weights": "weights of the reference"},
        remedies={
            "data": "rows are known by number, so data, seed and sequence_length must be those of the run that wrote "
            "them; restore them, or give another folder"
        },
    )
