"""Hugging Face datasets, from the hub or from local JSONL, Parquet, Arrow and text files.

Local files are always read through datasets' streaming readers, so nothing is copied into its
Arrow cache; a map-style source is indexed as tokens by us (`store`). Nothing is ever unpickled and
no dataset's own code is run.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.data.cache import fingerprint
from leanmill.data.config import HfDataset
from leanmill.data.encoding import Document, check_messages, document_digest
from leanmill.data.hub import hub_errors, one_line


_FORMATS: dict[str, tuple[str, ...]] = {
    "json": (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
    "text": (".txt", ".md", ".text"),
}
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".npy", ".npz", ".joblib")
_ENDINGS = tuple(chain.from_iterable(_FORMATS.values()))
_OTHER_SPLITS = {"validation", "valid", "val", "dev", "test", "eval"}
_TEXT_DOCUMENT_CHARS = 16_384


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
        self.shuffle_buffer, self.note = config.shuffle_buffer, ""
        self._config, self._task = config, task
        self._field = config.text_field if task == "pretrain" else config.messages_field
        self._files = _local_files(config)
        # Whatever a new field means, it makes another cache; these do not change which documents there are.
        settings = config.model_dump(exclude={"name", "path", "weight", "streaming", "shuffle_buffer"})
        self.key = fingerprint([settings, task, self._content_key()])
        self.stream_key = self._stream_key()

    def train(self) -> Iterator[Document]:
        """See `Documents`."""
        stream = self.stream(None)
        while True:
            try:
                yield next(stream)
            except StopIteration:
                return

    def validation(self) -> Iterator[Document] | None:
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
        kind, files = self._files
        files = _files_of_split(files, split, self._config)
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

    def document(self, row: dict[str, Any]) -> Document | None:
        """Return the document of a row; None where the field is empty."""
        field = "text" if self._files is not None and self._files[0] == "text" else self._field
        what = "text_field" if self._task == "pretrain" else "messages_field"
        if field not in row:
            raise ConfigError(
                f"data.source.{what}: {self._config.path!r} has no column {field!r}; it has {', '.join(sorted(row))}; "
                f"set {what} to one of them"
            )
        value = row[field]
        if value is None or value == "" or value == []:
            return None
        if self._task == "sft":
            return check_messages(value, f"data.source.messages_field: {field!r} of {self._config.path!r}")
        if not isinstance(value, str):
            raise ConfigError(
                f"data.source.text_field: column {field!r} of {self._config.path!r} holds {type(value).__name__}, not "
                f"text; set text_field to a column with text, or task: sft for conversations"
            )
        return value if value.strip() else None

    def cannot_read(self, error: Exception) -> ConfigError:
        """Say which of the local files an error while reading comes from."""
        for path in self._files[1] if self._files is not None else []:
            if not path.endswith((".parquet", ".arrow", ".gz", ".zst")) and not _is_utf8(path):
                return ConfigError(f"data.source.path: {path!r} is not UTF-8; convert it, e.g. with iconv -t UTF-8")
        return ConfigError(f"data.source.path: cannot read {self._config.path!r}: {one_line(error)}; correct the file")

    def _content_key(self) -> Any:
        if self._files is not None:
            return [[os.path.basename(f), os.path.getsize(f), os.stat(f).st_mtime_ns] for f in self._files[1]]
        import datasets

        with hub_errors("data.source.path", self._config.path, "local JSONL, Parquet, Arrow or text files"):
            builder = datasets.load_dataset_builder(self._config.path, self._config.subset)
        return [self._config.path, builder.hash]

    def _stream_key(self) -> str:
        """Names and sizes of local files, without their times, which a copy to another machine changes."""
        if self._files is None:
            return self.key
        return fingerprint([[os.path.basename(f), os.path.getsize(f)] for f in self._files[1]])


class HfStream:
    """Documents of one split from one place on, held-out rows left out or picked."""

    def __init__(
        self, documents: HfDocuments, split: str, state: dict[str, Any] | None, *, held_out: bool | None
    ) -> None:
        self._documents, self._held_out = documents, held_out
        self._rows = documents.rows(split)
        if state is not None:
            self._rows.load_state_dict(state)
        self._loaded_state = state
        self._iterator: Iterator[dict[str, Any]] | None = None

    def state(self) -> dict[str, Any]:
        """See `DocumentStream`."""
        if self._iterator is None and self._loaded_state is not None:
            return self._loaded_state  # datasets reports the beginning until the first row is read
        return self._rows.state_dict()  # type: ignore[no-any-return]

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
            document = self._documents.document(row)
            if document is not None and self._wanted(document):
                return document

    def _wanted(self, document: Document) -> bool:
        return self._held_out is None or self._documents.is_held_out(document) == self._held_out


def _local_files(config: HfDataset) -> tuple[str, list[str]] | None:
    """Return the format and the files of a local source; None where `path` is a hub name."""
    path = str(expand_user(config.path))
    if os.path.isdir(path):
        found = sorted(str(p) for p in Path(path).rglob("*") if p.is_file() and not _is_hidden(p, path))
    elif os.path.isfile(path):
        found = [path]
    elif glob.has_magic(path):
        found = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
    elif path.startswith(("/", "./", "../")) or path.endswith((*_ENDINGS, *_PICKLES)) or path.count("/") > 1:
        raise ConfigError(f"data.source.path: no file or folder {config.path!r}; give a file, folder, glob or hub name")
    else:
        return None
    return _one_format(config, found, is_file=os.path.isfile(path))


def _one_format(config: HfDataset, found: list[str], *, is_file: bool) -> tuple[str, list[str]]:
    if is_file and config.format != "auto":
        return config.format, found
    wanted = _FORMATS if config.format == "auto" else {config.format: _FORMATS[config.format]}
    by_format = {kind: [f for f in found if f.endswith(endings)] for kind, endings in wanted.items()}
    # READMEs and licences lie beside data and are not it.
    data = {kind: files for kind, files in by_format.items() if files and kind != "text"}
    data = data or {kind: files for kind, files in by_format.items() if files}
    if "json" in data:
        only_data = [f for f in data["json"] if os.path.basename(f) not in ("dataset_info.json", "state.json")]
        data = {kind: files for kind, files in {**data, "json": only_data}.items() if files}
    if len(data) > 1:
        raise ConfigError(
            f"data.source.path: {config.path!r} holds files of several formats ({', '.join(data)}); set "
            f"data.source.format to one"
        )
    if not data:
        endings = sorted({os.path.splitext(f)[1] or "no ending" for f in found})
        pickled = any(f.endswith(_PICKLES) for f in found)
        only = f" (only {', '.join(endings[:5])})" if endings else ""
        refused = "; pickles are never loaded" if pickled else ""
        raise ConfigError(
            f"data.source.path: {config.path!r} holds no {'/'.join(wanted)} file{only}{refused}; convert it to .jsonl, "
            f".parquet, .arrow or .txt"
        )
    return next(iter(data.items()))


def _is_hidden(path: Path, root: str) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _files_of_split(files: list[str], split: str, config: HfDataset) -> list[str]:
    """Files whose path names the split; files that name no split at all are `train`."""
    root = os.path.commonpath([os.path.dirname(f) for f in files])
    words = {f: set(re.split(r"[^a-z0-9]+", os.path.relpath(f, root).lower())) for f in files}
    chosen = [f for f in files if split.lower() in words[f]]
    if not chosen and split == "train":
        chosen = [f for f in files if not words[f] & _OTHER_SPLITS] or (files if len(files) == 1 else [])
    if not chosen:
        raise ConfigError(
            f"data.source.split: no file of {config.path!r} is named after the split {split!r}; name one e.g. "
            f"{split}.jsonl, or leave validation_split out to hold out a share of the rows"
        )
    return chosen


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
