"""The contrastive loss as a term of training: what it is over, and who gathers that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leanmill.core.batches import Batch
from leanmill.core.ledger import Ledger
from leanmill.parallel.collectives import gathered
from leanmill.sentences.contrastive.info_nce import Side, normalisers, part_of_loss, unit


_HASH_BASE = 6364136223846793005
"""Knuth's multiplier of a 64-bit congruential generator."""


@dataclass(frozen=True)
class _Rows:
    """Vectors of rows and what is known of them."""

    vectors: Tensor
    """fp32 [n, texts, H]."""
    is_there: Tensor
    """bool [n, texts]."""
    counts: Tensor
    """bool [n]: whether the row is a pair that belongs together."""
    texts: Tensor
    """int64 [n, texts]: hash of each text."""

    def side(self, *, turned: bool) -> Side:
        """First texts as queries and all others as keys; or, turned, second texts and first ones."""
        vectors = unit(self.vectors)
        keys = slice(0, 1) if turned else slice(1, None)
        return Side(
            queries=vectors[:, 1 if turned else 0],
            keys=vectors[:, keys].flatten(0, 1),
            is_query=self.counts,
            is_key=(self.is_there[:, keys] & self.counts[:, None]).flatten(),
            key_texts=self.texts[:, keys].flatten(),
        )


@dataclass(frozen=True)
class _Pool:
    """What a loss is over: the rows of all ranks, and how much each query's keys come to."""

    sides: tuple[Side, ...]
    log_sums: tuple[Tensor, ...]
    first_row: int
    """Where this rank's rows begin."""
    rows_a_pair: Tensor
    """fp32 scalar: rows divided by those that count."""


class ContrastiveLoss:
    """InfoNCE over the vectors of a step or of a micro-batch, see `info_nce`.

    Args:
        ledger: Of the run; has the step begin with a forward of all micro-batches where it needs one.
        temperature: Of the softmax.
        whole_step: Whether negatives come from all micro-batches of the step.
        symmetric: Whether the second texts are queries too.
        positive_score: What pairs with a score must reach to belong together; None leaves them out.
        weight: Of the loss.
    """

    name = "contrastive"

    def __init__(
        self,
        ledger: Ledger,
        *,
        temperature: float,
        whole_step: bool,
        symmetric: bool,
        positive_score: float | None,
        weight: float,
    ) -> None:
        self.weight, self._ledger, self._temperature = weight, ledger, temperature
        self._turns = (False, True) if symmetric else (False,)
        self._positive_score = positive_score
        self._seen: list[_Rows] = []
        self._pool: _Pool | None = None
        self._next_row = 0
        ledger.before_step(self._begin)
        if whole_step:
            ledger.look_ahead(self._end_look, where=lambda batches: len(batches) > 1)

    def of_embeddings(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Return the sum of the losses of the micro-batch's pairs, times rows per pair; see `EmbeddingLossTerm`."""
        rows = self._rows(embeddings, batch)
        if self._ledger.is_looking:
            self._seen.append(rows)
            return embeddings.new_zeros(())
        pool = self._pool or self._pooled(rows)
        first = pool.first_row + (0 if self._pool is None else self._next_row)
        self._next_row += len(embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            losses = [
                part_of_loss(rows.side(turned=turned), side, first, log_sums, self._temperature)
                for turned, side, log_sums in zip(self._turns, pool.sides, pool.log_sums, strict=True)
            ]
        return torch.stack(losses).mean() * pool.rows_a_pair

    def _begin(self, batches: Sequence[Batch]) -> None:
        self._seen, self._pool, self._next_row = [], None, 0

    def _end_look(self) -> None:
        parts = [[getattr(rows, name) for rows in self._seen] for name in ("vectors", "is_there", "counts", "texts")]
        self._pool, self._seen = self._pooled(_Rows(*(torch.cat(part) for part in parts))), []

    def _rows(self, embeddings: Tensor, batch: Batch) -> _Rows:
        lengths, scores = batch["text_lengths"], batch["scores"][:, 0]
        counts = torch.isnan(scores)
        if self._positive_score is not None:
            counts = counts | (scores >= self._positive_score)
        ids = batch["input_ids"].view(*lengths.shape, -1)
        return _Rows(embeddings, lengths > 0, counts & (batch["labels"][:, 0] != -100), _hashes(ids, lengths))

    @torch.no_grad()
    def _pooled(self, mine: _Rows) -> _Pool:
        """Gather the rows of all ranks, equally many of each. A collective."""
        vectors, is_there, counts, texts = (
            gathered(part) for part in (mine.vectors.detach(), mine.is_there, mine.counts, mine.texts)
        )
        rank, everyone = vectors.rank, _Rows(vectors.all, is_there.all, counts.all, texts.all)
        first = rank * len(mine.counts)
        with torch.autocast(mine.vectors.device.type, enabled=False):
            sides = tuple(everyone.side(turned=turned) for turned in self._turns)
            log_sums = tuple(
                gathered(normalisers(mine.side(turned=turned), side, first, self._temperature)).all
                for turned, side in zip(self._turns, sides, strict=True)
            )
        rows_a_pair = len(everyone.counts) / everyone.counts.sum().clamp(min=1)
        return _Pool(sides, log_sums, first, rows_a_pair)


def _hashes(ids: Tensor, lengths: Tensor) -> Tensor:
    """Return a hash of each text's tokens, int64: of ids [..., S] those before `lengths` [...]."""
    places = torch.arange(ids.shape[-1], device=ids.device)
    factors = _powers(ids.shape[-1]).to(ids.device)
    return torch.where(places < lengths[..., None], (ids + 1) * factors, 0).sum(-1)


def _powers(count: int) -> Tensor:
    """Powers of a multiplier modulo 2^64."""
    found, value = [], 1
    for _ in range(count):
        value = value * _HASH_BASE % 2**64
        found.append(value - 2**64 if value >= 2**63 else value)
    return torch.tensor(found)
