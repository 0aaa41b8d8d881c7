"""A teacher's largest probabilities on disk: a record a row of the data, whoever wrote it first.

A folder holds `manifest.json`, which says of what data, tokenizer and teacher they are, and files of
`ROWS_PER_FILE` slots each. A slot is the row's checksum and its record; a slot without a valid checksum is
empty, be it that nothing was written, or that a write was cut short. So a run that is killed leaves no harm,
ranks write side by side without locks, and whatever is there is used by the next run.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmill.core.errors import ConfigError, RunError


ROWS_PER_FILE = 1024
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
        self.folder, self.contents = folder, contents
        length, k = contents.sequence_length, contents.top_k
        index = np.dtype("<u2") if contents.vocab_size <= 1 << 16 else np.dtype("<u4")
        self._layout = np.dtype(
            [
                ("checksum", "<u4"),
                ("row", "<u8"),
                ("indices", index, (length, k)),
                ("log_probs", "<f2", (length, k)),
                ("log_tail", "<f4", (length,)),
            ]
        )

    @property
    def bytes_per_token(self) -> float:
        """Bytes on disk of one token."""
        return self._layout.itemsize / self.contents.sequence_length

    def read(self, row: int) -> Record | None:
        """Return the record of a row by its global number; None where there is none, or none that is whole."""
        try:
            with self._file(row).open("rb") as file:
                file.seek(row % ROWS_PER_FILE * self._layout.itemsize)
                raw = file.read(self._layout.itemsize)
        except FileNotFoundError:
            return None
        if len(raw) < self._layout.itemsize:
            return None
        slot = np.frombuffer(raw, self._layout)[0]
        if slot["row"] != row + 1 or slot["checksum"] != zlib.crc32(raw[4:]):
            return None
        return Record(slot["indices"].astype(np.int64), slot["log_probs"].copy(), slot["log_tail"].copy())

    def write(self, row: int, record: Record) -> None:
        """Put a row's record in its slot.

        Raises:
            RunError: The folder cannot be written.
        """
        slot = np.zeros(1, self._layout)
        slot["row"], slot["indices"] = row + 1, record.indices  # 0 is a slot that was never written
        slot["log_probs"], slot["log_tail"] = record.log_probs, record.log_tail
        slot["checksum"] = zlib.crc32(slot.tobytes()[4:])
        try:
            descriptor = os.open(self._file(row), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                _write_all(descriptor, slot.tobytes(), row % ROWS_PER_FILE * self._layout.itemsize)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _cannot_write(self.folder, error) from error

    def _file(self, row: int) -> Path:
        return self.folder / f"rows-{row // ROWS_PER_FILE:08d}.bin"


def open_cache(folder: Path, wanted: Mapping[str, Any], *, writes: bool) -> TopKCache:
    """Open the cache in a folder, after comparing what it holds with what is wanted.

    Every rank calls this. Where several make a new one at once, the first decides what it holds.

    Args:
        folder: Where it is, or is to be.
        wanted: Fields of `Contents`; all of them if `writes`.
        writes: Whether to make it where there is none.

    Raises:
        ConfigError: There is none, or it holds something else; the message says what, and what to do.
        RunError: It cannot be made.
    """
    manifest = folder / "manifest.json"
    if not manifest.exists():
        if not writes:
            raise ConfigError(
                f"distill.cache_dir {str(folder)!r} holds no logits (no manifest.json); add distill.teacher, and they "
                f"are written while the student trains, or correct the path"
            )
        _make(manifest, Contents(**wanted))
    held = _contents(manifest)
    for key, value in wanted.items():
        if key == "teacher" and held.teacher_weights is not None and wanted["teacher_weights"] is not None:
            continue  # its weights say which it is, wherever they lie
        known = getattr(held, key)
        if value is not None and known is not None and known != value:
            raise ConfigError(
                f"distill.cache_dir {str(folder)!r} holds logits with {_WORDS.get(key, key)} {known}, and this run has "
                f"{value}; {_REMEDIES.get(key, 'give another folder')}"
            )
    return TopKCache(folder, held)


_WORDS = {"data": "data", "tokenizer": "tokenizer", "teacher_weights": "weights of the teacher"}
_REMEDIES = {
    "top_k": "set distill.top_k to that, or give another folder",
    "temperature": "set distill.temperature to that, or give another folder",
    "data": "rows are known by number, so data, seed and sequence_length must be those of the run that wrote them; "
    "restore them, or give another folder",
}


def _make(manifest: Path, contents: Contents) -> None:
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=manifest.parent, suffix=".partial")
        with os.fdopen(handle, "w") as file:
            json.dump({"version": _VERSION, **asdict(contents)}, file, indent=2)
        os.chmod(partial, 0o644)
        try:
            os.link(partial, manifest)  # unlike a rename it leaves what another run was first to write
        except FileExistsError:
            pass
        finally:
            os.unlink(partial)
    except OSError as error:
        raise _cannot_write(manifest.parent, error) from error


def _contents(manifest: Path) -> Contents:
    try:
        found = json.loads(manifest.read_text())
        if found.pop("version") == _VERSION:
            return Contents(**found)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(f"{manifest} is not a manifest of cached logits that this version reads; give another folder")


def _write_all(descriptor: int, raw: bytes, offset: int) -> None:
    view = memoryview(raw)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _cannot_write(folder: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write cached logits to {folder}: {error.strerror}; free space there, or set distill.cache_dir"
    )
