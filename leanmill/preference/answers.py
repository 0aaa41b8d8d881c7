"""Whole answers in packed rows, what a reference thinks of them, and means over pairs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.adapters import adapter_parameters
from leanmill.core.batches import Batch, BatchRule, Score
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.names import clean_name
from leanmill.core.rules import StepContext
from leanmill.core.technique import InstallContext
from leanmill.core.vocabulary import check_vocabulary
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.preference.reference_cache import ReferenceCache


REFERENCE_LOSSES = "reference_losses"
"""fp32 [B, S] in a batch: cross-entropy of every token under the reference, 0 where there is no label."""


def answer_sums(values: Tensor, batch: Batch, num_pieces: int) -> Tensor:
    """Add up values of tokens over each conversation.

    Args:
        values: [B, S], fp32.
        batch: Rows of `data.task: preference`: conversations, each from position 0, `num_pieces` a document.
        num_pieces: 2 or 3.

    Returns:
        [B, G, num_pieces]; G is the most documents that a row of S tokens could hold, and what is not there is 0.
    """
    positions = batch["position_ids"]
    num_rows, length = positions.shape
    conversation = (positions == 0).cumsum(-1) - 1
    sums = values.new_zeros(num_rows, -(-length // num_pieces) * num_pieces)
    return sums.scatter_add(-1, conversation, values).view(num_rows, -1, num_pieces)


def num_labels(batch: Batch, num_pieces: int) -> Tensor:
    """Return how many tokens of each conversation are predicted, fp32 [B, G, num_pieces]; see `answer_sums`."""
    return answer_sums((batch["labels"] != -100).float(), batch, num_pieces)


def check_reference(technique: str, model: nn.Module, is_of_its_own: bool) -> None:
    """Refuse a reference without adapters that is not what training began with.

    Raises:
        ConfigError: There are no adapters to turn off, or something beside them trains.
    """
    if is_of_its_own:
        return
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    others = [clean_name(name) for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapters]
    if others or not adapters:
        what = f"{others[0]} trains beside adapters" if adapters else "the model has no adapters"
        raise ConfigError(
            f"{technique}.reference is not given, so the reference is the model without its adapters, but {what}; set "
            f"{technique}.reference to the folder that training starts from, or train with lora alone"
        )


class PairLoss(BatchRule):
    """A loss over pairs: the rule that asks the reference once a step, and the term that the trainer differentiates.

    Args:
        model: The model in training.
        context: Loads the reference.
        technique: Registered name.
        reference: Folder or hub name; None turns adapters off.
        cache_dir: Folder where what the reference says is kept; None keeps nothing.
        weight: Of the loss.
        num_pieces: Conversations of a document.
    """

    metric_names: tuple[str, ...]
    """What `of_answers` counts, as sums over pairs."""

    def __init__(
        self,
        model: nn.Module,
        context: InstallContext,
        *,
        technique: str,
        reference: str | None,
        cache_dir: str | None,
        weight: float,
        num_pieces: int,
    ) -> None:
        self.name, self.weight, self.num_pieces = technique, weight, num_pieces
        self._model, self._context, self._path = model, context, reference
        self._reference: nn.Module | None = None
        self._cache = None if cache_dir is None else ReferenceCache(context, technique, str(reference), cache_dir)
        self._per_pair: Tensor | None = None
        self._per_chosen_token: Tensor | None = None
        self._counted: Tensor | None = None
        self._metrics: dict[str, float] = {}

    def check(self) -> None:
        """See `check_reference`."""
        check_reference(self.name, self._model, self._path is not None)

    def change_batches(self, batches: Sequence[Batch], context: StepContext, score: Score) -> Sequence[Batch]:
        """Put what the reference thinks beside each micro-batch, and count pairs over all ranks.

        Raises:
            ConfigError: The reference's vocabulary is not the student's.
            RunError: The step has no pair.
        """
        self._counted = None
        counts = torch.stack([self._counts(batch) for batch in batches]).sum(0)
        num_tokens, num_pairs, num_chosen = sum_over_ranks(counts)
        if not num_pairs:
            raise RunError(f"{self.name}: a step has no pair; raise batch.tokens_per_step")
        # The trainer divides by the number of labels.
        self._per_pair, self._per_chosen_token = num_tokens / num_pairs, num_tokens / num_chosen
        found = self._of_batches(batches, score)
        return [{**batch, REFERENCE_LOSSES: losses} for batch, losses in zip(batches, found, strict=True)]

    def of_token_losses(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of the step's pairs x the step's labels; see `TokenLossTerm`."""
        assert self._per_pair is not None
        assert self._per_chosen_token is not None
        counts = num_labels(batch, self.num_pieces)
        is_pair = (counts > 0).all(-1)
        # Token by token: of two sums of a thousand nats each, their difference would keep four digits behind the point.
        ratios = answer_sums(batch[REFERENCE_LOSSES] - losses, batch, self.num_pieces)
        found, metrics = self.of_answers(ratios, counts.clamp(min=1), is_pair)
        self._note(metrics, is_pair)
        loss = torch.where(is_pair, found, 0.0).sum() * self._per_pair
        of_tokens = self.of_chosen(-answer_sums(losses, batch, self.num_pieces)[..., 0])
        return loss if of_tokens is None else loss + of_tokens * self._per_chosen_token

    @abstractmethod
    def of_answers(self, ratios: Tensor, counts: Tensor, is_pair: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the loss of each pair, [B, G], and what to count of each, `metric_names`.

        Args:
            ratios: [B, G, num_pieces], log-probability of each answer under the model less that under the reference.
            counts: [B, G, num_pieces], tokens of each, at least 1.
            is_pair: bool [B, G]; the others are not there, and what is returned of them counts nothing.
        """

    def of_chosen(self, log_probabilities: Tensor) -> Tensor | None:
        """Return a loss of the chosen answers, as a sum over tokens, given their log-probabilities [B, G]."""
        return None

    def after_optimizer(self, context: StepContext) -> None:
        """Reduce what was counted, where it is read."""
        if context.is_reported and self._counted is not None:
            *sums, num_pairs = sum_over_ranks(self._counted).tolist()
            self._metrics = {name: value / num_pairs for name, value in zip(self.metric_names, sums, strict=True)}

    def metrics(self) -> Mapping[str, float]:
        """Return means over the pairs of the last step that was counted, and the share of its rows that was read."""
        read = {} if self._cache is None else self._cache.metrics()
        return {**self._metrics, **read}

    @torch.no_grad()
    def _note(self, metrics: Sequence[Tensor], is_pair: Tensor) -> None:
        sums = [torch.where(is_pair, value, 0.0).sum() for value in metrics]
        counted = torch.stack([*sums, is_pair.sum().float()])
        self._counted = counted if self._counted is None else self._counted + counted

    def _counts(self, batch: Batch) -> Tensor:
        counts = num_labels(batch, self.num_pieces)
        return torch.stack([counts.sum(), (counts > 0).all(-1).sum().float(), counts[..., 0].sum()])

    def _of_batches(self, batches: Sequence[Batch], score: Score) -> list[Tensor]:
        if self._cache is None:
            return [self._of_reference(batch, score) for batch in batches]
        return self._cache.losses(batches, lambda batch: self._of_reference(batch, score))

    def _of_reference(self, batch: Batch, score: Score) -> Tensor:
        if self._path is None:
            return score(batch, adapters=False)
        if self._reference is None:
            reference: Any = self._context.load_frozen_model(self._path)
            check_vocabulary(self._context, self._path, reference.config.vocab_size, role="reference")
            self._reference = reference
        return score(batch, self._reference)
