"""Configuration of training with a fixed mask. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from leanmill.core.technique import Installation, InstallContext, WeightTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class StaticMaskConfig(WeightTechniqueConfig):
    """Train what a pruned model has left; its zeros stay (Han et al. 2015, arXiv:1506.02626).

    Pruned weights get no gradient, whatever else changes the weight before the mask.
    """

    type: Literal["static_mask"] = "static_mask"
    """Name of the technique."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a mask on every target, to be filled from the loaded weights."""
        from leanmill.sparse.static_mask.stage import StaticMask

        for site in sites.select(self.targets, self.exclude):
            site.put(StaticMask(site.raw_weight))
        return Installation()
