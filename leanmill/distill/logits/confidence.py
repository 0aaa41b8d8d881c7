"""How sure a teacher is of the data, by which CAKLD weighs its two divergences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from leanmill.core.batches import Batch, BatchRule, Score
from leanmill.core.rules import StepContext
from leanmill.distill.logits.teachers import Teachers
from leanmill.parallel.collectives import sum_over_ranks


class Weighed(Protocol):
    """A loss term that the teacher's confidence goes to."""

    beta: float
    teachers: Teachers | None


class ConfidenceRule(BatchRule):
    """Measures the teacher's mean probability of the next token, once, and gives it to the term.

    Du et al. 2024 (arXiv:2402.10631), section 3.2: gamma = E[mean over tokens of P_T(y_t | x, y_<t)], taken before
    training over the data; here over the tokens with a label of the run's first step, all ranks together, each
    counting once. Batches stay as they are.

    Args:
        term: Its `beta` is set.
    """

    name = "distill"

    def __init__(self, term: Weighed) -> None:
        self._term = term
        self._confidence: float | None = None

    def change_batches(self, batches: Sequence[Batch], context: StepContext, score: Score) -> Sequence[Batch]:
        """See `BatchRule`."""
        if self._confidence is None:
            sums = torch.stack([self._sums(batch, score) for batch in batches]).sum(0)
            total, num_tokens = sum_over_ranks(sums).tolist()
            self._set(total / max(num_tokens, 1))
        return batches

    def _sums(self, batch: Batch, score: Score) -> torch.Tensor:
        has_label = batch["labels"] != -100
        assert self._term.teachers is not None, "checked when the recipe was parsed"
        of_labels = torch.where(has_label, self._term.teachers.probability_of_labels(batch, score), 0.0)
        return torch.stack([of_labels.sum(), has_label.sum().double()])

    def _set(self, confidence: float) -> None:
        # Both divergences stay in, however sure the teacher is.
        self._confidence = self._term.beta = min(max(confidence, 1e-3), 1 - 1e-3)

    def state_dict(self) -> dict[str, Any]:
        """Return the measured confidence."""
        return {} if self._confidence is None else {"confidence": self._confidence}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `StepRule`."""
        if "confidence" in state:
            self._set(state["confidence"])

    def metrics(self) -> Mapping[str, float]:
        """Return the confidence."""
        return {} if self._confidence is None else {"confidence": self._confidence}
