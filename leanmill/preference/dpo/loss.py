"""Losses over the difference of two log-ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from leanmill.core.technique import InstallContext
from leanmill.preference.answers import PairLoss


Kind = Literal["sigmoid", "hinge", "ipo", "robust"]


def pair_loss(difference: Tensor, *, beta: float, kind: Kind, label_smoothing: float = 0.0) -> Tensor:
    """Return the loss of each pair, fp32.

    Args:
        difference: Log-ratio of the chosen answer less that of the rejected one; for `ipo` means over tokens.
        beta: Above 0.
        kind: `sigmoid`: -log s(b d). `hinge`: max(0, 1 - b d). `ipo`: (d - 1 / 2b)^2. `robust`: the loss that is
            `sigmoid` in the mean where a share e of labels is wrong, (-(1 - e) log s(b d) + e log s(-b d)) / (1 - 2e).
        label_smoothing: e.
    """
    if kind == "hinge":
        return (1 - beta * difference).relu()
    if kind == "ipo":
        return (difference - 1 / (2 * beta)).square()
    if kind == "sigmoid":
        return -logsigmoid(beta * difference)
    right, wrong = logsigmoid(beta * difference), logsigmoid(-beta * difference)
    return (label_smoothing * wrong - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)


class DpoLoss(PairLoss):
    """DPO and its kin; see `Dpo` for the arguments."""

    metric_names = ("accuracy", "margin", "chosen_reward", "rejected_reward")

    def __init__(
        self,
        model: nn.Module,
        context: InstallContext,
        *,
        reference: str | None,
        cache_dir: str | None,
        weight: float,
        beta: float,
        kind: Kind,
        label_smoothing: float,
        chosen_weight: float,
    ) -> None:
        super().__init__(
            model,
            context,
            technique="dpo",
            reference=reference,
            cache_dir=cache_dir,
            weight=weight,
            num_pieces=2,
        )
        self.beta, self.kind, self.label_smoothing, self.chosen_weight = beta, kind, label_smoothing, chosen_weight

    def of_answers(self, ratios: Tensor, counts: Tensor, is_pair: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See `PairLoss`."""
        chosen, rejected = (ratios / counts if self.kind == "ipo" else ratios).unbind(-1)
        loss = pair_loss(chosen - rejected, beta=self.beta, kind=self.kind, label_smoothing=self.label_smoothing)
        rewards = self.beta * ratios.detach()
        margin = rewards[..., 0] - rewards[..., 1]
        return loss, ((margin > 0).float(), margin, rewards[..., 0], rewards[..., 1])

    def of_chosen(self, log_probabilities: Tensor) -> Tensor | None:
        """See `PairLoss`."""
        return -self.chosen_weight * log_probabilities.sum() if self.chosen_weight else None
