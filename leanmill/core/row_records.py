"""What a frozen model says of rows of the data, on disk: a record a row, whoever wrote it first.

A folder holds `manifest.json`, which says of what data, tokenizer and model they are, and files of
`ROWS_PER_FILE` slots each. A slot is the row's checksum and its record; a slot without a valid checksum is
empty, be it that nothing was written, or that a write was cut short. So a run that is killed leaves no harm,
ranks write side by side without locks, and whatever is there is used by the next run.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanmill.core.errors import ConfigError, RunError


ROWS_PER_FILE = 1024


@dataclass(frozen=True, kw_only=True)
class RecordWords:
    """What messages call the records of a folder."""

    setting: str
    """The key that names the folder, e.g. `distill.cache_dir`."""
    what: str
    """E.g. `logits`."""
    model_setting: str
    """The key that names the model which writes them."""
    terms: Mapping[str, str]
    """What a field of the manifest is called, where not by its name."""
    remedies: Mapping[str, str]
    """What to do where a field differs; else another folder is to be given."""


class RowRecords:
    """The records of one folder.

    Args:
        folder: Where it is.
        fields: Name, little-endian dtype and shape of each array of a record.
        words: See `RecordWords`.
    """

    def __init__(self, folder: Path, fields: Sequence[tuple[str, str, tuple[int, ...]]], words: RecordWords) -> None:
        self._folder, self._words = folder, words
        self._layout = np.dtype([("checksum", "<u4"), ("row", "<u8"), *fields])

    @property
    def bytes_per_row(self) -> int:
        """Bytes on disk of one row."""
        return self._layout.itemsize

    def read(self, row: int) -> Mapping[str, NDArray[Any]] | None:
        """Return copies of a row's arrays, by its global number; None where there are none, or none that are whole."""
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
        return {name: slot[name].copy() for name in (self._layout.names or ())[2:]}

    def write(self, row: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Put a row's arrays in its slot.

        Raises:
            RunError: The folder cannot be written.
        """
        slot = np.zeros(1, self._layout)
        slot["row"] = row + 1  # 0 is a slot that was never written
        for name, value in arrays.items():
            slot[name] = value
        slot["checksum"] = zlib.crc32(slot.tobytes()[4:])
        try:
            descriptor = os.open(self._file(row), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                _write_all(descriptor, slot.tobytes(), row % ROWS_PER_FILE * self._layout.itemsize)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _cannot_write(self._folder, error, self._words) from error

    def _file(self, row: int) -> Path:
        return self._folder / f"rows-{row // ROWS_PER_FILE:08d}.bin"


def settled_manifest(
    folder: Path, wanted: Mapping[str, Any], *, version: int, model: str, writes: bool, words: RecordWords
) -> dict[str, Any]:
    """Return what a folder of records says of itself, after comparing it with what is wanted.

    Every rank calls this. Where several make a new one at once, the first decides what it holds. A field that is
    None on either side is not known, and not compared.

    Args:
        folder: Where it is, or is to be.
        wanted: Fields of the manifest; all of them if `writes`.
        version: Of the manifest and of the records.
        model: The field that names the model; where `{model}_weights` is known on both sides, that is compared alone.
        writes: Whether to make it where there is none.
        words: See `RecordWords`.

    Raises:
        ConfigError: There is none, or it holds something else; the message says what, and what to do.
        RunError: It cannot be made.
    """
    manifest, named = folder / "manifest.json", f"{words.setting} {str(folder)!r}"
    if not manifest.exists():
        if not writes:
            raise ConfigError(
                f"{named} holds no {words.what} (no manifest.json); add {words.model_setting}, and they are written "
                f"while the student trains, or correct the path"
            )
        _make(manifest, {"version": version, **wanted}, words)
    held = _read(manifest, version, words)
    weights = f"{model}_weights"
    for key, value in wanted.items():
        if key == model and held.get(weights) is not None and wanted.get(weights) is not None:
            continue  # its weights say which it is, wherever they lie
        known = held.get(key)
        if value is not None and known is not None and known != value:
            raise ConfigError(
                f"{named} holds {words.what} with {words.terms.get(key, key)} {known}, and this run has {value}; "
                f"{words.remedies.get(key, 'give another folder')}"
            )
    return held


def _make(manifest: Path, contents: Mapping[str, Any], words: RecordWords) -> None:
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=manifest.parent, suffix=".partial")
        with os.fdopen(handle, "w") as file:
            json.dump(contents, file, indent=2)
        os.chmod(partial, 0o644)
        try:
            os.link(partial, manifest)  # unlike a rename it leaves what another run was first to write
        except FileExistsError:
            pass
        finally:
            os.unlink(partial)
    except OSError as error:
        raise _cannot_write(manifest.parent, error, words) from error


def _read(manifest: Path, version: int, words: RecordWords) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(manifest.read_text())
        if found.pop("version") == version:
            return found
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(
        f"{manifest} is not a manifest of cached {words.what} that this version reads; give another folder"
    )


def _write_all(descriptor: int, raw: bytes, offset: int) -> None:
    view = memoryview(raw)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _cannot_write(folder: Path, error: OSError, words: RecordWords) -> RunError:
    return RunError(
        f"cannot write cached {words.what} to {folder}: {error.strerror}; free space there, or set {words.setting}"
    )
