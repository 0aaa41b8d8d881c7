"""Configuration of direct preference optimisation. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext
from leanmill.preference.config import PreferenceConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Dpo(PreferenceConfig):
    """Prefer the chosen of two answers, by log-ratios to a reference (Rafailov et al. 2023, arXiv:2305.18290)."""

    type: Literal["dpo"] = "dpo"
    """Name of the technique."""
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """`sigmoid` is DPO; `hinge` SLiC's (Zhao et al. 2023, arXiv:2305.10425); `ipo` of means over tokens (Azar et al.
    2023, arXiv:2310.12036); `robust` for labels of which some are wrong (Chowdhury et al. 2024, arXiv:2403.00409)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs whose labels `robust` takes for wrong."""
    chosen_weight: float = Field(default=0.0, ge=0)
    """Weight of next-token cross-entropy of the chosen answers beside the loss (Pang et al. 2024, arXiv:2404.19733)."""

    @model_validator(mode="after")
    def _smoothing_needs_robust(self) -> Self:
        if self.label_smoothing > 0 and self.loss != "robust":
            raise ConfigError(
                f"dpo.label_smoothing={self.label_smoothing:g} is for loss: robust, and loss is {self.loss}; set "
                f"loss: robust, or remove it"
            )
        return self

    def num_compared(self) -> int:
        """Two."""
        return 2

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Add the rule and the loss term, which are one object."""
        from leanmill.preference.dpo.loss import DpoLoss

        loss = DpoLoss(
            sites.model,
            context,
            reference=self.reference,
            cache_dir=self.cache_dir,
            weight=self.weight,
            beta=self.beta,
            kind=self.loss,
            label_smoothing=self.label_smoothing,
            chosen_weight=self.chosen_weight,
        )
        return Installation(loss_terms=(loss,), step_rules=(loss,))
