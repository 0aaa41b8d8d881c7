"""Selective language modelling as a batch rule: labels of tokens not chosen become -100."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanmill.core.batches import Batch, BatchRule, Score
from leanmill.core.errors import RunError
from leanmill.core.rules import StepContext
from leanmill.core.selection import distinct_keys, kth_largest
from leanmill.core.technique import InstallContext
from leanmill.core.vocabulary import check_vocabulary
from leanmill.parallel.collectives import sum_over_ranks


Scope = Literal["step", "micro_batch"]
Reduce = Callable[[Tensor], Tensor]


class Rho1Rule(BatchRule):
    """Keeps the labels of the tokens with the largest excess loss L_student - L_reference.

    Args:
        context: Loads the reference, and knows the student's vocabulary.
        reference: Folder or hub name.
        kept_share: Share of the tokens with a label that keep it.
        scope: Among which tokens the share is taken.
        warmup_share: Share of the run's steps, from its start, that keep all labels.
    """

    name = "rho1"

    def __init__(
        self,
        context: InstallContext,
        *,
        reference: str,
        kept_share: float = 0.6,
        scope: Scope = "step",
        warmup_share: float = 0.0,
    ) -> None:
        self.reference_path, self.kept_share, self.scope, self.warmup_share = reference, kept_share, scope, warmup_share
        self._context = context
        self._reference: nn.Module | None = None
        self._sums: Tensor | None = None
        """Over all ranks, in the last step: labels, labels kept, excess loss, excess loss of those kept."""

    def change_batches(self, batches: Sequence[Batch], context: StepContext, score: Score) -> Sequence[Batch]:
        """See `BatchRule`.

        Raises:
            ConfigError: The reference's vocabulary is not the student's.
            RunError: The reference gives no number for the first tokens.
        """
        if context.step < self.warmup_share * context.num_steps:
            return batches
        of_reference = [self._score_by_reference(batch, score) for batch in batches]
        excess = [score(batch) - losses for batch, losses in zip(batches, of_reference, strict=True)]
        chosen = choose(excess, batches, self.kept_share, self.scope, sum_over_ranks)
        self._measure(excess, batches, chosen)
        return [
            {**batch, "labels": torch.where(kept, batch["labels"], -100)}
            for batch, kept in zip(batches, chosen, strict=True)
        ]

    def metrics(self) -> Mapping[str, float]:
        """Return of the last step the share of tokens kept, and the mean excess loss of all and of those kept."""
        if self._sums is None:
            return {}
        num_labels, num_kept, of_all, of_kept = self._sums.tolist()
        return {
            "kept_share": num_kept / max(num_labels, 1),
            "excess_loss": of_all / max(num_labels, 1),
            "excess_loss_kept": of_kept / max(num_kept, 1),
        }

    def _measure(self, excess: Sequence[Tensor], batches: Sequence[Batch], chosen: Sequence[Tensor]) -> None:
        sums = [
            torch.stack(
                [(batch["labels"] != -100).sum(), kept.sum(), values.sum(), torch.where(kept, values, 0.0).sum()]
            )
            for values, batch, kept in zip(excess, batches, chosen, strict=True)
        ]
        self._sums = sum_over_ranks(torch.stack(sums).sum(0))

    def _score_by_reference(self, batch: Batch, score: Score) -> Tensor:
        if self._reference is not None:
            return score(batch, self._reference)
        reference: Any = self._context.load_frozen_model(self.reference_path)
        check_vocabulary(self._context, self.reference_path, reference.config.vocab_size, role="reference")
        losses = score(batch, reference)
        # Once, since it waits for the device: of a reference without numbers any choice would look like one.
        if not sum_over_ranks(losses.sum()).isfinite():
            raise RunError(
                f"reference {self.reference_path} has no finite loss on the first tokens of this run; check its "
                f"weights, or set train.precision=fp32 if they overflow in bf16"
            )
        self._reference = reference
        return losses


def choose(
    excess: Sequence[Tensor], batches: Sequence[Batch], kept_share: float, scope: Scope, reduce: Reduce
) -> list[Tensor]:
    """Return which tokens are among the `kept_share` of largest excess loss, bool [B, S] a micro-batch.

    Of N tokens with a label round(`kept_share` x N) are chosen, at least one. Of equal losses the
    token that comes first in the data is taken, so that the choice depends on no number of ranks.

    Args:
        excess: [B, S] a micro-batch, fp32.
        batches: The micro-batches, with `labels` and `row_ids`.
        kept_share: In (0, 1).
        scope: Among which tokens.
        reduce: Sums a small tensor over the ranks; for `step` only.
    """
    keys = [_keys(values, batch) for values, batch in zip(excess, batches, strict=True)]
    if scope == "step":
        threshold = _threshold(torch.cat([one.flatten() for one in keys]), kept_share, reduce)
        return [(one >= threshold) & (one > 0) for one in keys]
    return [(one >= _threshold(one, kept_share, lambda counts: counts)) & (one > 0) for one in keys]


def _keys(excess: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Keys > 0 in the order of the losses, all different; 0 where there is no label."""
    length = excess.shape[1]
    index = batch["row_ids"].unsqueeze(1) * length + torch.arange(length, device=excess.device)
    return torch.where(batch["labels"] != -100, distinct_keys(excess, index), 0)


def _threshold(keys: Tensor, kept_share: float, reduce: Reduce) -> Tensor:
    """The smallest key that is chosen."""
    num_labels = reduce((keys > 0).sum())
    return kth_largest(keys, (num_labels.double() * kept_share).round().long().clamp(min=1), reduce)
