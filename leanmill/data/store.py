"""Tokenised documents on disk: one flat memory-mapped array that every rank and run shares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from leanmill.core.errors import ConfigError
from leanmill.data.cache import cached_folder, fingerprint, read_json, write_json
from leanmill.data.documents import DocumentReader, Documents
from leanmill.data.encoding import BadDocument, Document, Encoded, Encoder, batches, document_digest
from leanmill.data.tally import NO_ANSWER, Tally


_VERSION = 2
"""Raise when the same documents would give other tokens."""
MISMATCH_VERSION = 2
"""Raise when the same pairs would get other mismatched answers."""


class Tokens(Protocol):
    """A 1-D array, which may lie in several files."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> NDArray[Any]: ...


@dataclass(frozen=True)
class TokenStore:
    """Tokens of all training documents of one domain."""

    tokens: Tokens
    """[N] uint16 or uint32, memory-mapped."""
    is_target: Tokens | None
    """[N], memory-mapped; None where every token may be predicted."""
    offsets: NDArray[np.int64]
    """Boundaries of documents, or of the conversations of pairs, [D x pieces + 1]."""
    rows: Tokens | None
    """[D], numbers of the rows that documents are of; None of plain text."""
    text_fingerprint: str
    tally: Tally
    """What became of the rows."""
    num_pieces: int = 1
    """Conversations or texts of a document."""
    scores: NDArray[np.float32] | None = None
    """[D], how alike the texts of sentence pairs are, NaN where that is not said; None of other documents."""

    @property
    def num_documents(self) -> int:
        """Documents, or pairs."""
        return (len(self.offsets) - 1) // self.num_pieces


def token_store(
    documents: Documents, encoder: Encoder, *, vocab_size: int, tokenizer_key: str, root: Path
) -> TokenStore:
    """Return the tokens of a map-style domain, tokenising it where that is not cached.

    Raises:
        ConfigError: The domain is empty or cannot be read.
    """
    parts = [_VERSION, documents.key, documents.name, encoder.task, tokenizer_key, vocab_size]
    if encoder.num_pieces > 1:
        parts.append(encoder.num_pieces)
    if encoder.task == "preference" and encoder.num_pieces == 3:
        parts.append(MISMATCH_VERSION)
    key = fingerprint(parts)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    folder = cached_folder(root, "tokens", key, lambda path: _build(documents, encoder, dtype, path))
    facts = read_json(folder / "facts.json")
    is_target = None
    if encoder.has_targets:
        is_target = np.memmap(folder / "is_target.bin", dtype=np.bool_, mode="r")
    return TokenStore(
        np.memmap(folder / "tokens.bin", dtype=dtype, mode="r"),
        is_target,
        np.load(folder / "offsets.npy", mmap_mode="r", allow_pickle=False),
        _mapped(folder / "rows.npy"),
        facts["text"],
        Tally.from_state(facts["tally"]),
        encoder.num_pieces,
        np.load(folder / "scores.npy", allow_pickle=False) if encoder.task == "sentence_pairs" else None,
    )


def _mapped(path: Path) -> NDArray[np.int64] | None:
    """Map an array; None of one that is not there."""
    return np.load(path, mmap_mode="r", allow_pickle=False) if path.is_file() else None


def _build(documents: Documents, encoder: Encoder, dtype: type[np.unsignedinteger[Any]], folder: Path) -> None:
    text, lengths, reader = hashlib.blake2b(digest_size=8), list[int](), documents.train()
    tally, rows, kept, scores = reader.tally, list[int](), list[int](), list[float]()
    before: Document | None = None

    def hashed() -> Iterator[Document]:
        for document in reader:
            text.update(document_digest(document))
            rows.append(tally.num_rows)
            yield document

    with (folder / "tokens.bin").open("wb") as tokens, (folder / "is_target.bin").open("wb") as targets:
        for batch in batches(hashed()):
            for row, encoded in zip(rows, encode_rows(encoder, batch, rows, reader, before), strict=True):
                if encoded.is_target is not None:
                    if not encoded.is_target.any():
                        tally.drop(NO_ANSWER, row)
                        continue
                    encoded.is_target.tofile(targets)
                encoded.ids.astype(dtype).tofile(tokens)
                lengths += encoded.piece_lengths or (len(encoded.ids),)
                kept.append(row)
                scores.append(encoded.score)
            rows.clear()
            before = batch[-1]
    tally.locate(reader.locate)
    if not lengths:
        raise tally.nothing_left(documents.name, documents.column)
    if encoder.num_pieces == 3 and len(kept) == 1:
        raise ConfigError(
            f"data.mismatched_answers: {documents.name!r} has a single pair that can be used, and no other one whose "
            f"answer it could get; add pairs, or use dpo, which needs none"
        )
    np.save(folder / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    if encoder.names_rows:
        np.save(folder / "rows.npy", np.asarray(kept, dtype=np.int64))
    if encoder.task == "sentence_pairs":
        np.save(folder / "scores.npy", np.asarray(scores, dtype=np.float32))
    write_json(folder / "facts.json", {"text": text.hexdigest(), "tally": tally.state()})


def encode_rows(
    encoder: Encoder,
    documents: list[Document],
    rows: Sequence[int],
    reader: DocumentReader,
    before: Document | None = None,
) -> list[Encoded]:
    """Encode documents that came from `rows` of `reader`; see `Encoder.encode` for `before`.

    Raises:
        ConfigError: The chat template refuses one; the message names the row.
    """
    try:
        return encoder.encode(documents, before)
    except BadDocument as error:
        raise ConfigError(f"{reader.locate(rows[error.index])}: {error}") from error
