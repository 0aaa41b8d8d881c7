"""Where each token of a row comes from. Plain index arithmetic on document lengths, no text.

Documents lie one after another in a flat token array. A *row* is a list of pieces of them; its
`RowPlan` names, for each of its positions, the flat index of the input token and of the target.

Rules, for every source and task:

- a document is its tokens and the end-of-text token, which is predicted;
- with `document_mask` the first token of a document is predicted from nothing, `position_ids`
  restart at 0 in each document, and the padding of a row counts as a document of its own;
- a document that is cut at the end of a row keeps its target there (the first token of the next
  row), and its rest starts at position 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from leanmill.data.orders import TABLE_SIZE, Int64, Shuffle, permutation


NONE = -1
"""In index arrays: no such token (padding, or nothing to predict)."""


@dataclass(frozen=True)
class RowPlan:
    """One row, each array [S] int64."""

    inputs: Int64
    """Flat index of the input token, NONE for padding."""
    targets: Int64
    """Flat index of the token to predict, NONE where there is none."""
    positions: Int64
    """`position_ids`."""


def plan_row(starts: Int64, lengths: Int64, sequence_length: int, *, document_mask: bool) -> RowPlan:
    """Lay pieces of documents side by side.

    Args:
        starts: Flat index where each piece starts [P].
        lengths: Tokens of each piece [P]. Each but the first piece starts a document. Together at
            most `sequence_length` + 1; the last of those is only a target, of a row that is cut
            out of a stream of documents. Fewer than `sequence_length` are padded.
        sequence_length: Positions of the row.
        document_mask: See the module.
    """
    before = np.cumsum(lengths) - lengths
    num_tokens = int(lengths.sum())
    index = np.full(sequence_length + 1, NONE, dtype=np.int64)
    index[:num_tokens] = np.repeat(starts - before, lengths) + np.arange(num_tokens)
    targets = index[1:].copy()
    positions = np.arange(sequence_length, dtype=np.int64)
    if document_mask:
        targets[before[1:] - 1] = NONE
        ends = np.append(before, num_tokens)
        ends = ends[ends < sequence_length]
        piece_start = np.zeros(sequence_length, dtype=np.int64)
        piece_start[ends] = ends
        positions -= np.maximum.accumulate(piece_start)
    return RowPlan(index[:-1], targets, positions)


class Packer(Protocol):
    """Random access to the endless rows of one source."""

    rows_per_epoch: int
    """Full rows before documents repeat, at least 1."""

    def row(self, number: int) -> RowPlan:
        """Return the plan of row `number`, from 0."""
        ...


MAX_SHUFFLED_DOCUMENTS = 1 << 22
"""Documents whose order is drawn anew each epoch; of more, the table of their ends takes long to make."""


class SplitPacker:
    """Concatenates documents, shuffled anew each epoch, and cuts them every `sequence_length`.

    Nothing is padded or dropped: the last row of an epoch ends with the first documents of the
    next. Row n is found by two binary searches, whatever n is.

    More than `max_shuffled` documents stay in the order in which they lie: their boundaries are then looked up where
    they are, on disk, and rows are shuffled all the same (`ShuffledRows`).
    """

    def __init__(
        self,
        offsets: Int64,
        sequence_length: int,
        *,
        document_mask: bool,
        seed: int,
        max_shuffled: int = MAX_SHUFFLED_DOCUMENTS,
    ) -> None:
        """Take document boundaries `offsets` [D + 1] from 0: document d is tokens offsets[d]:offsets[d + 1]."""
        self._offsets, self._is_shuffled = offsets, len(offsets) - 1 <= max_shuffled
        self._sequence_length, self._document_mask, self._seed = sequence_length, document_mask, seed
        self.tokens_per_epoch = int(offsets[-1])
        self.rows_per_epoch = max(1, self.tokens_per_epoch // sequence_length)
        self._epochs: dict[int, tuple[Int64, Int64]] = {}

    def row(self, number: int) -> RowPlan:
        """See `Packer`."""
        position, left = number * self._sequence_length, self._sequence_length + 1
        starts, lengths = [], []
        while left:
            epoch, offset = divmod(position, self.tokens_per_epoch)
            piece_starts, piece_lengths = self._pieces(epoch, offset, left)
            starts.append(piece_starts)
            lengths.append(piece_lengths)
            taken = int(piece_lengths.sum())
            position, left = position + taken, left - taken
        return plan_row(
            np.concatenate(starts), np.concatenate(lengths), self._sequence_length, document_mask=self._document_mask
        )

    def _pieces(self, epoch: int, offset: int, num_tokens: int) -> tuple[Int64, Int64]:
        order, ends = self._epoch(epoch) if self._is_shuffled else (None, self._offsets[1:])
        stop = min(offset + num_tokens, self.tokens_per_epoch)
        first = int(np.searchsorted(ends, offset, side="right"))
        last = int(np.searchsorted(ends, stop, side="left"))
        documents = np.arange(first, last + 1) if order is None else order[first : last + 1]
        starts = np.array(self._offsets[documents])
        lengths = self._offsets[documents + 1] - starts
        skipped = offset - (int(ends[first]) - int(lengths[0]))
        lengths[-1] -= int(ends[last]) - stop
        starts[0] += skipped
        lengths[0] -= skipped
        return starts, lengths

    def _epoch(self, epoch: int) -> tuple[Int64, Int64]:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            lengths = np.diff(self._offsets)
            order = permutation(len(lengths), self._seed, epoch)
            self._epochs[epoch] = (order, np.cumsum(lengths[order]))
        return self._epochs[epoch]


class ShuffledRows:
    """The rows of a packer in another order, anew for each `rows_per_epoch` of them.

    Rows cut one after another are neighbours in a few long documents, and the gradients of a step
    made of those are alike.
    """

    def __init__(self, packer: Packer, seed: int, *, table_size: int = TABLE_SIZE) -> None:
        self._packer, self._seed, self._table_size = packer, seed, table_size
        self.rows_per_epoch = packer.rows_per_epoch
        self._orders: dict[int, Shuffle] = {}

    def row(self, number: int) -> RowPlan:
        """See `Packer`."""
        block, place = divmod(number, self.rows_per_epoch)
        if block not in self._orders:
            if len(self._orders) > 1:
                self._orders.pop(min(self._orders))
            # Far from the epochs that the packer shuffles its documents with.
            self._orders[block] = Shuffle(
                self.rows_per_epoch, self._seed, (1 << 40) + block, table_size=self._table_size
            )
        return self._packer.row(block * self.rows_per_epoch + self._orders[block][place])


class WholePacker:
    """Keeps documents whole: rows are filled once by best fit, then shuffled anew each epoch.

    Best-fit decreasing leaves little padding (Ding et al. 2024, "Fewer Truncations Improve
    Language Modeling", arXiv:2404.10830). Packing once keeps the number of rows an epoch constant,
    so that row n is found without walking the epochs before it.
    """

    def __init__(
        self,
        starts: Int64,
        lengths: Int64,
        sequence_length: int,
        *,
        document_mask: bool,
        seed: int,
        num_pieces: int = 1,
    ) -> None:
        """Take documents: flat index of the first token [D] and tokens of each [D].

        Every `num_pieces` neighbours stay together, in their order; they have at most `sequence_length` tokens.
        """
        self._starts, self._lengths = starts.reshape(-1, num_pieces), lengths.reshape(-1, num_pieces)
        self._sequence_length, self._document_mask, self._seed = sequence_length, document_mask, seed
        order = permutation(len(self._lengths), seed, 0)
        self._rows = best_fit(self._lengths.sum(1), order, sequence_length)
        self.rows_per_epoch = len(self._rows)
        self._epochs: dict[int, Int64] = {}

    def row(self, number: int) -> RowPlan:
        """See `Packer`."""
        epoch, index = divmod(number, self.rows_per_epoch)
        if epoch not in self._epochs:
            if len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = permutation(self.rows_per_epoch, self._seed, epoch + 1)
        documents = np.asarray(self._rows[int(self._epochs[epoch][index])], dtype=np.int64)
        return plan_row(
            self._starts[documents].ravel(),
            self._lengths[documents].ravel(),
            self._sequence_length,
            document_mask=self._document_mask,
        )


def best_fit(lengths: Int64, order: Int64, capacity: int) -> list[list[int]]:
    """Pack whole documents into rows, longest first, each into the fullest row that still takes it.

    Args:
        lengths: Tokens of each document [D], each at most `capacity`.
        order: Order among documents of equal length [D].
        capacity: Tokens of a row.

    Returns:
        Documents of each row.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where some row has room for exactly r more tokens
    for document in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[document])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
            rows[row].append(document)
        else:
            room, row = capacity, len(rows)
            rows.append([document])
        if room > length:
            rows_with_room.setdefault(room - length, []).append(row)
            rooms |= 1 << (room - length)
    return rows
