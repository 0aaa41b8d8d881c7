"""Configuration of norms by layer. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class LayerMetrics(TechniqueConfig):
    """Log the norm of each decoder block's weights, and its share of the gradient.

    Looked at in the steps that are logged, before clipping; results are the same with and without it.
    """

    type: Literal["layer_metrics"] = "layer_metrics"
    """Name of the technique."""

    def writes_masters(self) -> bool:
        """It reads what trains where the optimizer writes it."""
        return True

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Look at every parameter that trains."""
        from leanmill.architecture.layer_metrics.rule import LayerNorms

        return Installation(step_rules=(LayerNorms(sites.model),))
