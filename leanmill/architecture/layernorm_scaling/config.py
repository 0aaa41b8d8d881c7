"""Configuration of LayerNorm scaling. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class LayerNormScaling(TechniqueConfig):
    """Scale the norms before attention and MLP by one over the square root of their depth.

    Sun et al. 2025, arXiv:2502.05795.
    """

    type: Literal["layernorm_scaling"] = "layernorm_scaling"
    """Name of the technique."""
    start: Literal["as_scaled", "as_loaded"] = "as_scaled"
    """What a model that is loaded from `model.path` starts as: `as_scaled` with its norms' outputs scaled,
    another function than it was trained to be; `as_loaded` with weights that make up for it, which is how a
    model exported from such a run goes on as what it is."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand around the norms before attention and MLP.

        Raises:
            ConfigError: The family has none, or they have no weight that an export could put the scale in.
        """
        from leanmill.architecture.layernorm_scaling.install import install

        install(sites, starts_folded=self.start == "as_loaded")
        return Installation()
