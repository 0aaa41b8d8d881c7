"""One domain that is read as a stream, as an endless sequence of rows."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from leanmill.data.config import DataConfig
from leanmill.data.documents import DocumentStream, StreamingDocuments
from leanmill.data.encoding import Document, Encoded, Encoder
from leanmill.data.orders import permutation
from leanmill.data.packing import plan_row
from leanmill.data.sources import Row, check_length, keeps_documents_whole, render_row
from leanmill.data.store import encode_rows
from leanmill.data.tally import FAR_ANSWER, MANY_PASSES, NO_ANSWER, Tally, many_passes
from leanmill.parallel.collectives import is_first_rank


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    """An encoded document of a stream and how to find it again."""

    encoded: Encoded
    cursor: dict[str, Any]


class StreamSource:
    """Rows cut from a stream of documents, one after another.

    Every rank reads and tokenises the whole stream and keeps its own rows: the order is then the
    same for any number of ranks, for the price of tokenising as often as there are ranks
    (about 1 million tokens a second and core).

    Documents are shuffled in blocks of `shuffle_buffer`, so a place in the stream is: the dataset's
    own state where the block began, a document in the block, and a token in the document.
    """

    def __init__(
        self,
        documents: StreamingDocuments,
        encoder: Encoder,
        config: DataConfig,
        *,
        pad_id: int,
        seed: int,
    ) -> None:
        self.name, self.weight, self.text_fingerprint = documents.name, documents.weight, documents.stream_key
        self._documents, self._encoder, self._config = documents, encoder, config
        self._pad_id, self._seed = pad_id, seed
        self.rows_per_epoch: int | None = None
        self._warned = set[str]()
        self._start({"epoch": 0, "block": 0, "stream": None, "document": 0, "token": 0})

    def _start(self, cursor: dict[str, Any]) -> None:
        self._cursor = cursor
        self._pending: deque[_Pending] = deque()
        self._reader = self._read(cursor)
        self._token: int = cursor["token"]

    def row(self, number: int) -> Row:
        """See `Source`; numbers must come in order."""
        return self._whole_row() if keeps_documents_whole(self._config) else self._split_row()

    def skip(self, number: int) -> None:
        """See `Source`."""
        self.row(number)

    def state_dict(self) -> dict[str, Any]:
        """See `Source`."""
        if not self._pending:
            self._pull()
        return {**self._pending[0].cursor, "token": self._token}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Source`."""
        self._start(state)

    def describe(self) -> str:
        """See `Source`."""
        stream = f"a stream, shuffled in blocks of {self._documents.shuffle_buffer:,} documents"
        return "; ".join([stream, self._documents.note] if self._documents.note else [stream])

    def warnings(self) -> list[str]:
        """See `Source`."""
        return self._documents.warnings

    def _pull(self) -> None:
        while not (found := next(self._reader)):  # all of a batch may be conversations without an answer
            pass
        self._pending.extend(found)

    def _split_row(self) -> Row:
        size = self._config.sequence_length
        while sum(len(p.encoded.ids) for p in self._pending) - self._token < size + 1:
            self._pull()
        lengths, starts, end = list[int](), list[int](), 0
        for pending in self._pending:
            first = self._token if not lengths else 0
            taken = min(len(pending.encoded.ids) - first, size + 1 - sum(lengths))
            starts.append(end + first)
            lengths.append(taken)
            end += len(pending.encoded.ids)
            if sum(lengths) == size + 1:
                break
        tokens = np.concatenate([p.encoded.ids for p in list(self._pending)[: len(lengths)]])
        plan = plan_row(np.asarray(starts), np.asarray(lengths), size, document_mask=self._config.document_mask)
        self._token += size
        while self._token >= len(self._pending[0].encoded.ids):
            self._token -= len(self._pending.popleft().encoded.ids)
        return render_row(plan, tokens, None, pad_id=self._pad_id)

    def _whole_row(self) -> Row:
        size, used, row = self._config.sequence_length, 0, list[Encoded]()
        while True:
            if not self._pending:
                self._pull()
            length = min(len(self._pending[0].encoded.ids), size)
            if used + length > size:
                break
            row.append(self._pending.popleft().encoded)
            used += length
        lengths = np.asarray([min(len(e.ids), size) for e in row])
        ends = np.cumsum([len(e.ids) for e in row])
        plan = plan_row(ends - [len(e.ids) for e in row], lengths, size, document_mask=self._config.document_mask)
        masks = [e.is_target for e in row if e.is_target is not None]
        return render_row(
            plan, np.concatenate([e.ids for e in row]), np.concatenate(masks) if masks else None, pad_id=self._pad_id
        )

    def _read(self, cursor: dict[str, Any]) -> Iterator[list[_Pending]]:
        """Yield encoded documents from `cursor` on, a few at a time, for ever."""
        first = cursor["document"]
        epoch, block, state = cursor["epoch"], cursor["block"], cursor["stream"]
        while True:
            stream, num_usable = self._documents.stream(state), 0
            while True:
                place = {"epoch": epoch, "block": block, "stream": stream.state()}
                documents = _take(stream, self._documents.shuffle_buffer)
                if not documents:
                    break
                order = permutation(len(documents), self._seed, (epoch << 32) + block).tolist()
                for start in range(first, len(order), _STREAM_BATCH):
                    encoded = self._encode(
                        [documents[i] for i in order[start : start + _STREAM_BATCH]], place, start, stream
                    )
                    num_usable += len(encoded)
                    yield encoded
                first, block = 0, block + 1
                self._warn(stream)
            self._warn(stream)
            if not num_usable and state is None:
                raise stream.tally.nothing_left(self.name, self._documents.column)
            self._end_pass(epoch + 1, stream.tally)
            epoch, block, state = epoch + 1, 0, None

    def _encode(
        self, documents: list[tuple[Document, int]], place: dict[str, Any], first: int, stream: DocumentStream
    ) -> list[_Pending]:
        found, rows = [], [row for _, row in documents]
        for index, encoded in enumerate(encode_rows(self._encoder, [d for d, _ in documents], rows, stream)):
            if keeps_documents_whole(self._config):
                check_length(len(encoded.ids), self._config, name=partial(stream.locate, rows[index]))
            if encoded.is_target is None or encoded.is_target[: self._config.sequence_length].any():
                found.append(_Pending(encoded, {**place, "document": first + index}))
            else:
                stream.tally.drop(FAR_ANSWER if encoded.is_target.any() else NO_ANSWER, rows[index])
        return found

    def _end_pass(self, number: int, tally: Tally) -> None:
        """Say what only a whole pass could tell."""
        if number == 1 and is_first_rank():
            log.info("first pass over %r is done: %s", self.name, tally.describe())
        if number == MANY_PASSES and is_first_rank():
            log.warning("%s", many_passes(self.name, f"more than {number}"))

    def _warn(self, stream: DocumentStream) -> None:
        """Say once for each reason that rows are left out; how many there are only the end of the stream tells."""
        new = {why: dropped for why, dropped in stream.tally.dropped.items() if why not in self._warned}
        if new:
            stream.tally.locate(stream.locate)
            self._warned |= new.keys()
            for line in Tally(stream.tally.num_rows, dropped=new).warnings(self.name, self._documents.column):
                if is_first_rank():
                    log.warning("%s (counted up to here, the stream goes on)", line)


_STREAM_BATCH = 16
"""Documents tokenised at once: milliseconds, hidden beside a step."""


def _take(stream: DocumentStream, count: int) -> list[tuple[Document, int]]:
    """The next `count` documents, each with the number of its row."""
    return [(document, stream.tally.num_rows) for document in islice(stream, count)]
