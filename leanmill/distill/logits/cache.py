"""A teacher's largest probabilities on disk; see `leanmill.core.row_records`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmill.core.errors import ConfigError
from leanmill.core.row_records import RecordWords, RowRecords, settled_manifest


_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a cache holds, and of what; equal contents are interchangeable."""

    data: str
    """Fingerprint of the data, by which row numbers mean rows."""
    tokenizer: str | None
    """Fingerprint of the tokenizer."""
    top_k: int
    temperature: float
    sequence_length: int
    """Tokens of a row."""
    vocab_size: int
    """Of the teacher's head, as far as it was compared."""
    teacher: str
    """Folder or hub name."""
    teacher_weights: str | None
    """Fingerprint of its weights; None where it is not known."""


@dataclass(frozen=True)
class Record:
    """Of one row of S tokens: indices [S, k] int64, log-probabilities [S, k] fp16, log of what is left [S] fp32."""

    indices: NDArray[np.int64]
    log_probs: NDArray[np.float16]
    log_tail: NDArray[np.float32]


class TopKCache:
    """The records of one folder.

    Args:
        folder: Where it is.
        contents: What is in it.
    """

    def __init__(self, folder: Path, contents: Contents) -> None:
        length, k = contents.sequence_length, contents.top_k
        index = "<u2" if contents.vocab_size <= 1 << 16 else "<u4"
        fields = [("indices", index, (length, k)), ("log_probs", "<f2", (length, k)), ("log_tail", "<f4", (length,))]
        self._length, self._records = length, RowRecords(folder, fields, _WORDS)

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk of one token."""
        return self._records.bytes_per_row / self._length

    def read(self, row: int) -> Record | None:
        """Return the record of a row by its global number; None where there is none, or none that is whole."""
        found = self._records.read(row)
        if found is None:
            return None
        return Record(found["indices"].astype(np.int64), found["log_probs"], found["log_tail"])

    def write(self, row: int, record: Record) -> None:
        """Put a row's record in its slot.

        Raises:
            RunError: The folder cannot be written.
        """
        self._records.write(row, vars(record))


def open_cache(folder: Path, wanted: Mapping[str, Any], *, writes: bool) -> TopKCache:
    """Open the cache in a folder, after comparing what it holds with what is wanted; see `settled_manifest`.

    Args:
        folder: Where it is, or is to be.
        wanted: Fields of `Contents`; all of them if `writes`.
        writes: Whether to make it where there is none.

    Raises:
        ConfigError: There is none, or it holds something else; the message says what, and what to do.
        RunError: It cannot be made.
    """
    held = settled_manifest(folder, wanted, version=_VERSION, model="teacher", writes=writes, words=_WORDS)
    try:
        return TopKCache(folder, Contents(**held))
    except TypeError as error:
        raise ConfigError(
            f"{folder / 'manifest.json'} is not a manifest of cached logits that this version reads; "
            f"give another folder"
        ) from error


_WORDS = RecordWords(
    setting="distill.cache_dir",
    what="logits",
    model_setting="distill.teacher",
    terms={"teacher_weights": "weights of the teacher"},
    remedies={
        "top_k": "set distill.top_k to that, or give another folder",
        "temperature": "set distill.temperature to that, or give another folder",
        "data": "rows are known by number, so data, seed and sequence_length must be those of the run that wrote them; "
        "restore them, or give another folder",
    },
)
