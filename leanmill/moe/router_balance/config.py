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
    scope: Literal["sequence", "micro_batch", "data_parallel", "global_batch"] = "global_batch"
    """Over which tokens the load of an expert is counted: those of each row by itself (as in DeepSeek-V3), of one
    rank's micro-batch, of a micro-batch of all ranks, or of all micro-batches of all ranks in a step."""
    estimator: Literal["running", "warm_start", "two_pass"] | None = None
    """How loads of a global batch are had while its micro-batches are still to come: from those so far (`running`, what
    None is); those to come taken to be like the last step's (`warm_start`); or from a forward of the whole step
    without gradients before it (`two_pass`): exact, and about a third more compute. For `global_batch` alone."""
    z_weight: float = Field(default=0.001, ge=0)
    """Weight of the router z-loss, the mean square of the log of the softmax's denominator (Zoph et al. 2022,
    arXiv:2202.08906)."""
    device_weight: float = Field(default=0.0, ge=0)
    """Weight of DeepSeek-V2's device-level loss (arXiv:2405.04434): groups of experts equally loaded, whatever the
    experts within; 0.05 there."""
    communication_weight: float = Field(default=0.0, ge=0)
    """Weight of DeepSeek-V2's communication loss: devices get equally many tokens; 0.02 there."""
    num_devices: int | None = Field(default=None, ge=2)
    """Devices that the experts of a layer lie on, neighbours together, for those two; 8 in DeepSeek-V2."""
    devices_per_token: int | None = Field(default=None, ge=1)
    """The most devices that a token is sent to, for the communication loss; 3 in DeepSeek-V2."""

    @model_validator(mode="after")
    def _adds_a_loss(self) -> Self:
        if not (self.weight or self.z_weight or self.device_weight or self.communication_weight):
            raise ConfigError(
                "router_balance with weight=0 and z_weight=0 adds nothing; remove it, or set weight: 0.01"
            )
        return self

    @model_validator(mode="after")
    def _says_whose_loads(self) -> Self:
        if self.estimator is not None and self.scope != "global_batch":
            raise ConfigError(
                f"router_balance.estimator={self.estimator} is for loads of the whole step, and scope={self.scope} "
                f"counts less; remove it, or set scope: global_batch"
            )
        return self

    @model_validator(mode="after")
    def _knows_its_devices(self) -> Self:
        wants = self.device_weight > 0 or self.communication_weight > 0
        if wants and self.num_devices is None:
            raise ConfigError(
                "router_balance.device_weight and communication_weight need to know how many devices hold the experts; "
                "set num_devices: 8"
            )
        if not wants and (self.num_devices or self.devices_per_token):
            raise ConfigError(
                "router_balance.num_devices and devices_per_token serve device_weight and communication_weight, which "
                "are 0; remove them, or set device_weight: 0.05"
            )
        if self.communication_weight > 0 and self.devices_per_token is None:
            raise ConfigError(
                "router_balance.communication_weight needs the most devices that a token is sent to; set "
                "devices_per_token: 3"
            )
        if wants and self.scope == "sequence":
            raise ConfigError(
                "router_balance.device_weight and communication_weight are not computed per sequence; set scope: "
                "micro_batch, as in DeepSeek-V2, or global_batch"
            )
        if self.devices_per_token is not None and self.devices_per_token > (self.num_devices or 0):
            raise ConfigError(
                f"router_balance.devices_per_token={self.devices_per_token} is more than the num_devices="
                f"{self.num_devices} there are; set at most that"
            )
        return self

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around every router."""
        from leanmill.moe.balancing.factors import Devices
        from leanmill.moe.balancing.losses import Kind
        from leanmill.moe.router_balance.install import balance_routers

        weights: dict[Kind, float] = {"router_balance": self.weight}
        if self.device_weight > 0:
            weights["router_device"] = self.device_weight
        if self.communication_weight > 0:
            weights["router_communication"] = self.communication_weight
        devices = None
        if self.num_devices is not None:
            devices = Devices(self.num_devices, self.devices_per_token)
        rule = balance_routers(
            sites,
            context,
            weights=weights,
            z_weight=self.z_weight,
            scope=self.scope,
            estimator=self.estimator or "running",
            devices=devices,
        )
        return Installation(step_rules=(rule,))
