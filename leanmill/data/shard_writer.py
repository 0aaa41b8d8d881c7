"""Writing the tokens of one domain in shards, and going on behind the last whole one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from leanmill.core.errors import ConfigError
from leanmill.data.cache import read_json, write_json
from leanmill.data.documents import DocumentReader, Documents
from leanmill.data.encoding import Document, Encoded, Encoder, batches, document_digest
from leanmill.data.evaluation import measure_row, nothing_held_out
from leanmill.data.offsets import write_offsets
from leanmill.data.prepared import HELD_OUT, shard_file
from leanmill.data.store import encode_rows
from leanmill.data.tally import NO_ANSWER, Tally


MOST_HELD_OUT_TOKENS = 1 << 22
"""Held-out documents are kept up to this many tokens a domain."""


@dataclass(frozen=True)
class _Batch:
    """Neighbouring documents, and what was read up to their end."""

    documents: list[Document]
    rows: list[int]
    before: Document | None
    """The one ahead of them."""
    num_read: int
    digest: str


class DomainWriter:
    """The preparation of one domain in one folder.

    Args:
        documents: The domain.
        encoder: Makes tokens of its documents.
        folder: Made where it is not there.
        kind: Has the `dtype` of tokens, see `prepare_data`.
        shard_tokens: About how many tokens a shard has.
        tell: Called with a line at the end of every shard.
    """

    def __init__(
        self,
        documents: Documents,
        encoder: Encoder,
        folder: Path,
        kind: dict[str, Any],
        shard_tokens: int,
        tell: Callable[[str], None],
    ) -> None:
        self._documents, self._encoder, self._folder, self._tell = documents, encoder, folder, tell
        self._dtype, self._shard_tokens = np.dtype(kind["dtype"]), shard_tokens
        self._unanswered = Tally()

    def prepare(self) -> tuple[dict[str, Any], int]:
        """Write what is not there yet; return the facts for the manifest, and how many shards were there."""
        self._folder.mkdir(exist_ok=True)
        done = self._done()
        reader, digest = (
            self._documents.train(),
            done[-1]["digest"] if done else hashlib.blake2b(digest_size=8).hexdigest(),
        )
        sizes = [facts["num_tokens"] for facts in done]
        for facts in self._shards(reader, done):
            sizes.append(facts["num_tokens"])
            digest = facts["digest"]
            self._tell(f"{self._documents.name}: shard {len(sizes):,}, {sum(sizes):,} tokens")
        tally = reader.tally
        tally.dropped |= self._unanswered.dropped
        tally.locate(reader.locate)
        if not sizes:
            raise tally.nothing_left(self._documents.name, self._documents.column)
        write_offsets(self._folder, [self._folder / shard_file("lengths", n, "npy") for n in range(len(sizes))])
        self._hold_out()
        name, weight = self._documents.name, self._documents.weight
        facts = {"name": name, "weight": weight, "folder": self._folder.name, "shards": sizes}
        held_out = _digest(self._folder / HELD_OUT)
        return {**facts, "text": digest, "held_out": held_out, "tally": tally.state()}, len(done)

    def _done(self) -> list[dict[str, Any]]:
        """The facts of the shards that are whole, up to the first that is not."""
        paths = (self._folder / shard_file("shard", number, "json") for number in range(1 << 30))
        found: list[dict[str, Any]] = []
        for path in paths:
            if not path.is_file():
                return found
            found.append(read_json(path))
        return found

    def _shards(self, reader: DocumentReader, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        if done:
            self._unanswered = Tally.from_state(done[-1]["unanswered"])
        number, parts, size = len(done), list[tuple[_Batch, list[Encoded], list[int]]](), 0
        for batch, encoded in self._encoded(reader, done[-1] if done else None):
            kept = self._kept(batch, encoded)
            parts.append((batch, *kept))
            size += sum(len(one.ids) for one in kept[0])
            if size >= self._shard_tokens:
                yield self._write(number, parts)
                number, parts, size = number + 1, [], 0
        if size:
            yield self._write(number, parts)

    def _encoded(self, reader: DocumentReader, last: dict[str, Any] | None) -> Iterator[tuple[_Batch, list[Encoded]]]:
        """Yield batches as tokens; while one is taken care of the next is being tokenised."""
        pending: tuple[_Batch, Future[list[Encoded]]] | None = None
        with ThreadPoolExecutor(1) as pool:
            for batch in self._batches(reader, last):
                future = pool.submit(encode_rows, self._encoder, batch.documents, batch.rows, reader, batch.before)
                if pending is not None:
                    yield pending[0], pending[1].result()
                pending = batch, future
            if pending is not None:
                yield pending[0], pending[1].result()

    def _batches(self, reader: DocumentReader, last: dict[str, Any] | None) -> Iterator[_Batch]:
        text, num_read = hashlib.blake2b(digest_size=8), 0
        before: Document | None = None
        if last is not None:
            for document in islice(reader, last["num_read"]):
                text.update(document_digest(document))
                num_read += 1
                before = document
            if text.hexdigest() != last["digest"]:
                raise ConfigError(
                    f"the text of {self._documents.name!r} is not what {self._folder.parent} was begun with; name a "
                    f"new folder to prepare it anew"
                )
        rows = list[int]()

        def hashed() -> Iterator[Document]:
            for document in reader:
                text.update(document_digest(document))
                rows.append(reader.tally.num_rows)
                yield document

        # Grouped as elsewhere: with which other answer a pair goes depends on its group.
        for documents in batches(hashed()):
            num_read += len(documents)
            yield _Batch(documents, rows.copy(), before, num_read, text.hexdigest())
            rows.clear()
            before = documents[-1]

    def _kept(self, batch: _Batch, encoded: list[Encoded]) -> tuple[list[Encoded], list[int]]:
        kept, rows = [], []
        for one, row in zip(encoded, batch.rows, strict=True):
            if one.is_target is None or one.is_target.any():
                kept.append(one)
                rows.append(row)
            else:
                self._unanswered.drop(NO_ANSWER, row)
        return kept, rows

    def _write(self, number: int, parts: list[tuple[_Batch, list[Encoded], list[int]]]) -> dict[str, Any]:
        """Write a shard, its facts last: without them it is not there."""
        encoded = [one for _, kept, _ in parts for one in kept]
        tokens = np.concatenate([one.ids for one in encoded]).astype(self._dtype)
        targets = [one.is_target for one in encoded if one.is_target is not None]
        lengths = [length for one in encoded for length in one.piece_lengths or (len(one.ids),)]
        tokens.tofile(self._folder / shard_file("tokens", number, "bin"))
        if targets:
            np.concatenate(targets).tofile(self._folder / shard_file("targets", number, "bin"))
        np.save(self._folder / shard_file("lengths", number, "npy"), np.asarray(lengths, dtype=np.int64))
        if self._encoder.names_rows:
            rows = np.asarray([row for *_, rows in parts for row in rows], dtype=np.int64)
            np.save(self._folder / shard_file("rows", number, "npy"), rows)
        for path in self._folder.glob(f"*-{number:05d}.*"):
            sync(path)
        last = parts[-1][0]
        place = {"num_read": last.num_read, "digest": last.digest, "unanswered": self._unanswered.state()}
        facts = {"num_tokens": len(tokens), **place}
        write_whole(self._folder / shard_file("shard", number, "json"), facts)
        return facts

    def _hold_out(self) -> None:
        folder, held_out = self._folder / HELD_OUT, self._documents.validation()
        if folder.is_dir() or held_out is None:
            return
        measured, num_tokens = [], 0
        for document in held_out:
            one = measure_row(self._encoder, document, held_out)
            if one is not None:
                measured.append(one)
                num_tokens += len(one.encoded.ids)
            if num_tokens >= MOST_HELD_OUT_TOKENS:
                break
        if not measured:
            raise nothing_held_out(self._documents, self._encoder, held_out)
        temporary = folder.with_suffix(".part")
        temporary.mkdir(exist_ok=True)
        arrays = {
            "lengths": np.asarray([len(one.encoded.ids) for one in measured], dtype=np.int64),
            "tokens": np.concatenate([one.encoded.ids for one in measured]).astype(self._dtype),
            "num_bytes": np.concatenate([one.num_bytes for one in measured]).astype(np.int32),
            "text": np.concatenate([one.text for one in measured]),
        }
        targets = [one.encoded.is_target for one in measured if one.encoded.is_target is not None]
        if targets:
            arrays["targets"] = np.concatenate(targets)
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array)
            sync(temporary / f"{name}.npy")
        os.replace(temporary, folder)


def write_whole(path: Path, value: Any) -> None:
    """Write JSON to a file that is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.part")
    write_json(temporary, value)
    sync(temporary)
    os.replace(temporary, path)


def _digest(folder: Path) -> str | None:
    """Hash of the files of a folder; None of one that is not there."""
    if not folder.is_dir():
        return None
    found = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        found.update(path.read_bytes())
    return found.hexdigest()


def sync(path: Path) -> None:
    """Return once a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
