"""What a micro-batch is, and rules that change the micro-batches of a step before it trains on them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from leanmill.core.rules import StepContext, StepRule


if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, "Tensor"]
"""One micro-batch on its device: `input_ids` [B, S] int64, `labels` [B, S] int64 (already shifted:
`labels[b, t]` is the target of position t, -100 where there is none), `position_ids` [B, S] int64
(restarting at 0 in each document). In training also `row_ids` [B] int64: numbers of the rows in the
order of the data, the same on any number of ranks. Where rows may be padded, in training also `token_mask`
[B, S] bool: false in padding. A position without a label is a token all the same.
Of rows that ranks share, a model gets its part of all these and `document_ids` [B, S] int64 of whole rows; or, cut by
document, one row of whole documents and parts, with `document_parts` (see `leanmill.parallel.context_documents`).
Of rows of sentence pairs `text_lengths` [B, texts] int64 and `scores` [B, 1] fp32, see
`leanmill.data.sentence_rows`."""


class Score(Protocol):
    """Cross-entropy of every token under a model, without gradients."""

    def __call__(self, batch: Batch, model: nn.Module | None = None, *, adapters: bool = True) -> Tensor:
        """Return the losses [B, S], fp32, 0 where there is no label. A collective under a sharding engine.

        Args:
            batch: One micro-batch.
            model: A frozen model that `InstallContext.load_frozen_model` gave; None is the model in
                training, in eval mode, with its techniques and the weights of this moment.
            adapters: Whether that has its adapters; see `leanmill.core.adapters`.
        """
        ...

    def next_logits(self, batch: Batch) -> Tensor:
        """Return the logits [B, V] of the model in training for the tokens that follow positions `batch["last"]`.

        What stands behind those positions changes nothing. A collective under a sharding engine.

        Args:
            batch: `input_ids` and `position_ids` [B, S], and `last` [B] int64.
        """
        ...


class BatchRule(StepRule):
    """A step rule that changes what its step trains on.

    It does so after every `begin_step` and before targets are counted: the step's loss is the mean over
    the labels that rules leave. A token is taken out by the label -100.
    """

    @abstractmethod
    def change_batches(self, batches: Sequence[Batch], context: StepContext, score: Score) -> Sequence[Batch]:
        """Return as many micro-batches as were given; those given stay as they are.

        Args:
            batches: This rank's micro-batches of the step, on its device, in the order of the data.
            context: The step.
            score: Losses of tokens. Ranks have equally many micro-batches, and must call it equally often.
        """
