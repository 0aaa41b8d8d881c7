"""The training rows of a run: one global order, whatever the number of ranks and the batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.data.identity import Identity
from leanmill.data.masking import Masking
from leanmill.data.mixture import MixtureSchedule
from leanmill.data.sources import Row, Source
from leanmill.data.subset import RowSubset
from leanmill.data.tally import MANY_PASSES, many_passes


_FIELDS = ("input_ids", "labels", "position_ids")


class TrainData:
    """Rows by global number: row g is the same in every run of the same data, tokenizer and seed."""

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        sequence_length: int,
        seed: int,
        identity: Identity,
        pads_rows: bool = False,
        masking: Masking | None = None,
        subset: RowSubset | None = None,
    ) -> None:
        """Start at row 0.

        Args:
            sources: The domains.
            sequence_length: Tokens of a row.
            seed: Seed of the order.
            identity: What decides the rows.
            pads_rows: Whether rows may hold padding.
            masking: Hides tokens, which are then the labels.
            subset: Which rows of the sources are read; all of them otherwise.
        """
        self._pads_rows, self._masking, self._subset = pads_rows, masking, subset
        self.sequence_length = sequence_length
        self._sources = list(sources)
        self._schedule = MixtureSchedule([source.weight for source in sources], seed)
        self.identity = identity

    @property
    def fingerprint(self) -> str:
        """Hash of the text, tokenizer, seed and settings: equal fingerprints give equal rows."""
        return self.identity.fingerprint

    @property
    def position_rows(self) -> int:
        """Rows handed out so far over all ranks."""
        return sum(self._schedule.counts)

    @property
    def position_tokens(self) -> int:
        """Tokens handed out so far over all ranks, padding included."""
        return self.position_rows * self.sequence_length

    @property
    def rows_per_epoch(self) -> int | None:
        """Rows of all sources together in one pass over the data, or in one round of a subset.

        None where one of them is a stream.
        """
        rows = [self._of_epoch(source) for source in self._sources]
        return None if None in rows else sum(n for n in rows if n is not None)

    def _of_epoch(self, source: Source) -> int | None:
        per_pass = source.rows_per_epoch
        return per_pass if self._subset is None or per_pass is None else self._subset.rows(per_pass)

    def epochs(self, num_rows: int) -> float | None:
        """Passes over the data, or rounds of a subset, that so many rows are; None where one source is a stream."""
        return None if self.rows_per_epoch is None else num_rows / self.rows_per_epoch

    def next_rows(self, num_rows: int, *, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
        """Advance by `num_rows` rows over all ranks and return this rank's share of them.

        Rank r gets the r-th contiguous part. Every rank must make the same calls.

        Args:
            num_rows: Rows over all ranks; a multiple of `world_size`.
            rank: This rank.
            world_size: Number of ranks that share the rows.

        Returns:
            `input_ids`, `labels` (shifted, or of hidden tokens; -100 where nothing is predicted) and `position_ids`,
            each [num_rows / world_size, S] int64 on the CPU, and `row_ids` [num_rows / world_size]
            int64: the number of each row in the global order. Where rows may be padded, also `token_mask`,
            bool [num_rows / world_size, S]: false in padding.

        Raises:
            ConfigError: `num_rows` does not divide.
        """
        if num_rows % world_size or num_rows < 1:
            raise ConfigError(
                f"{num_rows} rows of {self.sequence_length} tokens cannot be shared by {world_size} ranks; make "
                f"batch.tokens_per_step a multiple of data.sequence_length x {world_size}"
            )
        share = num_rows // world_size
        first = self.position_rows + rank * share
        mine: list[Row] = []
        for index in range(num_rows):
            source, number = self._schedule.next()
            if index // share == rank:
                mine.append(self._sources[source].row(self._number(source, number)))
            else:
                self._sources[source].skip(number)
        batch = stack_rows(mine) | {"row_ids": torch.arange(first, first + share)}
        if self._pads_rows:
            batch["token_mask"] = torch.from_numpy(np.stack([row.is_token for row in mine]))
        return batch if self._masking is None else self._masking.hide(batch, batch["row_ids"])

    def _number(self, source: int, number: int) -> int:
        """Which row of a source its `number`-th is."""
        per_pass = self._sources[source].rows_per_epoch
        if self._subset is None or per_pass is None:
            return number
        return self._subset.number(number, per_pass, source)

    def skip_rows(self, num_rows: int) -> None:
        """Advance by rows that nobody reads."""
        for _ in range(num_rows):
            source, number = self._schedule.next()
            self._sources[source].skip(number)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what the data is; JSON-able, the same on every rank."""
        return {
            "position_tokens": self.position_tokens,
            "rows": dict(zip(self._names, self._schedule.counts, strict=True)),
            "sources": {source.name: source.state_dict() for source in self._sources},
            "identity": self.identity.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, with any number of ranks and any batch size.

        Raises:
            ConfigError: The checkpoint was trained on other data; the message says what differs.
        """
        self.identity.check(state["identity"])
        self._schedule.counts = [int(state["rows"][name]) for name in self._names]
        for source in self._sources:
            source.load_state_dict(state["sources"][source.name])

    def describe(self, num_rows: int = 0) -> str:
        """One line for the log: each domain, its share, what was read and how often `num_rows` rows go through it."""
        parts = [
            f"{source.name} {share:.0%} ({'; '.join([source.describe(), *([f'{n:.3g} passes'] if n else [])])})"
            for source, share, n in self._passes(num_rows)
        ]
        if self._subset is not None:
            parts.append(self._subset.describe())
        return f"data {self.fingerprint}: {'; '.join(parts)}"

    def warnings(self, num_rows: int) -> list[str]:
        """What a person may not expect of a run of `num_rows` rows: text left out, text seen too often."""
        found = [line for source in self._sources for line in source.warnings()]
        for source, _, passes in self._passes(num_rows):
            if passes is not None and passes > MANY_PASSES:
                found.append(many_passes(source.name, f"{passes:,.0f}"))
        return found

    def _passes(self, num_rows: int) -> list[tuple[Source, float, float | None]]:
        """Each source, its share of the rows and its passes in a run of `num_rows`."""
        total = sum(source.weight for source in self._sources)
        shares = [(source, source.weight / total, source.rows_per_epoch) for source in self._sources]
        return [(source, share, self._times(num_rows * share, rows)) for source, share, rows in shares]

    def _times(self, num_rows: float, per_pass: int | None) -> float | None:
        """How often each row that is read of a source is, in so many rows of it."""
        if per_pass is None:
            return None
        return num_rows / per_pass if self._subset is None else self._subset.passes(num_rows, per_pass)

    @property
    def _names(self) -> list[str]:
        return [source.name for source in self._sources]


def stack_rows(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return rows as one batch, each tensor [R, S] int64, and their extras."""
    batch = {name: np.stack([getattr(row, name) for row in rows]) for name in _FIELDS}
    extras = {name: np.stack([row.extras[name] for row in rows]) for name in rows[0].extras}
    return {name: torch.from_numpy(value) for name, value in {**batch, **extras}.items()}
