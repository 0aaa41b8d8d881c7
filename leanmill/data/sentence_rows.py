"""Rows of sentence pairs: every text at its own part of the row, padded.

Part j of a row of k texts and S positions begins at j x S / k. `text_lengths` [k] says how many tokens each text has,
0 for a negative that is not there; `scores` [1] is NaN where none is given. A row's only label is at its first
position, so that as many labels as pairs are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from leanmill.core.errors import ConfigError
from leanmill.data.config import DataConfig
from leanmill.data.documents import Documents
from leanmill.data.encoding import Encoded, Encoder
from leanmill.data.evaluation import EvalDomain
from leanmill.data.orders import permutation
from leanmill.data.sources import IGNORED, Row
from leanmill.data.store import Tokens, TokenStore, encode_rows
from leanmill.data.train_data import stack_rows


class SentenceRows:
    """One domain of pairs, shuffled anew each epoch; see `Source`.

    Args:
        store: Tokens of all pairs.
        documents: Where they came from.
        config: The `data` section.
        pad_id: What padding holds.
        seed: Of the order.

    Raises:
        ConfigError: A text is longer than its part of a row, and `long_documents` is `error`.
    """

    def __init__(self, store: TokenStore, documents: Documents, config: DataConfig, *, pad_id: int, seed: int) -> None:
        assert store.rows is not None
        self.name, self.weight, self.text_fingerprint = documents.name, documents.weight, store.text_fingerprint
        self.rows_per_epoch: int | None = len(store.rows)
        self._store, self._documents, self._config = store, documents, config
        self._pad_id, self._seed = pad_id, seed
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))
        lengths = np.diff(store.offsets).reshape(-1, config.num_pieces).max(1)
        longest = int(lengths.argmax())
        _check_length(int(lengths[longest]), config, documents, int(store.rows[longest]))

    def row(self, number: int) -> Row:
        """See `Source`."""
        store, num_texts = self._store, self._config.num_pieces
        assert store.scores is not None
        epoch, index = divmod(number, len(store.scores))
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(store.scores), self._seed, epoch))
        pair = int(self._order[1][index])
        bounds = store.offsets[pair * num_texts : (pair + 1) * num_texts + 1]
        texts = [_part(store.tokens, int(a), int(b)) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        return sentence_row(texts, float(store.scores[pair]), self._config, pad_id=self._pad_id)

    def skip(self, number: int) -> None:
        """See `Source`."""

    def state_dict(self) -> dict[str, Any]:
        """See `Source`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Source`."""

    def describe(self) -> str:
        """See `Source`."""
        assert self._store.scores is not None
        num_scored = int(np.isfinite(self._store.scores).sum())
        scored = f", {num_scored:,} with a score" if num_scored else ""
        counts = f"{len(self._store.scores):,} sentence pairs{scored}, {len(self._store.tokens):,} tokens"
        return "; ".join(part for part in (counts, self._store.tally.describe(), self._documents.note) if part)

    def warnings(self) -> list[str]:
        """See `Source`."""
        return [*self._documents.warnings, *self._store.tally.warnings(self.name, self._documents.column)]


def sentence_row(texts: Sequence[NDArray[np.int64]], score: float, config: DataConfig, *, pad_id: int) -> Row:
    """Lay the texts of a pair side by side, each cut to its part of a row; its last token stays the last."""
    num_texts, room = config.num_pieces, config.text_length
    ids = np.full((num_texts, room), pad_id, dtype=np.int64)
    lengths = np.zeros(num_texts, dtype=np.int64)
    for index, text in enumerate(texts):
        lengths[index] = min(len(text), room)
        ids[index, : lengths[index]] = text[: lengths[index]]
        if len(text) > room:
            ids[index, -1] = text[-1]
    places = np.tile(np.arange(room, dtype=np.int64), num_texts)
    labels = np.full(num_texts * room, IGNORED, dtype=np.int64)
    labels[0] = ids[0, 0]
    is_token = (np.arange(room) < lengths[:, None]).ravel()
    extras: dict[str, NDArray[Any]] = {"text_lengths": lengths, "scores": np.asarray([score], dtype=np.float32)}
    return Row(ids.ravel(), labels, places, is_token, extras)


def sentence_domain(
    documents: Documents, encoder: Encoder, config: DataConfig, *, num_tokens: int, pad_id: int
) -> EvalDomain | None:
    """Return the first held-out pairs of a domain, at least two; None where the recipe holds nothing out.

    Args:
        documents: The domain.
        encoder: Makes tokens of its texts.
        config: The `data` section.
        num_tokens: How many positions of rows they may take.
        pad_id: What padding holds.

    Raises:
        ConfigError: Nothing is held out, or a text is too long.
    """
    reader = documents.validation()
    if reader is None:
        return None
    num_rows = max(2, num_tokens // config.sequence_length)
    rows: list[Row] = []
    for document in reader:
        number = reader.tally.num_rows
        (encoded,) = encode_rows(encoder, [document], [number], reader)
        _check_length(max(encoded.piece_lengths), config, documents, number)
        rows.append(sentence_row(_texts(encoded), encoded.score, config, pad_id=pad_id))
        if len(rows) == num_rows:
            break
    if len(rows) < 2:
        raise ConfigError(
            f"data.source: {len(rows)} pairs of {documents.name!r} are held out, and an evaluation compares at least "
            f"two; raise validation_fraction, name a validation_split, or set validation_fraction: 0 for none"
        )
    batch = stack_rows(rows) | {"token_mask": torch.from_numpy(np.stack([row.is_token for row in rows]))}
    return EvalDomain(name=documents.name, rows=batch, num_bytes=0, order0_bits_per_byte=0.0, num_rows_asked=num_rows)


def _part(tokens: Tokens, first: int, last: int) -> NDArray[np.int64]:
    return np.asarray(tokens[first:last]).astype(np.int64)


def _texts(encoded: Encoded) -> list[NDArray[np.int64]]:
    return np.split(encoded.ids, np.cumsum(encoded.piece_lengths)[:-1])


def _check_length(num_tokens: int, config: DataConfig, documents: Documents, row: int) -> None:
    if num_tokens > config.text_length and config.long_document_rule == "error":
        raise ConfigError(
            f"a text of {documents.train().locate(row)} has {num_tokens} tokens, and each of the {config.num_pieces} "
            f"texts of a row of data.sequence_length={config.sequence_length} has {config.text_length}; raise it to "
            f"{num_tokens * config.num_pieces}, or set data.long_documents: truncate"
        )
