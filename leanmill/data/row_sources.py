"""Where rows of Hugging Face datasets come from: the hub, or JSONL, Parquet, Arrow and text files on disk.

Local files are always read through datasets' streaming readers, so nothing is copied into its
Arrow cache. Nothing is ever unpickled and no dataset's own code is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

from leanmill.core.errors import ConfigError
from leanmill.data.config import HfDataset
from leanmill.data.hub import hub_errors, one_line
from leanmill.data.local_files import LocalFiles, by_kind, local_files


_INSTEAD = "local JSONL, Parquet, Arrow or text files"
_TEXT_DOCUMENT_CHARS = 16_384
_MOST_ROWS_READ_AGAIN = 1_000_000
"""So that a message never holds a run up for more than seconds."""


class RowSource(Protocol):
    """Rows of one dataset, split by split."""

    is_text: bool
    """Whether rows are pieces of text files, in the column `text`."""
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


def row_source(config: HfDataset) -> RowSource:
    """Find the rows of a dataset without reading them.

    Raises:
        ConfigError: Nothing of that name, or files of a format that is not read.
    """
    files = local_files(config)
    return HubRows(config) if files is None else FileRows(config, files)


class HubRows:
    """Rows from the hub."""

    is_text, note = False, ""

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


class FileRows:
    """Rows of files on disk."""

    def __init__(self, config: HfDataset, files: LocalFiles) -> None:
        self._config, self._files = config, files
        self.is_text = files.format == "text"
        self.note, self.warnings = self._describe()

    def rows(self, split: str) -> Any:
        """See `RowSource`."""
        return self._rows_of(self._files.of_split(split, self._config))

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

    def _rows_of(self, files: list[str]) -> Any:
        import datasets

        kind = self._files.format
        if kind == "text":
            return datasets.IterableDataset.from_generator(_text_rows, gen_kwargs={"files": files})
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
        return list(zip(self._files.sizes(), times, strict=True))

    def portable_content(self) -> Any:
        """See `RowSource`."""
        return self._files.sizes()

    def _describe(self) -> tuple[str, list[str]]:
        """Words for the log, and warnings about files that may have been meant as data."""
        used = self._files.of_split(self._config.split, self._config)
        parts = [f"files read: {by_kind(used)}"]
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


def _cannot_read(config: HfDataset, error: Exception) -> ConfigError:
    return ConfigError(f"data.source.path: cannot read {config.path!r}: {one_line(error)}; correct the file")


def _text_rows(files: list[str]) -> Iterator[dict[str, str]]:
    """Cut text files into documents of about 16,384 characters at line ends.

    A file as one document would leave nothing to hold out of a single file, and its lines as
    documents would put an end of text after each.
    """
    for path in files:
        lines: list[str] = []
        size = 0
        with open(path, encoding="utf-8") as file:
            for line in file:
                lines.append(line)
                size += len(line)
                if size >= _TEXT_DOCUMENT_CHARS:
                    yield {"text": "".join(lines)}
                    lines, size = [], 0
        if lines:
            yield {"text": "".join(lines)}


def _is_utf8(path: str) -> bool:
    try:
        with open(path, encoding="utf-8") as file:
            while file.read(1 << 20):
                pass
    except UnicodeDecodeError:
        return False
    return True
