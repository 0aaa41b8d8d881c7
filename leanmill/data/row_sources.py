"""Where rows of Hugging Face datasets come from: the hub, or JSONL, Parquet, Arrow and text files on disk.

Local files are always read through datasets' streaming readers, so nothing is copied into its
Arrow cache. Nothing is ever unpickled and no dataset's own code is run.
"""

from __future__ import annotations

import hashlib
import os
from itertools import islice
from typing import Any, Protocol

from leanmill.core.errors import ConfigError
from leanmill.data.config import HfDataset
from leanmill.data.hub import hub_errors, one_line
from leanmill.data.local_files import LocalFiles, by_kind, local_files
from leanmill.data.text_files import MAX_DOCUMENT_CHARS, text_rows


_INSTEAD = "local JSONL, Parquet, Arrow or text files"
_MOST_BYTES_HASHED = 1 << 24
"""Of a file; what is evaluated on is mostly less."""
_MOST_ROWS_READ_AGAIN = 1_000_000
"""So that a message never holds a run up for more than seconds."""


class RowSource(Protocol):
    """Rows of one dataset, split by split."""

    is_text: bool
    """Whether rows are those of text files, see `text_rows`."""
    is_remote: bool
    """Whether reading a stream of it asks a network."""
    note: str
    """Words for the log."""
    warnings: list[str]

    def rows(self, split: str) -> Any:
        """Open a split as an iterable of rows with `state_dict`.

        A new object every time, because what `load_state_dict` sets on one stays set for all later
        iterations of it.
        """
        ...

    def locate(self, number: int, split: str) -> str:
        """Name the row with `number` (from 1) of a split for a person."""
        ...

    def cannot_read(self, error: Exception) -> ConfigError:
        """Return what to say of an error while reading."""
        ...

    def content(self) -> Any:
        """Return what changes whenever the rows do; JSON-able."""
        ...

    def portable_content(self) -> Any:
        """Return the same without what a copy to another machine changes."""
        ...

    def bytes_read(self) -> Any:
        """Return what stays the same under other names, too; JSON-able. Reads files, of large ones the beginning."""
        ...


def row_source(config: HfDataset) -> RowSource:
    """Find the rows of a dataset without reading them.

    Raises:
        ConfigError: Nothing of that name, or files of a format that is not read.
    """
    files = local_files(config)
    return HubRows(config) if files is None else FileRows(config, files)


class HubRows:
    """Rows from the hub."""

    is_text, is_remote, note = False, True, ""

    def __init__(self, config: HfDataset) -> None:
        self._config = config
        self.warnings: list[str] = []

    def rows(self, split: str) -> Any:
        """See `RowSource`."""
        import datasets

        config = self._config
        with hub_errors("data.source.path", config.path, _INSTEAD):
            return datasets.load_dataset(config.path, config.subset, split=split, streaming=config.streaming)

    def locate(self, number: int, split: str) -> str:
        """See `RowSource`."""
        return f"row {number:,} of {self._config.path} ({split})"

    def cannot_read(self, error: Exception) -> ConfigError:
        """See `RowSource`."""
        return _cannot_read(self._config, error)

    def content(self) -> Any:
        """See `RowSource`."""
        import datasets

        with hub_errors("data.source.path", self._config.path, _INSTEAD):
            builder = datasets.load_dataset_builder(self._config.path, self._config.subset)
        return [self._config.path, builder.hash]

    def portable_content(self) -> Any:
        """See `RowSource`."""
        return self.content()

    def bytes_read(self) -> Any:
        """See `RowSource`."""
        return self.content()


class FileRows:
    """Rows of files on disk."""

    is_remote = False

    def __init__(self, config: HfDataset, files: LocalFiles) -> None:
        self._config, self._files = config, files
        self.is_text = files.format == "text"
        self.note, self.warnings = self._describe()

    def rows(self, split: str) -> Any:
        """See `RowSource`."""
        files = self._files.of_split(split, self._config)
        return self._rows_of(files, self._share_of_one_file if split == self._config.split else 0.0)

    @property
    def _share_of_one_file(self) -> float:
        """Of a single text file, what is held out at its end; 0 where files go to one side whole."""
        config = self._config
        is_cut = self.is_text and config.holds_out and len(self._files.of_split(config.split, config)) == 1
        return config.validation_fraction if is_cut else 0.0

    def locate(self, number: int, split: str) -> str:
        """Name the row with `number` (from 1) of a split for a person; reads up to it again to find its file."""
        what = "part" if self._files.format == "text" else "row"
        files = self._files.of_split(split, self._config)
        if number > _MOST_ROWS_READ_AGAIN and len(files) > 1:
            return f"{what} {number:,} of {self._config.path}, counted over its {len(files):,} files"
        *before, last = files
        for file in before:
            num_rows = self._count_rows(file, number)
            if num_rows >= number:
                last = file
                break
            number -= num_rows
        return f"{what} {number:,} of {last}"

    def _count_rows(self, file: str, at_most: int) -> int:
        try:
            return sum(1 for _ in islice(self._rows_of([file]), at_most))
        except ConfigError:  # an empty file cannot be opened alone
            return 0

    def _rows_of(self, files: list[str], held_out_share: float = 0.0) -> Any:
        import datasets

        kind = self._files.format
        if kind == "text":
            share = {"held_out_share": held_out_share}
            return datasets.IterableDataset.from_generator(text_rows, gen_kwargs={"files": files, **share})
        try:
            return datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        except StopIteration as error:
            raise ConfigError(
                f"data.source.path: {self._config.path!r} holds no rows; give data that is not empty"
            ) from error
        except Exception as error:
            raise self.cannot_read(error) from error

    def cannot_read(self, error: Exception) -> ConfigError:
        """Say which of the files an error while reading comes from."""
        for path in self._files.files:
            if not path.endswith((".parquet", ".arrow", ".gz", ".zst")) and not _is_utf8(path):
                return ConfigError(f"data.source.path: {path!r} is not UTF-8; convert it, e.g. with iconv -t UTF-8")
        return _cannot_read(self._config, error)

    def content(self) -> Any:
        """See `RowSource`."""
        times = [os.stat(f).st_mtime_ns for f in self._files.files]
        return [*self._kind_of_documents, *zip(self._files.sizes(), times, strict=True)]

    def portable_content(self) -> Any:
        """See `RowSource`."""
        return [*self._kind_of_documents, *self._files.sizes()]

    def bytes_read(self) -> Any:
        """See `RowSource`."""
        return [*self._kind_of_documents, *([os.path.getsize(f), _hash_of_beginning(f)] for f in self._files.files)]

    @property
    def _kind_of_documents(self) -> list[str]:
        # So that nothing is taken for the same that was read when text files were cut into pieces.
        return ["whole files"] if self.is_text else []

    def _describe(self) -> tuple[str, list[str]]:
        """Words for the log, and warnings about files that may have been meant as data."""
        used = self._files.of_split(self._config.split, self._config)
        parts = [f"files read: {by_kind(used)}"]
        if self._share_of_one_file:
            parts.append(f"of this one file, the last {self._share_of_one_file:.3g} are held out")
        long = [f for f in used if self.is_text and os.path.getsize(f) > MAX_DOCUMENT_CHARS]
        if long:
            parts.append(f"files cut at line ends every {MAX_DOCUMENT_CHARS:,} characters: {len(long):,}")
        warnings = []
        if len(used) < len(self._files.files):
            parts.append(f"files of other splits: {len(self._files.files) - len(used):,}")
        if self._files.ignored:
            parts.append(f"files ignored: {by_kind(self._files.ignored)}")
        if surprising := self._files.surprising:
            warnings.append(
                f"{by_kind(surprising)} in {self._config.path!r} are no {self._files.format} files and are ignored, "
                f"e.g. {surprising[0]}; convert them, or give them a source of their own in a mixture"
            )
        return "; ".join(parts), warnings


def _hash_of_beginning(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(_MOST_BYTES_HASHED), digest_size=8).hexdigest()


def _cannot_read(config: HfDataset, error: Exception) -> ConfigError:
    return ConfigError(f"data.source.path: cannot read {config.path!r}: {one_line(error)}; correct the file")


def _is_utf8(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            while file.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return False
    return True
