"""Configuration of Kahneman-Tversky optimisation. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext
from leanmill.preference.config import PreferenceConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Kto(PreferenceConfig):
    """Tell wanted answers from unwanted ones, each by itself (Ethayarajh et al. 2024, arXiv:2402.01306).

    Needs `data.mismatched_answers: true`.
    """

    type: Literal["kto"] = "kto"
    """Name of the technique."""
    chosen_weight: float = Field(default=1.0, gt=0)
    """Weight of the chosen answers."""
    rejected_weight: float = Field(default=1.0, gt=0)
    """Weight of the rejected ones."""

    def num_compared(self) -> int:
        """Two, and the mismatched one."""
        return 3

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Add the rule and the loss term, which are one object."""
        from leanmill.preference.kto.loss import KtoLoss

        loss = KtoLoss(
            sites.model,
            context,
            reference=self.reference,
            cache_dir=self.cache_dir,
            weight=self.weight,
            beta=self.beta,
            chosen_weight=self.chosen_weight,
            rejected_weight=self.rejected_weight,
        )
        return Installation(loss_terms=(loss,), step_rules=(loss,))
