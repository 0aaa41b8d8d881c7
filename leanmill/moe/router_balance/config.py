"""Configuration of the losses that keep experts equally loaded. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class RouterBalance(TechniqueConfig):
    """Keep experts equally loaded (Fedus et al. 2021, arXiv:2101.03961; Qiu et al. 2025, arXiv:2501.11873)."""

    type: Literal["router_balance"] = "router_balance"
    """Name of the technique."""
    weight: float = Field(default=0.01, ge=0)
    """Weight of the load-balance loss, a mean over layers that is 1 for equal loads whatever the number of
    experts a token goes to. transformers' `router_aux_loss_coef` c is c x that number here."""
    scope: Literal["global_batch", "micro_batch"] = "global_batch"
    """Over which tokens the load of an expert is counted: those of all ranks and of the step's micro-batches
    so far, or those of one rank's micro-batch."""
    z_weight: float = Field(default=0.001, ge=0)
    """Weight of the router z-loss, the mean square of the log of the softmax's denominator (Zoph et al. 2022,
    arXiv:2202.08906)."""

    @model_validator(mode="after")
    def _adds_a_loss(self) -> Self:
        if self.weight == 0 and self.z_weight == 0:
            raise ConfigError(
                "router_balance with weight=0 and z_weight=0 adds nothing; remove it, or set weight: 0.01"
            )
        return self

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around every router."""
        from leanmill.moe.router_balance.balance import balance_routers

        rule = balance_routers(
            sites, context.ledger, weight=self.weight, z_weight=self.z_weight, is_global=self.scope == "global_batch"
        )
        return Installation(step_rules=(rule,))
