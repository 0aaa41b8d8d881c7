"""Loss terms: what techniques add to the training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError


if TYPE_CHECKING:
    from torch import Tensor


class LossTerm(Protocol):
    """A per-token loss added to the training loss.

    The trainer calls `prepare` once a micro-batch, without gradients and outside the model's
    forward, then the term itself once for each chunk of tokens, so that logits of shape
    [tokens, vocabulary] never exist as a whole.
    """

    name: str
    weight: float

    def prepare(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return extra tensors [B, S, ...] that the term needs; chunked along with the tokens."""
        ...

    def __call__(self, logits: Tensor, labels: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """Return the fp32 sum of the loss over tokens whose label is not -100.

        Args:
            logits: Student logits [N, V], any float dtype.
            labels: Targets [N] int64, -100 where ignored.
            extras: What `prepare` returned, flattened to [N, ...] and cut like the tokens.
        """
        ...


@runtime_checkable
class GroupLossTerm(LossTerm, Protocol):
    """A term that compares tokens with each other: each chunk holds whole groups of neighbouring positions of a row."""

    group_tokens: int
    """Positions of a group; divides the tokens of a row."""


def check_whole_groups(key: str, group_tokens: int, batch: Batch) -> None:
    """Refuse rows that are no whole number of groups.

    Args:
        key: Of the recipe, that `group_tokens` was given as.
        group_tokens: Neighbouring positions of a group.
        batch: Whose rows are asked about.

    Raises:
        ConfigError: See above.
    """
    length = batch["input_ids"].shape[1]
    if length % group_tokens:
        raise ConfigError(f"{key}={group_tokens} does not divide the {length} tokens of a row; set a divisor")


@runtime_checkable
class TokenLossTerm(Protocol):
    """A term that is a function of the cross-entropy of every token of a micro-batch, such as one of whole answers.

    Logits of all tokens never exist for it. It sees the batch as rules have left it.
    """

    name: str
    weight: float

    def of_token_losses(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return the loss as a sum like that over tokens with a label: the trainer divides it by their number.

        Args:
            losses: fp32 [B, S], cross-entropy, 0 where there is no label; gradients flow into it.
            batch: The micro-batch.
        """
        ...


@runtime_checkable
class HeadLossTerm(LossTerm, Protocol):
    """A term that can also be had straight from the head's operands, beside cross-entropy.

    A trainer prefers this where it applies (a plain head, no other terms): no logits of the whole
    micro-batch exist, and both losses come from the same ones.
    """

    def with_cross_entropy(
        self,
        head: tuple[Tensor, Tensor, Tensor | None],
        labels: Tensor,
        extras: Mapping[str, Tensor],
        *,
        cross_entropy_weight: float,
        chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted total, which alone carries gradients, cross-entropy, and the term: sums.

        Args:
            head: Student hidden states [N, H], head weight [V, H] and bias [V].
            labels: Targets [N] int64, -100 where ignored.
            extras: What `prepare` returned, flattened to [N, ...].
            cross_entropy_weight: Weight of cross-entropy in the total, beside the term's own.
            chunk_tokens: Tokens whose logits may exist at once; None chooses by memory.
        """
        ...


@runtime_checkable
class EmbeddingLossTerm(Protocol):
    """A term of a model whose output is one vector for a text (`model.task: embedding`)."""

    name: str
    weight: float

    def of_embeddings(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Return the loss as a sum over the micro-batch's rows: the trainer divides it by those of the step.

        Called once a micro-batch, in the order of the step, also in forwards that only look ahead.

        Args:
            embeddings: fp32 [B, texts, H]; gradients flow into it. Those of texts that are not there mean nothing.
            batch: The micro-batch, see `leanmill.data.sentence_rows`.
        """
        ...


LmLossTerm = LossTerm | TokenLossTerm
"""Of models that predict tokens."""
AnyLossTerm = LmLossTerm | EmbeddingLossTerm
