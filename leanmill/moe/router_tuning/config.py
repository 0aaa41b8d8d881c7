"""Configuration of Router-Tuning. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class RouterTuning(TrainedTechniqueConfig):
    """Train routers that skip attention for whole sequences, the model frozen.

    MindSkip: He et al. 2024, arXiv:2410.13184.
    """

    type: Literal["router_tuning"] = "router_tuning"
    """Name of the technique."""
    num_layers: int = Field(default=16, ge=1)
    """Layers with a router: the deepest but the last, which always attends."""
    target_capacity: float = Field(default=0.5, ge=0, lt=1)
    """Share of the tokens, of all ranks and of the step's micro-batches so far, for which a layer may attend at no
    cost."""
    capacity_weight: float = Field(default=0.01, ge=0)
    """Weight of what it attends beyond that, a sum over layers; 0 leaves it to cross-entropy."""

    def layers(self, num_layers: int) -> range:
        """Return the indices of the layers that get a router.

        Raises:
            ConfigError: The model has fewer.
        """
        if self.num_layers >= num_layers:
            raise ConfigError(
                f"router_tuning.num_layers={self.num_layers} and the last layer, which always attends, are more than "
                f"the {num_layers} layers of the model; set num_layers: {max(1, num_layers - 1)} or less"
            )
        return range(num_layers - 1 - self.num_layers, num_layers - 1)

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around attention of the chosen layers, and freeze the model.

        Raises:
            ConfigError: The model has too few layers, or a layer of another kind among them.
        """
        from leanmill.moe.router_tuning.attention import skip_attention

        rule = skip_attention(
            sites,
            context.ledger,
            self.layers,
            target_capacity=self.target_capacity,
            capacity_weight=self.capacity_weight,
        )
        return Installation(step_rules=(rule,), freeze_base=True)
