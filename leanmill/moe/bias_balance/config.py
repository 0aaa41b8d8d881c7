"""Configuration of load balance by biases. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class BiasBalance(TechniqueConfig):
    """Keep experts equally loaded by a bias on their choice, without a loss (Wang et al. 2024, arXiv:2408.15664).

    For families whose routers have such a bias, as DeepSeek-V3's `e_score_correction_bias`: an export carries it.
    """

    type: Literal["bias_balance"] = "bias_balance"
    """Name of the technique."""
    rate: float = Field(default=1e-3, gt=0)
    """What a step adds to the bias of an expert with less than the mean load, and takes from one with more; in units of
    the router's scores, sigmoids for DeepSeek-V3."""
    until: float = Field(default=1.0, gt=0, le=1)
    """Share of the run's steps after which biases stay as they are; DeepSeek-V3 kept them for its last 0.03."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Have every router's bias moved after each optimizer step."""
        from leanmill.moe.bias_balance.install import move_biases

        move_biases(sites, context, rate=self.rate, until=self.until)
        return Installation()
