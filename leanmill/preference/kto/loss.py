"""The loss of wanted and of unwanted answers, each against the model's distance from the reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from leanmill.core.technique import InstallContext
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.preference.answers import PairLoss


class KtoLoss(PairLoss):
    """Mean over all answers of weight x (1 - s(+- beta (log-ratio - z))).

    z, the KL divergence between model and reference, is the mean log-ratio of mismatched answers over the micro-batch
    of all ranks, at least 0, without a gradient. See `Kto` for the arguments.
    """

    metric_names = ("accuracy", "margin", "chosen_reward", "rejected_reward", "kl")

    def __init__(
        self,
        model: nn.Module,
        context: InstallContext,
        *,
        reference: str | None,
        cache_dir: str | None,
        weight: float,
        beta: float,
        chosen_weight: float,
        rejected_weight: float,
    ) -> None:
        super().__init__(
            model,
            context,
            technique="kto",
            reference=reference,
            cache_dir=cache_dir,
            weight=weight,
            num_pieces=3,
        )
        self.beta, self.chosen_weight, self.rejected_weight = beta, chosen_weight, rejected_weight

    def of_answers(self, ratios: Tensor, counts: Tensor, is_pair: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See `PairLoss`."""
        chosen, rejected, mismatched = ratios.unbind(-1)
        zero = self._zero(mismatched.detach(), is_pair)
        of_chosen = self.chosen_weight * (1 - (self.beta * (chosen - zero)).sigmoid())
        of_rejected = self.rejected_weight * (1 - (self.beta * (zero - rejected)).sigmoid())
        rewards = self.beta * ratios.detach()
        margin = rewards[..., 0] - rewards[..., 1]
        metrics = (margin > 0).float(), margin, rewards[..., 0], rewards[..., 1], zero.expand_as(margin)
        return (of_chosen + of_rejected) / 2, metrics

    @staticmethod
    def _zero(mismatched: Tensor, is_pair: Tensor) -> Tensor:
        sums = torch.stack([torch.where(is_pair, mismatched, 0.0).sum(), is_pair.sum().float()])
        total, number = sum_over_ranks(sums)
        return (total / number.clamp(min=1)).clamp(min=0)
