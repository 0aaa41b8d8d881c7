"""Configuration of selective language modelling. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Rho1(TechniqueConfig):
    """Train on the tokens that a reference model finds easier than the student (Lin et al. 2024, arXiv:2404.07965)."""

    type: Literal["rho1"] = "rho1"
    """Name of the technique."""
    reference: str = Field(min_length=1)
    """Folder or hub name of the reference, a causal LM with the student's vocabulary, trained on text
    like that which the student is to learn."""
    kept_share: float = Field(default=0.6, gt=0, lt=1)
    """Share of tokens that a step trains on: those of largest excess loss. The paper takes 0.6 for a
    model of 1B parameters and 0.7 for one of 7B."""
    scope: Literal["step", "micro_batch"] = "step"
    """Among which tokens the share is taken: all of the step, over all ranks, or each micro-batch alone."""
    warmup_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the run's steps, from its start, that train on every token."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Add the rule; the reference is loaded when the first tokens are chosen."""
        from leanmill.distill.rho1.rule import Rho1Rule

        rule = Rho1Rule(
            context,
            reference=self.reference,
            kept_share=self.kept_share,
            scope=self.scope,
            warmup_share=self.warmup_share,
        )
        return Installation(step_rules=(rule,))

    def takes_tokens_out(self) -> bool:
        """It does."""
        return True

    def frozen_models(self) -> Mapping[str, str]:
        """Return the reference."""
        return {"reference": self.reference}
