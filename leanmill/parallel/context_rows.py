"""Rows that are cut into parts, one for each rank of a context-parallel group; and rows that are not."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.parallel.context_attention import NAME, ContextAttention, register
from leanmill.parallel.context_documents import Groups
from leanmill.parallel.context_plan import context_problems, pair_cost
from leanmill.parallel.context_shares import choose_shares, part_bounds
from leanmill.parallel.engine import Losses, Wanted
from leanmill.parallel.layout import Layout
from leanmill.parallel.tensor_exchange import gathered, summed


_OF_PLACES = ("input_ids", "labels", "position_ids", "token_mask")
"""What a batch says of each place of its rows."""
NO_TARGET = -100
"""The label of a token that predicts nothing."""


class WholeRows:
    """Every rank has whole rows."""

    def prepare(self, model: nn.Module) -> None:
        """Change a model on meta to what its rows will be."""

    def part(self, batch: Batch) -> Batch:
        """Return what this rank computes of a micro-batch."""
        return batch

    def given(self, batch: Batch, wanted: Wanted) -> Batch:
        """Return what this rank computes of a batch without gradients."""
        return batch

    def total(self, losses: Losses) -> Losses:
        """Return sums over this rank's part as sums over whole rows."""
        return losses

    def found(self, losses: Losses, wanted: Wanted) -> Losses:
        """Return what a forward without gradients gave, of whole rows."""
        return losses


class CutRows(WholeRows):
    """Rank r of a group has places [r S / n, (r + 1) S / n) of every row [S]; the model sees no more.

    Labels are those of the row, shifted before it was cut, and positions count from where its documents begin.
    Documents are numbered on the whole row, where each begins at position 0.

    Args:
        group: The ranks that share rows.
        kind: How attention comes to the rest of them, see `layout.cp_attention`.
        tp: Ranks that share heads of each part.
    """

    def __init__(self, group: dist.ProcessGroup, kind: Literal["ulysses", "all_gather"], tp: int = 1) -> None:
        self._group, self._kind, self._tp = group, kind, tp

    def prepare(self, model: nn.Module) -> None:
        """See `WholeRows`.

        Raises:
            ConfigError: Rows of this model cannot be cut.
        """
        for problem in context_problems(model.config, self._group.size(), self._kind, self._tp):
            raise ConfigError(problem)
        register(self._attention())
        model.config._attn_implementation = NAME  # type: ignore[union-attr]

    def _attention(self) -> ContextAttention:
        return ContextAttention(self._group, self._kind)

    def part(self, batch: Batch) -> Batch:
        """See `WholeRows`."""
        return self._even_part(batch)

    def _even_part(self, batch: Batch) -> Batch:
        size, length = self._group.size(), batch["input_ids"].shape[1]
        if length % size:
            raise ConfigError(f"rows of {length} tokens cannot be cut into layout.cp={size} equal parts")
        first = self._group.rank() * (length // size)
        mine = {
            name: value[:, first : first + length // size].contiguous() if name in _OF_PLACES else value
            for name, value in batch.items()
        }
        return mine | {"document_ids": document_ids(batch)}

    def given(self, batch: Batch, wanted: Wanted) -> Batch:
        """See `WholeRows`; what is asked of single places is computed from whole rows."""
        if wanted == "next_logits":
            return {**batch, "document_ids": document_ids(batch)}
        return self._even_part(batch)

    def total(self, losses: Losses) -> Losses:
        """See `WholeRows`."""
        # One small sum, in fp64 so that it rounds nothing that one process would not.
        sums = summed(torch.stack([value.double() for value in losses.values()]), self._group)
        return {name: value.to(old.dtype) for (name, old), value in zip(losses.items(), sums, strict=True)}

    def found(self, losses: Losses, wanted: Wanted) -> Losses:
        """See `WholeRows`."""
        if wanted == "losses":
            return self.total(losses)
        if wanted == "token_losses":
            return {name: gathered(value, 1, self._group) for name, value in losses.items()}
        return losses


class CutDocuments(CutRows):
    """A rank has whole documents of a micro-batch, and parts of those that would keep it longer than the others.

    All ranks of a group choose the same shares from the lengths. What is padding is left out. Batches without gradients
    are cut as `CutRows` cuts them, since they may ask for the loss of every place.

    Args:
        group: The ranks that share rows.
        kind: See `layout.cp_attention`.
        groups: Of each divisor of their number above 1, the neighbours of this rank that may share a document.
    """

    def __init__(self, group: dist.ProcessGroup, kind: Literal["ulysses", "all_gather"], groups: Groups) -> None:
        super().__init__(group, kind)
        self._groups, self._pair_cost = groups, 0.0

    def prepare(self, model: nn.Module) -> None:
        """See `CutRows`."""
        super().prepare(model)
        self._pair_cost = pair_cost(model.config, sum(p.numel() for p in model.parameters()))

    def _attention(self) -> ContextAttention:
        return ContextAttention(self._group, self._kind, self._groups)

    def part(self, batch: Batch) -> Batch:
        """See `WholeRows`: one row, of this rank's tokens."""
        found = documents(batch)
        shares = choose_shares([length for _, length in found], self._group.size(), self._pair_cost)
        rank, index, parts = self._group.rank(), [], []
        # In the order in which they travel, the same on all ranks that share some.
        for share, (begin, length) in sorted(zip(shares, found, strict=True), key=lambda one: -one[0].degree):
            if share.first_rank <= rank < share.first_rank + share.degree:
                first, end = part_bounds(length, share.degree, rank - share.first_rank)
                index.append(torch.arange(begin + first, begin + end))
                parts.append((share.degree, length))
        nothing = sum(map(len, index)) == 0
        if nothing:
            # Every rank computes every layer; a token without a target adds nothing.
            index.append(torch.zeros(1, dtype=torch.int64))
            parts.append((1, 1))
        places = torch.cat(index).to(batch["input_ids"].device)
        mine = {name: value.reshape(-1)[places][None] if name in _OF_PLACES else value for name, value in batch.items()}
        if nothing:
            mine["labels"] = torch.full_like(mine["labels"], NO_TARGET)
        return mine | {"document_parts": torch.tensor(parts, dtype=torch.int64)}


def rows_of(layout: Layout) -> WholeRows:
    """Return what ranks have of rows under a layout. A collective where they share them."""
    if layout.cp == 1:
        return WholeRows()
    group = layout.rows.get_group("cp")
    if layout.cp_rows == "even":
        return CutRows(group, layout.cp_attention, layout.tp)
    degrees = [degree for degree in range(2, layout.cp) if layout.cp % degree == 0]
    groups = {degree: layout.neighbours(degree) for degree in degrees} | {layout.cp: group}
    return CutDocuments(group, layout.cp_attention, groups)


def documents(batch: Batch) -> list[tuple[int, int]]:
    """Return where each document of a micro-batch begins, counted over all its rows, and its tokens; no padding."""
    positions = batch["position_ids"].cpu()
    begins = positions == 0
    begins[:, 0] = True
    firsts = begins.flatten().nonzero().flatten()
    lengths = firsts.diff(append=firsts.new_tensor([positions.numel()]))
    if "token_mask" in batch:
        is_real = batch["token_mask"].cpu().flatten()[firsts]
        firsts, lengths = firsts[is_real], lengths[is_real]
    return list(zip(firsts.tolist(), lengths.tolist(), strict=True))


def document_ids(batch: Batch) -> Tensor:
    """Return the number of each token's document in its whole row, [B, S] int64."""
    return (batch["position_ids"] == 0).cumsum(-1)
