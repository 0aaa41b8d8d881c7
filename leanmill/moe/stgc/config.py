"""Configuration of STGC. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class Stgc(TechniqueConfig):
    """Route tokens away from experts whose mean gradient theirs conflicts with.

    Solving Token Gradient Conflict: Yang et al. 2024, arXiv:2406.19905.
    """

    type: Literal["stgc"] = "stgc"
    """Name of the technique."""
    weight: float = Field(default=0.01, gt=0)
    """Weight of the conflict elimination loss, a mean over layers and over the copies of tokens that experts get."""
    threshold: float = Field(default=0.0, ge=-1, le=1)
    """tau: a token conflicts with an expert where the cosine of its gradient and the expert's mean one is below."""
    scope: Literal["data_parallel", "micro_batch"] = "data_parallel"
    """Over which tokens an expert's mean gradient is taken: those of all ranks' micro-batches at a time, at one
    reduction of [experts, hidden] a layer in backward, or those of the rank's own."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around every mixture of experts.

        Raises:
            ConfigError: The model has no routers, ones whose output is not understood, or ones that do not lie in
                the module whose output is the experts'.
        """
        from leanmill.moe.stgc.install import eliminate_conflicts

        rule = eliminate_conflicts(
            sites,
            context.ledger,
            weight=self.weight,
            threshold=self.threshold,
            is_global=self.scope == "data_parallel",
        )
        return Installation(step_rules=(rule,))
