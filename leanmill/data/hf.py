"""Hugging Face datasets, from the hub or from local JSONL, Parquet, Arrow and text files.

A map-style source is indexed as tokens by us (`store`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.data.cache import cached_folder, fingerprint, read_json, write_json
from leanmill.data.config import HfDataset, Task
from leanmill.data.encoding import Document, document_digest
from leanmill.data.row_fields import RowField
from leanmill.data.row_sources import row_source
from leanmill.data.tally import Tally


_VERSION = 1
"""Raise when the same rows would be shared out otherwise."""


def open_hf(config: HfDataset, task: Task, root: Path) -> HfDocuments:
    """Open a dataset without reading it; `root` is the folder of all caches.

    Raises:
        ConfigError: Nothing of that name, or files of a format that is not read.
        RunError: The hub does not answer.
    """
    return HfDocuments(config, task, root)


class HfDocuments:
    """One dataset, local or from the hub."""

    def __init__(self, config: HfDataset, task: Task, root: Path) -> None:
        self.name, self.weight, self.streaming = config.name, config.weight, config.streaming
        self.shuffle_buffer = config.shuffle_buffer
        self._config, self._root = config, root
        self.source = row_source(config)
        self.field = RowField(config, task, is_text=self.source.is_text)
        self.column, self.note, self.warnings = self.field.column, self.source.note, self.source.warnings
        # Whatever a new field means, it makes another cache; these do not change which documents there are.
        settings = config.model_dump(exclude={"name", "path", "weight", "streaming", "shuffle_buffer"})
        self.key = fingerprint([settings, task, self.source.content()])
        self._validation = None if config.validation_path is None else HfDocuments(config.of_validation(), task, root)
        if self._validation is not None:
            self.key = fingerprint([self.key, self._validation.key])
        self.held_out_content = None if self._validation is None else fingerprint(self._validation.source.bytes_read())
        # Without times, which a copy to another machine changes; settings are compared one by one.
        self.stream_key = fingerprint(self.source.portable_content())

    def train(self) -> HfStream:
        """See `Documents`."""
        return self.stream(None)

    def validation(self) -> HfStream | None:
        """See `Documents`."""
        if self._validation is not None:
            return self._validation.train()
        if self._config.validation_split is not None:
            return HfStream(self, self._config.validation_split, None, held_out=None)
        if self._config.validation_fraction == 0:
            return None
        return HfStream(self, self._config.split, None, held_out=True)

    def stream(self, state: dict[str, Any] | None) -> HfStream:
        """See `StreamingDocuments`."""
        return HfStream(self, self._config.split, state, held_out=False if self._config.holds_out else None)

    def is_held_out(self, row: dict[str, Any], document: Document) -> bool:
        """Whether a document of the training split is kept for validation."""
        if self.source.is_text and row["is_tail"] is not None:
            return bool(row["is_tail"])
        return self._hash(row, document) < self._held_out_below

    def _hash(self, row: dict[str, Any], document: Document) -> int:
        """64 bits of what decides on which side a document lies: its content, or that of its file."""
        digest = bytes.fromhex(row["file"]) if self.source.is_text else document_digest(document)
        return int.from_bytes(digest[-8:], "big")

    @cached_property
    def _held_out_below(self) -> int:
        """Hashes below this are held out: the share asked for, or what it takes for both sides to have a document."""
        asked = int(self._config.validation_fraction * 2.0**64)
        if self.streaming and self.source.is_remote:
            return asked

        def build(folder: Path) -> None:
            write_json(folder / "border.json", self._find_border(asked))

        folder = cached_folder(self._root, "held_out", fingerprint([_VERSION, self.key]), build)
        return int(read_json(folder / "border.json"))

    def _find_border(self, asked: int) -> int:
        """Read until both sides have a document; of a few rows, to their end."""
        lowest, highest = 1 << 64, -1
        stream = HfStream(self, self._config.split, None, held_out=None)
        for document in stream:
            found = self._hash(stream.row, document)
            lowest, highest = min(lowest, found), max(highest, found)
            if lowest < asked <= highest:
                return asked
        if lowest >= highest:  # one document, and its copies: nothing to share out
            return asked
        return lowest + 1 if lowest >= asked else highest


class HfStream:
    """Documents of one split from one place on, held-out rows left out or picked."""

    def __init__(
        self, documents: HfDocuments, split: str, state: dict[str, Any] | None, *, held_out: bool | None
    ) -> None:
        self._documents, self._split, self._held_out = documents, split, held_out
        self._rows = documents.source.rows(split)
        self.tally = Tally()
        if state is not None:
            self._rows.load_state_dict(state["reader"])
            self.tally = Tally.from_state(state["tally"])
        self.row: dict[str, Any] = {}
        """The one just read."""
        self._loaded_state = state
        self._iterator: Iterator[dict[str, Any]] | None = None

    def state(self) -> dict[str, Any]:
        """See `DocumentStream`."""
        if self._iterator is None and self._loaded_state is not None:
            return self._loaded_state  # datasets reports the beginning until the first row is read
        return {"reader": self._rows.state_dict(), "tally": self.tally.state()}

    def locate(self, number: int) -> str:
        """See `DocumentReader`."""
        return self._documents.source.locate(number, self._split)

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
                raise self._documents.source.cannot_read(error) from error
            self.row = row
            self.tally.num_rows += 1
            document = self._documents.field.document(row, lambda: self.locate(self.tally.num_rows))
            if document is None:
                self.tally.drop(self._documents.field.empty_reason, self.tally.num_rows)
            elif self._held_out is None or self._documents.is_held_out(row, document) == self._held_out:
                return document
            else:
                self.tally.num_other += 1
