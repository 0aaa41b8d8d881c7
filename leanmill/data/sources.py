"""One domain as an endless sequence of rows."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from leanmill.core.errors import ConfigError
from leanmill.data.config import DataConfig
from leanmill.data.documents import Documents, DocumentStream, StreamingDocuments
from leanmill.data.encoding import Document, Encoded, Encoder
from leanmill.data.packing import (
    NONE,
    Packer,
    RowPlan,
    ShuffledRows,
    SplitPacker,
    WholePacker,
    permutation,
    plan_row,
)
from leanmill.data.store import TokenStore, encode_rows
from leanmill.data.tally import FAR_ANSWER, NO_ANSWER, Tally
from leanmill.parallel.collectives import is_first_rank


log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position that predicts nothing."""


@dataclass(frozen=True)
class Row:
    """One row of a batch, each array [S] int64."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]


class Source(Protocol):
    """Rows of one domain, by number."""

    name: str
    weight: float
    text_fingerprint: str

    def row(self, number: int) -> Row:
        """Return row `number`."""
        ...

    def skip(self, number: int) -> None:
        """Pass over row `number`, which another rank reads."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What cannot be derived from the number of the next row; JSON-able."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        ...

    def passes(self, num_rows: float) -> float | None:
        """How often `num_rows` rows go through the documents; None where only reading them would tell."""
        ...

    def describe(self) -> str:
        """The counts for the log."""
        ...

    def warnings(self) -> list[str]:
        """What was left out, a line each, with what to do about it."""
        ...


def render_row(plan: RowPlan, tokens: NDArray[Any], is_target: NDArray[np.bool_] | None, *, pad_id: int) -> Row:
    """Look the tokens of a plan up."""
    inputs = np.where(plan.inputs == NONE, pad_id, tokens[np.maximum(plan.inputs, 0)]).astype(np.int64)
    has_target = plan.targets != NONE
    at = np.maximum(plan.targets, 0)
    if is_target is not None:
        has_target &= is_target[at]
    labels = np.where(has_target, tokens[at].astype(np.int64), IGNORED)
    return Row(inputs, labels, plan.positions)


class MapSource:
    """Rows by random access into a token store: resuming costs nothing."""

    def __init__(self, store: TokenStore, documents: Documents, config: DataConfig, *, pad_id: int, seed: int) -> None:
        """Pack the documents of `store`.

        Raises:
            ConfigError: A document is too long and `long_documents` is `error`.
        """
        self.name, self.weight, self.text_fingerprint = documents.name, documents.weight, store.text_fingerprint
        self._store, self._pad_id, self._documents = store, pad_id, documents
        packer, self._num_cut_off = make_packer(store.offsets, store.is_target, config, name=self.name, seed=seed)
        self._packer = ShuffledRows(packer, seed)

    def row(self, number: int) -> Row:
        """See `Source`."""
        return render_row(self._packer.row(number), self._store.tokens, self._store.is_target, pad_id=self._pad_id)

    def skip(self, number: int) -> None:
        """See `Source`."""

    def state_dict(self) -> dict[str, Any]:
        """See `Source`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Source`."""

    def passes(self, num_rows: float) -> float:
        """See `Source`."""
        return num_rows / self._packer.rows_per_epoch

    def describe(self) -> str:
        """See `Source`."""
        cut_off = [f"{self._num_cut_off:,} {FAR_ANSWER}"] if self._num_cut_off else []
        parts = [
            f"{len(self._store.offsets) - 1:,} documents, {len(self._store.tokens):,} tokens",
            ", ".join([self._store.tally.describe(), *cut_off]),
            self._documents.note,
        ]
        return "; ".join(part for part in parts if part)

    def warnings(self) -> list[str]:
        """See `Source`."""
        found = [*self._documents.warnings, *self._store.tally.warnings(self.name, self._documents.column)]
        if self._num_cut_off:
            found.append(
                f"{self._num_cut_off:,} conversations of {self.name!r} {FAR_ANSWER} are left out; raise "
                f"data.sequence_length"
            )
        return found


def keeps_documents_whole(config: DataConfig) -> bool:
    """Whether documents are packed whole, or concatenated and cut at row ends."""
    return config.long_document_rule != "split"


def make_packer(
    offsets: NDArray[np.int64], is_target: NDArray[np.bool_] | None, config: DataConfig, *, name: str, seed: int
) -> tuple[Packer, int]:
    """Choose the packing that the recipe asks for; also count the conversations that truncation leaves no answer.

    Raises:
        ConfigError: See `check_length`, or truncation leaves nothing to predict.
    """
    length, mask = config.sequence_length, config.document_mask
    if not keeps_documents_whole(config):
        return SplitPacker(offsets, length, document_mask=mask, seed=seed), 0
    starts, lengths = offsets[:-1], np.diff(offsets)
    check_length(int(lengths.max()), config, name=f"document {int(lengths.argmax())} of {name!r}")
    lengths = np.minimum(lengths, length)
    if is_target is not None:
        seen = np.concatenate([[0], np.cumsum(is_target, dtype=np.int64)])
        kept = seen[starts + lengths] > seen[starts]
        starts, lengths = starts[kept], lengths[kept]
        if not len(starts):
            raise ConfigError(
                f"data.sequence_length: no conversation of {name!r} reaches its answer within {length} tokens; raise it"
            )
    num_cut_off = len(offsets) - 1 - len(starts)
    return WholePacker(starts, lengths, length, document_mask=mask, seed=seed), num_cut_off


def check_length(num_tokens: int, config: DataConfig, *, name: str) -> None:
    """Refuse a document longer than a row where the recipe says so."""
    if num_tokens <= config.sequence_length or config.long_document_rule == "truncate":
        return
    allowed = "truncate" if config.task == "sft" else "split or truncate"
    raise ConfigError(
        f"{name} has {num_tokens} tokens and a row has {config.sequence_length}; raise data.sequence_length or set "
        f"data.long_documents: {allowed}"
    )


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

    def passes(self, num_rows: float) -> None:
        """See `Source`."""

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
            epoch, block, state = epoch + 1, 0, None

    def _encode(
        self, documents: list[tuple[Document, int]], place: dict[str, Any], first: int, stream: DocumentStream
    ) -> list[_Pending]:
        found, rows = [], [row for _, row in documents]
        for index, encoded in enumerate(encode_rows(self._encoder, [d for d, _ in documents], rows, stream)):
            if keeps_documents_whole(self._config):
                check_length(len(encoded.ids), self._config, name=f"a document of {self.name!r}")
            if encoded.is_target is None or encoded.is_target[: self._config.sequence_length].any():
                found.append(_Pending(encoded, {**place, "document": first + index}))
            else:
                stream.tally.drop(FAR_ANSWER if encoded.is_target.any() else NO_ANSWER, rows[index])
        return found

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
