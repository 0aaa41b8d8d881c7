"""One domain as an endless sequence of rows: what every source offers, and the source over indexed tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from leanmill.core.errors import ConfigError
from leanmill.data.config import DataConfig
from leanmill.data.documents import Documents
from leanmill.data.orders import TABLE_SIZE
from leanmill.data.packing import (
    MAX_SHUFFLED_DOCUMENTS,
    NONE,
    Packer,
    RowPlan,
    ShuffledRows,
    SplitPacker,
    WholePacker,
)
from leanmill.data.store import Tokens, TokenStore
from leanmill.data.tally import FAR_ANSWER


IGNORED = -100
"""Label of a position that predicts nothing."""


@dataclass(frozen=True)
class Row:
    """One row of a batch, each array [S] int64."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    is_token: NDArray[np.bool_]
    """False where the row is padded."""
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """What else a batch holds of a row, by name."""


class Source(Protocol):
    """Rows of one domain, by number."""

    name: str
    weight: float
    text_fingerprint: str
    rows_per_epoch: int | None
    """Rows of one pass over the documents; None where only reading them would tell."""

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

    def describe(self) -> str:
        """The counts for the log."""
        ...

    def warnings(self) -> list[str]:
        """What was left out, a line each, with what to do about it."""
        ...


def render_row(plan: RowPlan, tokens: Tokens, is_target: Tokens | None, *, pad_id: int) -> Row:
    """Look the tokens of a plan up."""
    inputs = np.where(plan.inputs == NONE, pad_id, tokens[np.maximum(plan.inputs, 0)]).astype(np.int64)
    has_target = plan.targets != NONE
    at = np.maximum(plan.targets, 0)
    if is_target is not None:
        has_target &= is_target[at]
    labels = np.where(has_target, tokens[at].astype(np.int64), IGNORED)
    return Row(inputs, labels, plan.positions, plan.inputs != NONE)


class MapSource:
    """Rows by random access into a token store: resuming costs nothing."""

    def __init__(self, store: TokenStore, documents: Documents, config: DataConfig, *, pad_id: int, seed: int) -> None:
        """Pack the documents of `store`.

        Raises:
            ConfigError: A document is too long and `long_documents` is `error`.
        """
        self.name, self.weight, self.text_fingerprint = documents.name, documents.weight, store.text_fingerprint
        self._store, self._pad_id, self._documents = store, pad_id, documents
        if store.num_pieces == 1:
            made = make_packer(store.offsets, store.is_target, config, name=self._name_of, seed=seed)
        else:
            made = Packing(self._pair_packer(store, config, seed))
        packer, self._cut_off = made.packer, made.cut_off
        self._packer = ShuffledRows(packer, seed)
        self.rows_per_epoch: int | None = packer.rows_per_epoch
        if packer.rows_per_epoch > TABLE_SIZE or len(store.offsets) - 1 > MAX_SHUFFLED_DOCUMENTS:
            # Before there were shuffles by index, as much text had tables: rows in another order.
            self.text_fingerprint += ", rows by index"

    def _name_of(self, document: int) -> str:
        """Name a document for a person, by its row where that is known."""
        rows = self._store.rows
        if rows is None:
            return f"document {document + 1:,} of {self.name!r}"
        return self._documents.train().locate(int(rows[document]))

    def _pair_packer(self, store: TokenStore, config: DataConfig, seed: int) -> Packer:
        lengths, num_pieces = np.diff(store.offsets), config.num_pieces
        totals = lengths.reshape(-1, num_pieces).sum(1)
        longest = int(totals.argmax())
        if totals[longest] > config.sequence_length:
            row = self._name_of(longest)
            raise ConfigError(
                f"{row} has {totals[longest]} tokens, its prompt {num_pieces} times with an answer each, and all of a "
                f"pair goes into one row of {config.sequence_length}; raise data.sequence_length, or shorten the row"
            )
        return WholePacker(
            store.offsets[:-1], lengths, config.sequence_length, document_mask=True, seed=seed, num_pieces=num_pieces
        )

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

    def describe(self) -> str:
        """See `Source`."""
        cut_off = [f"{len(self._cut_off):,} {FAR_ANSWER}"] if len(self._cut_off) else []
        parts = [
            f"{self._store.num_documents:,} {'documents' if self._store.num_pieces == 1 else 'pairs'}, "
            f"{len(self._store.tokens):,} tokens",
            ", ".join([self._store.tally.describe(), *cut_off]),
            self._documents.note,
        ]
        return "; ".join(part for part in parts if part)

    def warnings(self) -> list[str]:
        """See `Source`."""
        found = [*self._documents.warnings, *self._store.tally.warnings(self.name, self._documents.column)]
        if len(self._cut_off):
            found.append(
                f"{len(self._cut_off):,} conversations of {self.name!r} {FAR_ANSWER} are left out, the first is "
                f"{self._name_of(int(self._cut_off[0]))}; raise data.sequence_length"
            )
        return found


def keeps_documents_whole(config: DataConfig) -> bool:
    """Whether documents are packed whole, or concatenated and cut at row ends."""
    return config.long_document_rule != "split"


@dataclass(frozen=True)
class Packing:
    """Rows, and what is in none of them."""

    packer: Packer
    cut_off: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Numbers of the conversations that truncation leaves no answer, ascending."""


def make_packer(
    offsets: NDArray[np.int64],
    is_target: Tokens | None,
    config: DataConfig,
    *,
    name: Callable[[int], str],
    seed: int,
) -> Packing:
    """Choose the packing that the recipe asks for; `name` names a document for a person.

    Raises:
        ConfigError: See `check_length`, or truncation leaves nothing to predict.
    """
    length, mask = config.sequence_length, config.document_mask
    if not keeps_documents_whole(config):
        return Packing(SplitPacker(offsets, length, document_mask=mask, seed=seed))
    starts, lengths = offsets[:-1], np.diff(offsets)
    longest = int(lengths.argmax())
    check_length(int(lengths[longest]), config, name=lambda: name(longest))
    lengths, cut_off = np.minimum(lengths, length), np.zeros(0, dtype=np.int64)
    if is_target is not None:
        seen = np.concatenate([[0], np.cumsum(np.asarray(is_target), dtype=np.int64)])
        kept = seen[starts + lengths] > seen[starts]
        starts, lengths, cut_off = starts[kept], lengths[kept], np.flatnonzero(~kept)
        if not len(starts):
            raise ConfigError(
                f"data.sequence_length: no conversation reaches its answer within {length} tokens, the first is "
                f"{name(0)}; raise it"
            )
    return Packing(WholePacker(starts, lengths, length, document_mask=mask, seed=seed), cut_off)


def check_length(num_tokens: int, config: DataConfig, *, name: Callable[[], str]) -> None:
    """Refuse a document longer than a row where the recipe says so."""
    if num_tokens <= config.sequence_length or config.long_document_rule == "truncate":
        return
    remedy = {
        "pretrain": " or set data.long_documents: split or truncate",
        "masked": " or set data.long_documents: split or truncate",
        "sft": " or set data.long_documents: truncate",
        "preference": ", or shorten it",
        "sentence_pairs": " or set data.long_documents: truncate",
    }[config.task]
    raise ConfigError(
        f"{name()} has {num_tokens} tokens and a row has {config.sequence_length}; raise data.sequence_length{remedy}"
    )
