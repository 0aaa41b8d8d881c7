"""Rows that are cut into parts, one for each rank of a context-parallel group; and rows that are not."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.parallel.context_attention import NAME, register
from leanmill.parallel.context_plan import context_problems
from leanmill.parallel.engine import Losses, Wanted
from leanmill.parallel.tensor_exchange import gathered, summed


_OF_PLACES = ("input_ids", "labels", "position_ids", "token_mask")
"""What a batch says of each place of its rows."""


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
    """

    def __init__(self, group: dist.ProcessGroup, kind: Literal["ulysses", "all_gather"]) -> None:
        self._group, self._kind = group, kind

    def prepare(self, model: nn.Module) -> None:
        """See `WholeRows`.

        Raises:
            ConfigError: Rows of this model cannot be cut.
        """
        for problem in context_problems(model.config, self._group.size(), self._kind):
            raise ConfigError(problem)
        register(self._group, self._kind)
        model.config._attn_implementation = NAME  # type: ignore[union-attr]

    def part(self, batch: Batch) -> Batch:
        """See `WholeRows`."""
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
        return self.part(batch)

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


def document_ids(batch: Batch) -> Tensor:
    """Return the number of each token's document in its whole row, [B, S] int64."""
    return (batch["position_ids"] == 0).cumsum(-1)
