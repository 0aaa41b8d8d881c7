"""What further tokens weigh in a step."""

from __future__ import annotations

from collections.abc import Sequence

from leanmill.core.account import Account
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.shared_head import SharedHead


def weight_in(step: int, num_steps: int, *, weight: float, late_weight: float, late_from: float) -> float:
    """Return lambda of a step, counted from 0."""
    return late_weight if step >= late_from * num_steps else weight


class WeightRule(StepRule):
    """Writes lambda / D to the accounts of D depths.

    Args:
        accounts: One a depth.
        head: Is looked at once all techniques are installed.
        weight: See `weight_in`.
        late_weight: See `weight_in`.
        late_from: See `weight_in`.
    """

    name = "multi_token"

    def __init__(
        self, accounts: Sequence[Account], head: SharedHead, *, weight: float, late_weight: float, late_from: float
    ) -> None:
        self.accounts, self.head = accounts, head
        self.weight, self.late_weight, self.late_from = weight, late_weight, late_from

    def check(self) -> None:
        self.head.check()

    def begin_step(self, context: StepContext) -> None:
        weight = weight_in(
            context.step,
            context.num_steps,
            weight=self.weight,
            late_weight=self.late_weight,
            late_from=self.late_from,
        )
        for account in self.accounts:
            account.factor.fill_(weight / len(self.accounts))
