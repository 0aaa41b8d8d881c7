"""Hugging Face datasets, from the hub or from local JSONL, Parquet, Arrow and text files.

Local files are always read through datasets' streaming readers, so nothing is copied into its
Arrow cache; a map-style source is indexed as tokens by us (`store`). Nothing is ever unpickled and
no dataset's own code is run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Literal

from leanmill.core.errors import ConfigError
from leanmill.data.cache import fingerprint
from leanmill.data.config import HfDataset
from leanmill.data.encoding import Document, check_messages, document_digest
from leanmill.data.hub import hub_errors, one_line
from leanmill.data.local_files import by_kind, local_files
from leanmill.data.tally import NO_MESSAGES, NO_TEXT, Tally


_TEXT_DOCUMENT_CHARS = 16_384
_MOST_ROWS_READ_AGAIN = 1_000_000
"""So that a message never holds a run up for more than seconds."""


def open_hf(config: HfDataset, task: Literal["pretrain", "sft"]) -> HfDocuments:
    """Open a dataset without reading it.

    Raises:
        ConfigError: Nothing of that name, or files of a format that is not read.
        RunError: The hub does not answer.
    """
    return HfDocuments(config, task)


class HfDocuments:
    """One dataset, local or from the hub."""

    def __init__(self, config: HfDataset, task: Literal["pretrain", "sft"]) -> None:
        self.name, self.weight, self.streaming = config.name, config.weight, config.streaming
        self.shuffle_buffer = config.shuffle_buffer
        self._config, self._task = config, task
        self._files = local_files(config)
        self._field = config.text_field if task == "pretrain" else config.messages_field
        if self._files is not None and self._files.format == "text":
            self._field = "text"
        self.column = f"column {self._field!r}"
        self.note, self.warnings = self._describe_files()
        # Whatever a new field means, it makes another cache; these do not change which documents there are.
        settings = config.model_dump(exclude={"name", "path", "weight", "streaming", "shuffle_buffer"})
        content = self._content_key()
        self.key = fingerprint([settings, task, content])
        # Without times, which a copy to another machine changes; settings are compared one by one.
        self.stream_key = fingerprint(content if self._files is None else self._files.sizes())

    def train(self) -> HfStream:
        """See `Documents`."""
        return self.stream(None)

    def validation(self) -> HfStream | None:
        """See `Documents`."""
        if self._config.validation_split is not None:
            return HfStream(self, self._config.validation_split, None, held_out=None)
        if self._config.validation_fraction == 0:
            return None
        return HfStream(self, self._config.split, None, held_out=True)

    def stream(self, state: dict[str, Any] | None) -> HfStream:
        """See `StreamingDocuments`."""
        holds_out = self._config.validation_split is None and self._config.validation_fraction > 0
        return HfStream(self, self._config.split, state, held_out=False if holds_out else None)

    def is_held_out(self, document: Document) -> bool:
        """Whether a document of the training split is kept for validation."""
        return int.from_bytes(document_digest(document)[-8:], "big") < self._config.validation_fraction * 2.0**64

    def rows(self, split: str) -> Any:
        """Open a split as an iterable of rows with `state_dict`.

        A new object every time, because what `load_state_dict` sets on one stays set for all later
        iterations of it.
        """
        import datasets

        if self._files is None:
            with hub_errors("data.source.path", self._config.path, "local JSONL, Parquet, Arrow or text files"):
                return datasets.load_dataset(
                    self._config.path, self._config.subset, split=split, streaming=self.streaming
                )
        return self._rows_of(self._files.of_split(split, self._config))

    def locate(self, number: int, split: str) -> str:
        """Name the row with `number` (from 1) of a split for a person; reads up to it again to find its file."""
        if self._files is None:
            return f"row {number:,} of {self._config.path} ({split})"
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

        assert self._files is not None
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

    def document(self, row: dict[str, Any], where: Callable[[], str]) -> Document | None:
        """Return the document of a row; None where the field is empty.

        Args:
            row: Values by column.
            where: Names the row for a person; called only for a message.
        """
        what = "text_field" if self._task == "pretrain" else "messages_field"
        if self._field not in row:
            raise ConfigError(
                f"data.source.{what}: {self._config.path!r} has no column {self._field!r}; it has "
                f"{', '.join(sorted(row))}; set {what} to one of them (read in {where()})"
            )
        value = row[self._field]
        if value is None or value == "" or value == []:
            return None
        if self._task == "sft":
            messages = check_messages(value, lambda: f"data.source.messages_field: {self.column} in {where()}")
            return messages if any(str(turn.get("content", "")).strip() for turn in messages) else None
        if not isinstance(value, str):
            raise ConfigError(
                f"data.source.text_field: {self.column} holds {type(value).__name__}, not text, in {where()}; set "
                f"text_field to a column with text, or task: sft for conversations"
            )
        return value if value.strip() else None

    @property
    def empty_reason(self) -> str:
        """What a row is without, when it has no document."""
        return NO_TEXT if self._task == "pretrain" else NO_MESSAGES

    def cannot_read(self, error: Exception) -> ConfigError:
        """Say which of the local files an error while reading comes from."""
        for path in self._files.files if self._files is not None else []:
            if not path.endswith((".parquet", ".arrow", ".gz", ".zst")) and not _is_utf8(path):
                return ConfigError(f"data.source.path: {path!r} is not UTF-8; convert it, e.g. with iconv -t UTF-8")
        return ConfigError(f"data.source.path: cannot read {self._config.path!r}: {one_line(error)}; correct the file")

    def _content_key(self) -> Any:
        if self._files is not None:
            times = [os.stat(f).st_mtime_ns for f in self._files.files]
            return list(zip(self._files.sizes(), times, strict=True))
        import datasets

        with hub_errors("data.source.path", self._config.path, "local JSONL, Parquet, Arrow or text files"):
            builder = datasets.load_dataset_builder(self._config.path, self._config.subset)
        return [self._config.path, builder.hash]

    def _describe_files(self) -> tuple[str, list[str]]:
        """Words for the log, and warnings about files that may have been meant as data."""
        if self._files is None:
            return "", []
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


class HfStream:
    """Documents of one split from one place on, held-out rows left out or picked."""

    def __init__(
        self, documents: HfDocuments, split: str, state: dict[str, Any] | None, *, held_out: bool | None
    ) -> None:
        self._documents, self._split, self._held_out = documents, split, held_out
        self._rows = documents.rows(split)
        self.tally = Tally()
        if state is not None:
            self._rows.load_state_dict(state["reader"])
            self.tally = Tally.from_state(state["tally"])
        self._loaded_state = state
        self._iterator: Iterator[dict[str, Any]] | None = None

    def state(self) -> dict[str, Any]:
        """See `DocumentStream`."""
        if self._iterator is None and self._loaded_state is not None:
            return self._loaded_state  # datasets reports the beginning until the first row is read
        return {"reader": self._rows.state_dict(), "tally": self.tally.state()}

    def locate(self, number: int) -> str:
        """See `DocumentReader`."""
        return self._documents.locate(number, self._split)

    def __iter__(self) -> HfStream:
        return self

    def __next__(self) -> Document:
        if self._iterator is None:
            self._iterator = iter(self._rows)
        while True:
            try:
                row = next(self._iterator)
            except (StopIteration, ConfigError):
                raise
            except Exception as error:
                raise self._documents.cannot_read(error) from error
            self.tally.num_rows += 1
            document = self._documents.document(row, lambda: self.locate(self.tally.num_rows))
            if document is None:
                self.tally.drop(self._documents.empty_reason, self.tally.num_rows)
            elif self._wanted(document):
                return document
            else:
                self.tally.num_other += 1

    def _wanted(self, document: Document) -> bool:
        return self._held_out is None or self._documents.is_held_out(document) == self._held_out


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
